"""`cpu` and `forking` are each behind one line: without the package and that line all else works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_ray

ROOT = Path(rlhf_ray.__file__).parent
TESTS = Path(__file__).parent
LINES = {"cpu": "generation/acceleration.py", "forking": "actors/worker_start.py"}
IMPORT_ALL = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def naming(package: str, root: Path) -> list[Path]:
    """Modules outside it that name it in an import; once for each line."""
    said = re.compile(rf"^\s*(from|import) rlhf_ray\.{package}\b", re.M)
    others = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] != package]
    return [path for path in others for _ in said.findall(path.read_text())]


@pytest.mark.parametrize("package", LINES)
def test_one_line_imports_it(package):
    assert naming(package, ROOT) == [ROOT / LINES[package]]


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A folder with a copy of all but these packages and their lines."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT, folder / "rlhf_ray", ignore=shutil.ignore_patterns("__pycache__", *LINES))
    shutil.copytree(TESTS, folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "test_cpu_*.py", "processors.py"))
    for package, name in LINES.items():
        file = folder / "rlhf_ray" / name
        lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if f"rlhf_ray.{package}" not in line]
        assert len(kept) == len(lines) - 1 and not (folder / "rlhf_ray" / package).exists()
        file.write_text("".join(kept))
    # An editable install finds modules of its own folder that a copy of the package lacks.
    (folder / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path = [one for one in sys.meta_path if 'editable' not in getattr(one, '__name__', '').lower()]\n"
    )
    return folder


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True,
        timeout=700,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.thorough
def test_all_else_can_be_imported_and_keeps_its_layers(without):
    optional = ("bench", "vader", "vllm", "__main__", "fork_client")  # they import what need not be installed, or run
    modules = [".".join(path.relative_to(without).with_suffix("").parts) for path in (without / "rlhf_ray").rglob("*.py")]
    run(without, "-c", IMPORT_ALL, *(each for each in modules if not any(word in each for word in optional)))
    run(without, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_layers.py")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_else_works(without):
    """Generation, PPO updates; workers of Ray."""
    for files in (("test_generation.py", "test_single_process.py"), ("test_ppo_ray.py",)):
        chosen = "not gpu and not slow and not thorough"
        assert "passed" in run(without, "-m", "pytest", "-q", "-m", chosen, *(f"tests/{file}" for file in files))

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
    return [path for path in root.rglob("*.py") if package not in path.parts for _ in said.findall(path.read_text())]


@pytest.mark.parametrize("package", LINES)
def test_one_line_imports_it(package):
    assert naming(package, ROOT) == [ROOT / LINES[package]]


@pytest.fixture(params=LINES)
def without(request, tmp_path):
    """(package, a folder with a copy of all without it, and without the line)."""
    package = request.param
    shutil.copytree(ROOT, tmp_path / "rlhf_ray", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(TESTS, tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "rlhf_ray" / package)
    file = tmp_path / "rlhf_ray" / LINES[package]
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if f"rlhf_ray.{package}" not in line]
    assert len(kept) == len(lines) - 1
    file.write_text("".join(kept))
    return package, tmp_path


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_all_else_can_be_imported_and_keeps_its_layers(without):
    package, folder = without
    optional = ("bench", "vllm", "__main__", "fork_client")  # they import what need not be installed, or run
    modules = [".".join(path.relative_to(folder).with_suffix("").parts) for path in (folder / "rlhf_ray").rglob("*.py")]
    run(folder, "-c", IMPORT_ALL, *(each for each in modules if not any(word in each for word in optional)))
    run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_layers.py")


WORK = {
    "cpu": ("tests/test_generation.py", "tests/test_single_process.py"),
    "forking": ("tests/test_weight_transport.py",),
}


@pytest.mark.slow
def test_all_else_works(without):
    """Generation, PPO updates; workers of Ray."""
    package, folder = without
    assert "passed" in run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", *WORK[package])

"""Newer Pythons than the one that runs the tests, where they are installed: dependencies resolve, every file compiles."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_ray

PACKAGE = Path(rlhf_ray.__file__).parent
ROOT = PACKAGE.parent
VERSIONS = ("3.11", "3.12", "3.13")


def interpreter(version):
    """The path of a Python of this version that starts, or None. pyenv keeps its own outside PATH."""
    kept = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}*/bin/python"))
    for path in filter(None, (shutil.which(f"python{version}"), *map(str, kept))):
        told = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(told, capture_output=True, text=True, check=False).stdout.strip() == version:
            return path
    return None


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", VERSIONS)
def test_dependencies_resolve_and_the_package_compiles(version, tmp_path):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"Python {version} is not installed here")
    if version == ".".join(map(str, sys.version_info[:2])):
        pytest.skip(f"the tests run on Python {version}")
    copy = tmp_path / "package"
    shutil.copytree(PACKAGE, copy / "rlhf_ray", ignore=shutil.ignore_patterns("__pycache__"))
    compiled = subprocess.run(
        [python, "-W", "error", "-m", "compileall", "-q", str(copy / "rlhf_ray")], capture_output=True, text=True
    )
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr

    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    venv = tmp_path / "venv"
    subprocess.run([python, "-m", "venv", str(venv)], check=True)
    resolved = subprocess.run(
        [str(venv / "bin" / "python"), "-m", "pip", "install", "--dry-run", "--disable-pip-version-check", "--quiet",
         "--report", str(tmp_path / "report.json"), f"{copy}[test,dev]"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert resolved.returncode == 0, resolved.stderr[-2000:]
    assert '"ray"' in (tmp_path / "report.json").read_text()


def test_the_supported_versions_are_those_that_are_named():
    """requires-python and the classifiers tell the same versions as this test."""
    text = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={VERSIONS[0]}"' in text
    assert [line for line in text.splitlines() if "Python :: 3." in line] == [
        f'    "Programming Language :: Python :: {version}",' for version in VERSIONS
    ]

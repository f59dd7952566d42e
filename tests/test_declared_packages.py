"""What the package and its tests import when they are loaded is there after `make install`, and not by another extra's chance."""

import ast
import importlib.metadata
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "rlhf_ray").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])


def spelled(name):
    """A distribution's name as the packaging standard compares it (PEP 503, for names with one separator at a time)."""
    return name.lower().replace("_", "-").replace(".", "-")


distributions = cache(importlib.metadata.packages_distributions)  # a second or two


@cache
def installed_by(*requirements):
    """The distributions that these bring, with all that they need in turn."""
    found, left = set(), [Requirement(each) for each in requirements]
    while left:
        wanted = left.pop()
        if (key := (spelled(wanted.name), frozenset(wanted.extras))) in found:
            continue
        found.add(key)
        try:
            needs = importlib.metadata.requires(wanted.name) or []
        except importlib.metadata.PackageNotFoundError:  # for another system
            continue
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ["", *wanted.extras]):
                left.append(need)
    return {name for name, _ in found}


def imports_when_loaded(statements):
    """(module, line) of the imports outside functions, classes, `try` and `with`."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from ((each.name, node.lineno) for each in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module, node.lineno
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from imports_when_loaded(node.body + node.orelse)


def undeclared(path, source, declared):
    beside = {each.stem for each in path.parent.glob("*.py")} | {each.stem for each in (ROOT / "tests").rglob("*.py")}
    for module, line in imports_when_loaded(ast.parse(source).body):
        top = module.partition(".")[0]
        if top in sys.stdlib_module_names or top in beside or top == "rlhf_ray":
            continue
        if not {spelled(each) for each in distributions().get(top, [])} & declared:
            yield f"{path.relative_to(ROOT)}:{line} imports {module}"


@pytest.fixture(scope="module")
def declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return installed_by(*project["dependencies"], *project["optional-dependencies"]["test"])


def test_all_that_is_imported_when_loaded_is_declared(declared):
    found = [each for path in FILES for each in undeclared(path, path.read_text(), declared)]
    assert not found, "add it to pyproject.toml, or import it where it is used and skip without: " + ", ".join(found)


def test_the_test_sees_what_is_not_declared(declared):
    path = ROOT / "tests" / "test_declared_packages.py"
    assert list(undeclared(path, "import numpy\nif 1:\n    import wandb.sdk\n", declared)) == [
        "tests/test_declared_packages.py:3 imports wandb.sdk"
    ]
    assert not list(undeclared(path, "def run():\n    import wandb\n", declared))

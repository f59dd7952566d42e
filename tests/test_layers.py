"""Who may import whom: read from the source, so a lazy import counts too. Each package's own docstring says what it may."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

import rlhf_ray

ROOT = Path(rlhf_ray.__file__).parent
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.py"))
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
AT_THE_ROOT = {"__init__", "__main__", "errors", "messages"}
HEAVY = (
    "ray", "deepspeed", "torch.distributed", "transformers", "trl", "peft", "accelerate", "vllm", "typer", "rich", "fastapi",
    "sqlalchemy", "psycopg",
)  # fmt: skip


def type_checking_only(tree):
    """Nodes under `if TYPE_CHECKING:`: names for annotations, nothing that runs."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


@cache
def imports_of(source):
    """Dotted names of everything that the source imports, wherever in it; `from a import b` is a.b."""
    tree = ast.parse(source)
    skipped, found = type_checking_only(tree), set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def source_of(module):
    return (ROOT / f"{module}.py").read_text()


def module_of(dotted):
    """'rlhf_ray.training.forward.token_batch' -> 'training/forward'."""
    parts = dotted.split(".")[1:]
    while parts and "/".join(parts) not in MODULES and f"{'/'.join(parts)}/__init__" not in MODULES:
        parts.pop()
    name = "/".join(parts) or "__init__"
    return name if name in MODULES else f"{name}/__init__"


def own_imports(module):
    found = imports_of(source_of(module))
    return {module_of(name) for name in found if name.split(".")[0] == "rlhf_ray"} - {module}


def foreign_imports(module):
    found = imports_of(source_of(module))
    return {name for name in found if name.split(".")[0] != "rlhf_ray"}


def package_of(module):
    return module.split("/")[0]


def said(package, label):
    """What the line `label: a, b.` of the package's docstring lists."""
    docstring = ast.get_docstring(ast.parse(source_of(f"{package}/__init__"))) or ""
    found = re.search(rf"^{label}: ([^:]*?)\.$", docstring, re.M)
    names = re.sub(r"\s+", " ", found.group(1)) if found else ""
    return set() if names == "nothing of the package" else {name.strip() for name in names.split(",") if name.strip()}


def uses(name, package):
    return name == package or name.startswith(f"{package}.")


def circle(graph):
    """A path of the graph that comes back to where it began, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        for other in sorted(graph.get(node, ())):
            found = visit(other)
            if found:
                return found
        done.add(path.pop())
        return None

    return next((found for node in sorted(graph) if (found := visit(node))), None)


def shared(named):
    """Of (name, where) those names that stand in several places -> the places."""
    places = {}
    for name, where in named:
        places.setdefault(name, []).append(where)
    return {name: where for name, where in places.items() if len(where) > 1}


def test_no_two_modules_share_a_name():
    """So that a file's name says which one it is, in a traceback, an editor's tab or a sentence."""
    assert not shared((module.split("/")[-1], module) for module in MODULES if not module.endswith("__"))


def test_no_two_public_classes_share_a_name():
    classes = [
        (node.name, module)
        for module in MODULES
        for node in ast.parse(source_of(module)).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert len(classes) > 200 and not shared(classes)


def test_nothing_lies_loose_at_the_root():
    assert {module for module in MODULES if "/" not in module} == AT_THE_ROOT
    assert (ROOT / "py.typed").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_what_its_docstring_allows(package):
    modules = [module for module in MODULES if package_of(module) == package]
    used = {package_of(other): (module, other) for module in modules for other in own_imports(module)}
    used.pop(package, None)
    strays = {other: where for other, where in used.items() if other not in said(package, "May import")}
    assert not strays, f"{package} imports {strays}; its docstring does not allow that"
    idle = (said(package, "May import") & set(PACKAGES)) - used.keys()
    assert not idle, f"{package} may import {sorted(idle)} and does not"


def test_imports_go_down():
    """Neither the packages as they describe themselves nor the modules as they are have a circle."""
    assert circle({package: said(package, "May import") for package in PACKAGES}) is None
    assert circle({module: own_imports(module) for module in MODULES}) is None


@pytest.mark.parametrize("package", PACKAGES)
def test_heavy_packages_stay_where_a_docstring_names_them(package):
    modules = [module for module in MODULES if package_of(module) == package]
    used = {heavy: module for module in modules for name in foreign_imports(module) for heavy in HEAVY if uses(name, heavy)}
    assert used.keys() == said(package, "Heavy packages"), used


def test_deepspeed_and_process_groups_are_used_in_training_only():
    for heavy in ("deepspeed", "torch.distributed"):
        assert [package for package in PACKAGES if heavy in said(package, "Heavy packages")] == ["training"]


def test_the_maths_needs_torch_only():
    """And what Python brings along."""
    for module in (module for module in MODULES if package_of(module) == "algorithms"):
        others = {name.split(".")[0] for name in foreign_imports(module)} - set(sys.stdlib_module_names)
        assert others <= {"torch"}, f"{module} imports {others}"


def test_nothing_reads_pickles():
    readers = {"pickle", "dill", "cloudpickle", "joblib"}
    for module in MODULES:
        used = [name for name in foreign_imports(module) if name.split(".")[0] in readers]
        assert not used, f"{module} imports {used}"


def test_nothing_is_loaded_by_torch():
    """torch.load unpickles; what this package writes and reads is safetensors and JSON."""
    assert not [module for module in MODULES if re.search(r"\btorch\.(load|save)\(", source_of(module))]


def test_the_test_sees_what_it_must_refuse():
    """On source of its own, so that a blind parser is noticed."""
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import ray.data
def late():
    import deepspeed.utils as ds
    from torch import distributed
    from rlhf_ray.actors.wait import Waiter
"""
    found = imports_of(source)
    assert found == {"typing.TYPE_CHECKING", "deepspeed.utils", "torch.distributed", "rlhf_ray.actors.wait.Waiter"}
    assert module_of("rlhf_ray.actors.wait.Waiter") == "actors/wait" and module_of("rlhf_ray.data") == "data/__init__"
    assert uses("torch.distributed", "torch.distributed") and not uses("torch.distributions", "torch.distributed")
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"] and circle({"a": {"b"}, "b": set()}) is None
    assert said("algorithms", "May import") == set() and "ray" in said("actors", "Heavy packages")
    assert shared([("finite", "models"), ("gae", "algorithms"), ("finite", "rewards")]) == {"finite": ["models", "rewards"]}

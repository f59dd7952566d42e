"""Imports only go down, and each heavy package has its room: read from the source, so a lazy import counts too."""

import ast
from pathlib import Path

import pytest

import rlhf_ray

ROOT = Path(rlhf_ray.__file__).parent
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.py"))

#: layer -> folders and modules
LAYERS = (
    (
        "types",
        "config",
        "errors",
        "collector",
        "kernels",
        "run_folder",
        "generation_types",
        "user_functions",
        "function_worker",
    ),
    ("algorithms", "recipe_file", "threads"),
    ("engines", "models", "data"),
    ("roles", "supervised", "checkpoint", "metrics", "events"),
    ("loop", "ahead", "controller", "pipeline", "adopt", "evaluation", "plain_ppo"),
    ("cli", "actors", "serving"),
)
#: modules that stand in another layer than their folder
OTHERWISE = {
    "supervised/launch": 5,  # the Ray Train launcher
    "__init__": 5,  # the public door
}
#: package -> the folders and modules that may import it
ROOMS = {
    "ray": ("actors", "cli", "serving", "supervised/launch"),
    "deepspeed": ("engines",),
    "torch.distributed": ("engines",),
    "transformers": ("models", "data", "engines", "supervised", "cli/bench/yardsticks"),
    "trl": ("supervised", "cli/bench/yardsticks"),
    "peft": ("models",),
    "accelerate": (),
    "vllm": ("engines", "cli/bench/yardsticks"),
    "typer": ("cli",),
    "rich": ("cli",),
    "fastapi": ("serving",),
}
PURE = "algorithms"


def type_checking_only(tree):
    """Nodes under `if TYPE_CHECKING:`: names for annotations, nothing that runs."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


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


def layer_of(module):
    """The layer of a path like 'engines/forward'; None: this page does not know it."""
    if module in OTHERWISE:
        return OTHERWISE[module]
    top = module.split("/")[0]
    return next((layer for layer, names in enumerate(LAYERS) if top in names), None)


def module_of(dotted):
    """'rlhf_ray.engines.forward.pad_rows' -> 'engines/forward'."""
    parts = dotted.split(".")[1:]
    while parts and "/".join(parts) not in MODULES and not (ROOT / "/".join(parts)).is_dir():
        parts.pop()
    return "/".join(parts) or "__init__"


def own_imports(module):
    found = imports_of((ROOT / f"{module}.py").read_text())
    return {module_of(name) for name in found if name.split(".")[0] == "rlhf_ray"}


def foreign_imports(module):
    found = imports_of((ROOT / f"{module}.py").read_text())
    return {name for name in found if name.split(".")[0] != "rlhf_ray"}


def in_room(module, rooms):
    return any(module == room or module.startswith(f"{room}/") for room in rooms)


def uses(name, package):
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    layer = layer_of(module)
    assert layer is not None, f"{module} stands in no layer; add it to this test's table"
    higher = sorted(other for other in own_imports(module) if layer_of(other) is None or layer_of(other) > layer)
    assert not higher, f"{module} (layer {layer}) imports {higher}"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_stay_in_their_rooms(module):
    found = foreign_imports(module)
    strays = sorted(
        name for name in found for package, rooms in ROOMS.items() if uses(name, package) and not in_room(module, rooms)
    )
    assert not strays, f"{module} imports {strays}"


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith(f"{PURE}/")])
def test_the_maths_needs_torch_only(module):
    """And what Python brings along."""
    import sys

    heavy = {name.split(".")[0] for name in foreign_imports(module)} - set(sys.stdlib_module_names) - {"torch"}
    assert not heavy, f"{module} imports {heavy}"


def test_nothing_reads_pickles():
    readers = {"pickle", "dill", "cloudpickle", "joblib"}
    for module in MODULES:
        used = [name for name in foreign_imports(module) if name.split(".")[0] in readers]
        assert not used, f"{module} imports {used}"


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
    assert module_of("rlhf_ray.actors.wait.Waiter") == "actors/wait" and layer_of("actors/wait") == 5
    assert uses("torch.distributed", "torch.distributed") and not uses("torch.distributions", "torch.distributed")

"""What a submitted job takes along: the package, the resolved recipe, the user's own modules, named small data.

In: a recipe and the data files that the user named. Out: a folder for Ray to upload, and a list of what is in it.
Local data travels inside the run folder (RUN_DIR/uploads), not in Ray's unpacked copy: that copy has another path in
every submission, and a recipe whose paths change can't be resumed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

import yaml

from rlhf_ray.config import Recipe
from rlhf_ray.config.recipe_file import function_names, path_fields
from rlhf_ray.config.user_paths import expanded
from rlhf_ray.errors import UserError

MAX_DATA_MB = 64  # Ray keeps an upload in the head's memory and sends it to every node
RECIPE_FILE = "recipe.yaml"
DATA_FOLDER = "uploads"


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that is uploaded."""

    what: str
    path: Path
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.what}: {self.path} ({_size_text(self.size)})"


def stage(
    recipe: Recipe, folder: Path, *, run_dir: str, data: Sequence[str | Path] = (), here: Path | None = None
) -> list[Item]:
    """Fill the empty `folder` with what the job needs; return what is in it. `here` is where modules are looked for.

    UserError for local data that is neither named in `data` nor given by a path the cluster can see, or is too large.
    """
    here = here or Path.cwd()
    package = Path(__file__).parents[1]
    items = [_copy("code", package, folder / package.name)]
    for module in _own_modules(recipe, here):
        items.append(_copy("your module", module, folder / module.name))

    named = {expanded(path).resolve() for path in data}
    sent = [_copy_data(path, folder / DATA_FOLDER, run_dir) for path in sorted(named)]
    total = sum(item.size for item in sent)
    if total > MAX_DATA_MB * 1e6:
        raise UserError(
            f"the data to upload is {_size_text(total)}, over {MAX_DATA_MB} MB; put it where every node "
            "of the cluster sees it (shared file system, hub, s3://...) and name that place in the recipe"
        )

    settings = recipe.model_dump(mode="json")
    used = set()
    for field, text in path_fields(recipe):
        path = expanded(text)
        if path.resolve() in named:
            used.add(path.resolve())
            _put(settings, field, f"{run_dir}/{DATA_FOLDER}/{path.resolve().name}")
        elif not path.is_absolute() and path.exists():
            raise UserError(
                f"{_dotted(field)} = '{text}' is a path on this machine ({_size_text(_size(path))}), which "
                "the cluster can't see; give an absolute path that every node sees, or name it with "
                f"--data {text} (at most {MAX_DATA_MB} MB in all)"
            )
    if named - used:
        unused = ", ".join(str(path) for path in sorted(named - used))
        raise UserError(f"--data {unused}: no field of the recipe names it; set data.root or a source's path to it")
    resolved = Recipe.model_validate(settings)
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False))
    return [*items, Item("resolved recipe", Path(RECIPE_FILE), (folder / RECIPE_FILE).stat().st_size), *sent]


def _copy(what: str, source: Path, target: Path) -> Item:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copy(source, target)
    return Item(what, source, _size(target))


def _copy_data(source: Path, folder: Path, run_dir: str) -> Item:
    if not source.exists():
        raise UserError(f"--data {source}: there is no such file or folder")
    if "://" in run_dir:
        raise UserError(
            f"--data puts data into the run folder, which is {run_dir}, not a path; put the data "
            "where the cluster sees it and name that place in the recipe"
        )
    if (folder / source.name).exists():
        raise UserError(f"--data: two of the paths end in '{source.name}'; rename one")
    size = _size(source)
    folder.mkdir(exist_ok=True)
    if size <= MAX_DATA_MB * 1e6:  # a larger one is refused by the caller; no need to copy it first
        _copy("data", source, folder / source.name)
    return Item("data", source, size)


def _own_modules(recipe: Recipe, here: Path) -> list[Path]:
    """Modules named as plugins or package.module:function that lie in `here`: files or package folders, each once."""
    names = (recipe.data.builder, *function_names(recipe), *recipe.plugins)
    roots = {name.partition(":")[0].partition(".")[0] for name in names if name} - {"rlhf_ray"}
    found = [PathFinder.find_spec(root, [str(here)]) for root in sorted(roots)]
    return [
        Path(spec.submodule_search_locations[0] if spec.submodule_search_locations else spec.origin or "")
        for spec in found
        if spec is not None
    ]


def _put(settings: dict, field: tuple, value: str) -> None:
    *parents, last = field
    for key in parents:
        settings = settings[key]
    settings[last] = value


def _dotted(field: tuple) -> str:
    return ".".join(str(key) for key in field)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def _size_text(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"

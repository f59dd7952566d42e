"""The modules of one's own that a recipe names: a run that continues says which of them have changed, and what is gone."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from rlhf_ray.config import Recipe
from rlhf_ray.config.recipe_file import function_names
from rlhf_ray.errors import UserError
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.storage import read_object
from rlhf_ray.tables.figures import BUILT_IN, FIGURES


def digests(recipe: Recipe) -> dict[str, str]:
    """Module -> SHA-256 of its file, for plugins and the modules of functions. A package's is that of its `__init__.py`."""
    named = {path.partition(":")[0] for path in (*recipe.plugins, *function_names(recipe), recipe.data.builder or "")}
    found: dict[str, str] = {}
    for name in sorted(name for name in named if name and name.partition(".")[0] != "rlhf_ray"):
        file = _file_of(name)
        if file is not None:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _file_of(module: str) -> Path | None:
    """None where it has none, or is not here: a builder whose data is prepared may be gone."""
    try:
        spec = find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None
    file = Path(spec.origin) if spec is not None and spec.origin is not None else None
    return file if file is not None and file.is_file() else None


def own_figures() -> list[str]:
    """The figures that plugins have added to the evaluation's."""
    return [name for name in FIGURES if name not in BUILT_IN]


def record_changes(folder: RunFolder, now: dict[str, str], figures: list[str]) -> None:
    """An event for each module that was another one when this folder's environment.json was written, and for each figure of a
    plugin that was there and is not among these any more."""
    path = folder.path / "environment.json"
    remedy = "delete it, and the next run writes it again"
    recorded: dict[str, Any] = read_object(path, remedy) if path.exists() else {}
    before, had = recorded.get("modules", {}), recorded.get("figures", [])
    if not isinstance(before, dict) or not isinstance(had, list):
        raise UserError(f"{path} is damaged: 'modules' is no mapping, or 'figures' no list; {remedy}")
    before, had = cast(dict[str, Any], before), cast(list[str], had)
    for name in sorted(name for name in before.keys() & now.keys() if before[name] != now[name]):
        EventLog(folder.events).add(
            f"the module {name} has changed since this run folder was last used", "the run goes on with the new one"
        )
    for name in had:
        if name not in figures:
            EventLog(folder.events).add(
                f"no plugin has the figure '{name}' any more, which one had when this run folder was last used",
                "the evaluation does not measure it", stage="evaluation",
            )  # fmt: skip

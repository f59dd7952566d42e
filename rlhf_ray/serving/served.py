"""What a server serves: one model, or several by name, some of them adapters on the first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config.user_paths import expanded
from rlhf_ray.errors import UserError
from rlhf_ray.serving.engine_choice import EngineChoice, choose_engine
from rlhf_ray.serving.model_folder import find_model, is_adapter, model_name


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One name at the endpoint."""

    name: str
    folder: Path  # of the model, or of the one that the adapter is for
    adapter: Path | None
    engine: EngineChoice
    note: str | None = None  # what to tell before it is served

    def check(self) -> None:
        """UserError where its folder is not usable any more."""
        find_model(self.folder)
        if self.adapter is not None and not is_adapter(self.adapter):
            raise UserError(f"'{self.adapter}' holds no adapter any more; put it back")


def served_models(
    path: str | Path, name: str | None, more: Mapping[str, str | Path], *, engine: str | None, gpus: float
) -> tuple[ServedModel, ...]:
    """The model at `path` first, then those of `more`, name -> folder. An adapter in `more` is read on the first model.

    engine, gpus: as `choose_engine` takes them. UserError for a folder that can't be served, and for a name that is there twice.
    """
    first = _model(path, name, None, engine, gpus)
    found = [first]
    for other, folder in more.items():
        if other in [each.name for each in found]:
            raise UserError(f"--model {other}={folder}: '{other}' is served already; choose another name")
        found.append(_model(folder, other, first.folder if first.adapter is None else None, engine, gpus))
    return tuple(found)


def named_folders(given: Sequence[str]) -> dict[str, str]:
    """["NAME=PATH", ...] -> {NAME: PATH}"""
    found: dict[str, str] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not (equals and path.strip()) or not name.isprintable() or len(name.split()) != 1 or name != name.strip():
            raise UserError(
                f"--model {one!r} is not NAME=PATH; write the name that clients use, without spaces, '=', and the model's folder"
            )
        if name in found:
            raise UserError(f"--model names '{name}' twice; give each model its own name")
        found[name] = path
    return found


def _model(path: str | Path, name: str | None, base: Path | None, engine: str | None, gpus: float) -> ServedModel:
    given = expanded(path).resolve()
    if not is_adapter(given):
        choice = choose_engine(engine, path, gpus)  # imports the run's plugins, whose stages may have the policy
        folder = find_model(path)
        return ServedModel(name=name or model_name(path, folder), folder=folder, adapter=None, engine=choice)
    told = _checked_config(given).get("base_model_name_or_path")
    folder = find_model(base if base is not None else _base_of(given, told))
    note = None
    if base is not None and isinstance(told, str) and told and Path(told).name != folder.name:
        note = f"the adapter {given} says that it is for {told}; it is read on {folder}"
    return ServedModel(
        name=name or given.name, folder=folder, adapter=given, engine=choose_engine(engine, folder, gpus), note=note
    )


def _checked_config(adapter: Path) -> dict[str, Any]:
    try:
        config = json.loads((adapter / "adapter_config.json").read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"'{adapter / 'adapter_config.json'}' can't be read ({error}); write the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
        raise UserError(f"'{adapter}' is no low-rank adapter (LoRA) in peft's format, and no other kind is served; give one")
    return config


def _base_of(adapter: Path, told: Any) -> Path:
    """The folder that the adapter says it is for."""
    if isinstance(told, str) and Path(told).is_absolute() and Path(told).is_dir():
        return Path(told)
    raise UserError(
        f"'{adapter}' is an adapter for {told or 'a model that it does not name'}, which is no folder here; give that model, and "
        f"the adapter beside it: rlhf-ray serve MODEL --model {adapter.name}={adapter}"
    )

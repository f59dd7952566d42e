"""A model's generation_config as it can be saved again.

Many public models ship a generation_config that transformers loads with a warning and refuses to save: a temperature
without do_sample, options of beam search without beams. It is mended before the model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils.hub import cached_file

# Values that only count where tokens are drawn -> the values that ask for nothing.
SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 1.0), "top_p": (None, 1.0), "top_k": (None, 50, 0), "min_p": (None, 0.0), "top_h": (None,),
    "typical_p": (None, 1.0), "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0),
}  # fmt: skip
FIRST = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache", "eos_token_id")  # what others depend on


def declared(path: str | Path) -> dict[str, Any]:
    """What generation_config.json says; without it, what config.json says of generation. {}: neither can be read."""
    values = read_json(path, "generation_config.json")
    if values is not None:
        return values
    known = GenerationConfig().to_dict()
    return {name: value for name, value in (read_json(path, "config.json") or {}).items() if name in known}


def mended(path: str | Path) -> GenerationConfig | None:
    """The model's generation_config where it must differ from what is declared; None where transformers saves that."""
    values = declared(path)
    return None if is_sound(values) else settled(values)


def impossible(path: str | Path) -> dict[str, None]:
    """Options of generation in config.json that no model can be made with -> None, to load it without them."""
    known = GenerationConfig().to_dict()
    values = {name: value for name, value in (read_json(path, "config.json") or {}).items() if name in known}
    return {name: None for name, value in values.items() if not is_sound({name: value}, strict=False)}


def settled(values: Mapping[str, Any]) -> GenerationConfig:
    """The values with do_sample on where they mean sampling, and without those that contradict the others.

    A config that says do_sample false, a temperature of 0 or several beams does not draw: its sampling values go.
    """
    meant = dict(values)
    draws = [name for name, off in SAMPLING.items() if meant.get(name) not in off]
    temperature = meant.get("temperature")
    if isinstance(temperature, (int, float)) and temperature <= 0:
        meant |= {"do_sample": False}
    elif meant.get("do_sample") is None and draws and meant.get("num_beams") in (None, 1):
        meant |= {"do_sample": True}
    if meant.get("do_sample") is not True:
        meant = {name: value for name, value in meant.items() if name not in SAMPLING}
    if is_sound(meant):
        return GenerationConfig(**meant)
    kept: dict[str, Any] = {}
    for name in sorted(meant, key=lambda name: (name not in FIRST, name)):
        if is_sound(kept | {name: meant[name]}):
            kept[name] = meant[name]
    return GenerationConfig(**kept)


def is_sound(values: Mapping[str, Any], *, strict: bool = True) -> bool:
    """Whether transformers takes the values and, strict, would save them."""
    try:
        GenerationConfig(**dict(values)).validate(strict=strict)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def read_json(path: str | Path, name: str) -> dict[str, Any] | None:
    """A JSON file of a model's folder or hub repository; None where there is none that can be read."""
    file = Path(path) / name
    if not Path(path).is_dir():
        try:
            found = cached_file(
                str(path), name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_connection_errors=False,
            )  # fmt: skip
        except (OSError, ValueError):  # no such repository, or no name of one: loading the model says so
            return None
        if found is None:
            return None
        file = Path(found)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # transformers says what is wrong with it
        return None
    return values if isinstance(values, dict) else None

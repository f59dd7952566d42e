"""The folder that a command writes a model to."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.errors import UserError


def refuse_taken(target: Path) -> None:
    """UserError where `target` holds files, or where it or a folder above it is a file."""
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; choose another folder to write")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} exists and is not empty; choose another folder")

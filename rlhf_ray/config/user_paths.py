"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.errors import UserError


def expanded(path: str | Path) -> Path:
    """With the home folder for "~" and "~name". UserError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"'{path}' names the home folder of a user who is not known here; write the whole path") from error

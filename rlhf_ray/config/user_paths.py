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


def on_this_machine(path: str | Path, what: str) -> Path:
    """UserError for a URL (s3://...), which as a path would name a folder "s3:" here. what: what it is of, for the message."""
    if "://" in str(path):
        raise UserError(f"{what} is '{path}', a URL, and a path on this machine is needed; copy it with the store's own tool")
    return Path(path)

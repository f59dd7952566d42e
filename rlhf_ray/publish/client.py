"""What `rlhf-ray publish` does: a copy of the version that stays as it is, training's log-probs beside it, and a call to the
server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from rlhf_ray.errors import UserError
from rlhf_ray.publish.checked_rows import rows_of
from rlhf_ray.publish.servers import ServerNote
from rlhf_ray.publish.version import ROWS_FILE, Version, version_id

ANSWER_S = 1000.0  # replicas have to load the version


class Refused(UserError):
    """The server has said no, and holds nothing of it."""


def share_of(text: str) -> float:
    """ "10%" or "0.1" -> 0.1"""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"--canary {text} is no share; write it as 10% or 0.1, more than 0 and at most 100%")
    return share


def kept_copy(folder: Path, shelf: Path, base: Path | None = None) -> Version:
    """The version that `folder` holds now, copied to `shelf`/ID, where no training writes over it.

    base: the model's folder, where `folder` is an adapter on it.
    """
    name = version_id(folder) if base is None else version_id(base, folder)
    target = shelf / name
    if not target.is_dir():
        temporary = shelf / f".{name}.{os.getpid()}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns("*.bin", "*.pt", ".*"))
            temporary.rename(target)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"the version can't be copied to {target} ({error}); make room there") from None
    version = Version(id=name, folder=str(base or target), adapter=None if base is None else str(target))
    if not (target / ROWS_FILE).is_file():
        rows_of(version)
    return version


@contextmanager
def dropped_if_refused(folder: Path, since: float) -> Iterator[None]:
    """A `Refused` in the body of the `with` takes the copy away again, unless it was there before `since` (seconds since 1970):
    then a server may hold it."""
    try:
        yield
    except Refused:
        if folder.is_dir() and folder.stat().st_ctime >= since:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # other versions are there
                folder.parent.rmdir()
        raise


def publish(
    note: ServerNote,
    version: Version,
    *,
    model: str | None = None,
    share: float = 1.0,
    watch_s: float = 600.0,
    thresholds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """-> the state of the model's versions. UserError with the server's words where it refuses."""
    asked = {"model": model, "share": share, "watch_s": watch_s, "thresholds": dict(thresholds or {})}
    return _post(note, "publish", asked | version.to_json())


def roll_back(note: ServerNote, *, model: str | None = None, why: str) -> dict[str, Any]:
    return _post(note, "rollback", {"model": model, "why": why})


def _post(note: ServerNote, action: str, body: Mapping[str, Any]) -> dict[str, Any]:
    try:
        answer = httpx.post(
            f"{note.url}/control/{action}", json=dict(body), headers={"Authorization": f"Bearer {note.token}"},
            timeout=httpx.Timeout(ANSWER_S, connect=10), trust_env=False,
        )  # fmt: skip
        found = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise UserError(
            f"the server at {note.url} did not answer ({type(error).__name__}: {error}); is it still there?"
        ) from None
    if answer.status_code != 200:
        kind = Refused if answer.status_code < 500 else UserError
        raise kind(f"the server at {note.url}: {found.get('error', {}).get('message', answer.text)}")
    return found


def drop_copies(shelf: Path, kept: set[str]) -> None:
    """Of versions that the server can't go back to any more."""
    for place in shelf.iterdir():
        if place.is_dir() and not place.name.startswith(".") and place.name not in kept:
            shutil.rmtree(place, ignore_errors=True)

"""Files on their way into a store: those that go together, what holds them meanwhile, and what they are called there."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import cast

from rlhf_ray.runs.contents import DIGITS, Found, StoredFile, checkpoint_of


@dataclass(slots=True)
class UploadRound:
    """Files that change together in the store."""

    found: dict[str, Found]  # all settled ones
    uploads: dict[str, Future[StoredFile]]  # of those that have changed

    @property
    def done(self) -> bool:
        return all(upload.done() for upload in self.uploads.values())


def keys_for(name: str, sha256: str) -> Iterator[str]:
    """Names in the store, the preferred one first."""
    yield name
    yield f"{name}~{sha256[:DIGITS]}"
    for number in itertools.count(2):
        yield f"{name}~{sha256[:DIGITS]}-{number}"


def is_version(name: str) -> bool:
    """Whether a file of the store has a name that `keys_for` made."""
    return re.search(rf"~[0-9a-f]{{{DIGITS}}}(-\d+)?$", name) is not None


def stage_in(name: str, checkpoints: set[str]) -> bool:
    """Whether any of the checkpoints is of the same stage as this file of another."""
    stage = PurePosixPath(str(checkpoint_of(name))).parent
    return any(PurePosixPath(folder).parent == stage for folder in checkpoints)


def digests_in(manifest: Path) -> dict[str, str] | None:
    """What a checkpoint's manifest says of its files; None where it can't be read."""
    try:
        found = json.loads(manifest.read_text())
    except (OSError, ValueError):
        return None
    return cast(dict[str, str], found) if isinstance(found, dict) else None


def hold(file: Path, link: Path, found: Found) -> bool:
    """A second name for the file as it was found; a copy where the file system has no links. False: it is another by now, or
    gone."""
    try:
        try:
            os.link(file, link)
        except FileNotFoundError:
            return False
        except OSError:
            shutil.copy2(file, link)
            return True
        stat = link.stat()
        return Found(stat.st_size, stat.st_mtime_ns, stat.st_ino) == found
    except OSError:
        return False

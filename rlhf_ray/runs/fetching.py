"""From a store to this machine: files whose digests are those that the run wrote down, and no others."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.runs.contents import (
    CONTENTS,
    Contents,
    StoredFile,
    Wanted,
    checkpoint_of,
    everything,
    found_in,
    is_live,
    older_checkpoints,
)
from rlhf_ray.runs.remote_store import READ_DEADLINE_S, Store
from rlhf_ray.runs.run_folder import make_private
from rlhf_ray.runs.sealed import MANIFEST, digest_of

FILES_AT_ONCE = 4
LOOKS = 4  # at files that are not what CONTENTS.json says, while a run may be changing both
BETWEEN_LOOKS_S = 0.5
Report = Callable[[str], None]


def quiet(words: str) -> None:
    """For those who need not hear it."""


def read_contents(store: Store, deadline_s: float = READ_DEADLINE_S) -> Contents | None:
    """None where no run has written any."""
    text = store.read(CONTENTS, deadline_s)
    return None if text is None else Contents.from_json(text, store.url)


def fetch(
    store: Store, folder: Path, wanted: Wanted, report: Report = quiet, deadline_s: float = READ_DEADLINE_S
) -> tuple[Contents, set[str]]:
    """Make the wanted files of the folder those of the store -> (what the store holds, the checkpoints that are damaged there).

    A damaged checkpoint does not appear; `report` hears of it. UserError where there is no run, RunFailed where another file is
    damaged. deadline_s: of each file.
    """
    make_private(folder)
    names: list[str] = []
    wrong: list[str] = []
    contents = None
    for look in range(LOOKS):
        if look > 0:
            time.sleep(BETWEEN_LOOKS_S)
        before, contents = contents, read_contents(store, deadline_s)
        if contents is None:
            raise UserError(
                f"{store.url} holds no run (it has no {CONTENTS}); name the folder that was given as --run-dir"
            )
        names = [name for name in contents.files if wanted(name)]
        last = before is not None and contents.files == before.files and look == LOOKS - 1
        wrong = _fetch_all(store, folder, contents, names, lenient=last, deadline_s=deadline_s)
        if not wrong:
            break
    assert contents is not None
    damaged = {checkpoint for name in wrong if (checkpoint := checkpoint_of(name)) is not None}
    for checkpoint in sorted(damaged):
        (folder / checkpoint / MANIFEST).unlink(missing_ok=True)
        bad = ", ".join(PurePosixPath(name).name for name in wrong if checkpoint_of(name) == checkpoint)
        report(f"{checkpoint} is damaged in {store.url} ({bad})")
    others = [name for name in wrong if checkpoint_of(name) is None]
    if others:
        raise RunFailed(
            f"{', '.join(others)} in {store.url}: not what the run wrote (its SHA-256 is another, or it is gone); restore it from "
            "a version that the bucket keeps, or delete it from the store and run the stage again"
        )
    return contents, damaged


def fetch_run(store: Store, folder: Path, report: Report = quiet, deadline_s: float = READ_DEADLINE_S) -> Contents:
    """All that a run needs to go on, and nothing else is left in the folder. Of the checkpoints of each stage the newest, unless
    that is damaged."""
    held = read_contents(store, deadline_s) or Contents()
    older = older_checkpoints(held.files)
    contents, damaged = fetch(store, folder, lambda name: checkpoint_of(name) not in older, report, deadline_s)
    if damaged:
        contents, _ = fetch(store, folder, everything, report, deadline_s)
    for name in found_in(folder):
        if name not in contents.files:
            (folder / name).unlink(missing_ok=True)
    return contents


def _fetch_all(
    store: Store, folder: Path, contents: Contents, names: Sequence[str], *, lenient: bool, deadline_s: float
) -> list[str]:
    """-> those that are not what the contents say. A checkpoint's manifest comes when its other files are there."""
    manifests = [name for name in names if checkpoint_of(name) is not None and PurePosixPath(name).name == MANIFEST]
    rest = sorted(set(names) - set(manifests))

    def get(name: str) -> bool:
        may_differ = lenient and is_live(name)
        return _fetch_one(store, folder / name, contents.files[name], may_differ=may_differ, deadline_s=deadline_s)

    wrong: list[str] = []
    with ThreadPoolExecutor(FILES_AT_ONCE, "fetching") as pool:
        for part in (rest, manifests):
            torn = {checkpoint_of(name) for name in wrong} - {None}
            asked = [name for name in part if checkpoint_of(name) not in torn]
            wrong += [name for name, right in zip(asked, pool.map(get, asked), strict=True) if not right]
    return wrong


def _fetch_one(store: Store, file: Path, entry: StoredFile, *, may_differ: bool, deadline_s: float) -> bool:
    """may_differ: a live file is newer than the contents where the run ended between the two; a put is whole all the same."""
    if file.exists() and file.stat().st_size == entry.size and digest_of(file) == entry.sha256:
        return True
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        digest = store.get(entry.key, temporary, deadline_s)
        if digest is None or (digest != entry.sha256 and not may_differ):
            return False
        os.utime(temporary, (entry.modified, entry.modified))
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return True


# -- whose copy is newer -------------------------------------------------------------------------------------------------


def goes_on_from(lineage: Path, session: str) -> bool:
    """Whether the folder with this lineage file holds what `session` wrote, or something later."""
    try:
        found = json.loads(lineage.read_text(encoding="utf-8"))
        return session in (found["session"], found["previous"])
    except (OSError, ValueError, TypeError, KeyError):
        return False

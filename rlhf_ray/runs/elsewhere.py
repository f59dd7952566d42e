"""A run in a store on several hosts that share no disk: what a process on another host than the run's own fetches and hands in.

The run's own process keeps the working copy that the store mirrors. A process elsewhere works in a folder of the same path on its
own disk: it fetches what it needs (`arrive`, `arrive_at`), and what it writes goes through the store to the run's host (`hand_in`
there, `take_in` here; `handing_in` and `take_up` for a stage's folder that grows). Where all see one disk, nothing of this happens.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf_ray.errors import RunFailed
from rlhf_ray.runs.contents import (
    HANDED,
    LINEAGE,
    LIVE_FOLDERS,
    Contents,
    Wanted,
    checkpoint_of,
    everything,
    found_in,
)
from rlhf_ray.runs.fetching import fetch, read_contents
from rlhf_ray.runs.mirror import Mirror
from rlhf_ray.runs.remote_store import StorageAway, Store
from rlhf_ray.runs.run_folder import RunFolder, make_private
from rlhf_ray.runs.sealed import digest_of

ARRIVE_S = 600.0  # until the store has what the run's host is still uploading
LOOK_S = 2.0
EVERY_S = 5.0  # between two looks at a stage's folder on another host
FILE_S = 600.0
STOP = "STOP"


def is_elsewhere(folder: RunFolder) -> bool:
    """Whether this process sees another disk than the run's own process."""
    if folder.url is None or folder.session is None:
        return False
    try:
        return json.loads((folder.path / LINEAGE).read_text(encoding="utf-8"))["session"] != folder.session
    except (OSError, ValueError, TypeError, KeyError):
        return True


# -- what a process elsewhere needs ----------------------------------------------------------------------------------------


def to_work(name: str) -> bool:
    """Models, data, and what is said of them."""
    parts = Path(name).parts
    return checkpoint_of(name) is None and LIVE_FOLDERS.isdisjoint(parts) and not name.endswith(".jsonl")


def stage_files(stage: str) -> Wanted:
    """`to_work`, and the stage's own folder with its checkpoints."""
    return lambda name: to_work(name) or (name.startswith(f"{stage}/") and LIVE_FOLDERS.isdisjoint(Path(name).parts))


def arrive(folder: RunFolder, wanted: Wanted = to_work) -> None:
    """Elsewhere: fetch what a stage needs. One process of a host does, the others wait for it. RunFailed at the deadline."""
    if not is_elsewhere(folder):
        return
    make_private(folder.path)
    with open(folder.path / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        contents = _fetched(folder, wanted, lambda contents: contents.session == folder.session, "the run's files")
        for name in found_in(folder.path):
            if wanted(name) and name not in contents.files:  # of an earlier run here
                (folder.path / name).unlink(missing_ok=True)


def arrive_at(folder: RunFolder, checkpoint: Path) -> None:
    """Elsewhere: fetch one checkpoint. RunFailed where the store does not get it in time."""
    if not is_elsewhere(folder):
        return
    name = str(checkpoint.relative_to(folder.path))
    with open(folder.path / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _fetched(
            folder, lambda file: file.startswith(f"{name}/"),
            lambda contents: any(file.startswith(f"{name}/") for file in contents.files), f"the checkpoint {name}",
        )  # fmt: skip


def _fetched(folder: RunFolder, wanted: Wanted, is_there: Callable[[Contents], bool], what: str) -> Contents:
    store, began = Store(str(folder.url)), time.monotonic()
    while True:
        contents = read_contents(store)
        if contents is not None and is_there(contents):
            return fetch(store, folder.path, wanted, print, FILE_S)[0]  # print: into the process's log
        if time.monotonic() - began > ARRIVE_S:
            raise RunFailed(
                f"{what} did not come to {store.url} in {ARRIVE_S:.0f} s; look whether the run's host can reach it"
            )
        time.sleep(LOOK_S)


# -- what it has written ---------------------------------------------------------------------------------------------------


def hand_in(folder: RunFolder, *paths: Path, always: bool = False) -> None:
    """Elsewhere: upload files or folders that are whole, for the run's host. always: there too, for a process elsewhere."""
    if folder.url is None or not (always or is_elsewhere(folder)):
        return
    store = Store(folder.url) / HANDED
    for path in paths:
        name = str(path.relative_to(folder.path))
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        listed: dict[str, str] = {}
        for file in files:
            inside = "" if file == path else str(file.relative_to(path))
            store.put(file, f"{name}/{inside}" if inside else name, FILE_S)
            listed[inside] = digest_of(file)
        store.write(_list_of(name), json.dumps(listed).encode(), FILE_S)


def take_in(folder: RunFolder, *paths: Path) -> None:
    """What was handed in by these names appears here, each whole. Nothing where nothing was. RunFailed where it is damaged."""
    if folder.url is None:
        return
    store = Store(folder.url) / HANDED
    for path in paths:
        name = str(path.relative_to(folder.path))
        text = store.read(_list_of(name), FILE_S)
        if text is None:
            continue
        listed: dict[str, str] = json.loads(text)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            for inside, digest in listed.items():
                target = temporary / inside if inside else temporary
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                key = f"{name}/{inside}" if inside else name
                if store.get(key, target, FILE_S) != digest:
                    raise RunFailed(f"{HANDED}/{key} in {folder.url} is not what the other host has written")
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
        finally:
            _removed(temporary)
        for key in [_list_of(name), *(f"{name}/{inside}" if inside else name for inside in listed)]:
            store.remove(key, FILE_S)


def _list_of(name: str) -> str:
    return f"{name}.files.json"


def _removed(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# -- a stage's folder that grows -------------------------------------------------------------------------------------------


@contextmanager
def handing_in(folder: RunFolder, stage: str) -> Generator[None]:
    """Elsewhere: the stage's folder goes to the run's host as it grows, and STOP comes from there. At the end all of it is in the
    store; RunFailed where it is not in time."""
    if not is_elsewhere(folder):
        yield
        return
    store, place = Store(f"{folder.url}/{HANDED}/{stage}"), folder.stage(stage)
    place.path.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(place.path, store, read_contents(store) or Contents(), uuid.uuid4().hex, every_s=EVERY_S)
    mirror.start()
    ended = threading.Event()

    def look_for_stop() -> None:
        while not ended.wait(EVERY_S):
            with suppress(StorageAway):
                if store.read(STOP, EVERY_S) is not None:
                    place.stop_file.touch()

    threading.Thread(target=look_for_stop, name="stop", daemon=True).start()
    try:
        yield
        missing = mirror.finish(FILE_S)
        if missing is not None:
            raise RunFailed(missing)
    finally:
        ended.set()
        mirror.close()


def take_up(folder: RunFolder, stage: str) -> None:
    """On the run's host: what the stage's folder on another host has, as of now; and STOP goes there."""
    if folder.url is None:
        return
    store, place = Store(f"{folder.url}/{HANDED}/{stage}"), folder.stage(stage)
    contents = read_contents(store)
    if contents is None:
        return
    if place.stop_file.exists():
        store.write(STOP, b"", FILE_S)
    contents, _ = fetch(store, place.path, everything)
    held = {checkpoint_of(name) for name in contents.files}
    for name in found_in(place.path):
        if (checkpoint := checkpoint_of(name)) is not None and checkpoint not in held:
            shutil.rmtree(place.path / checkpoint, ignore_errors=True)


def handed_over(folder: RunFolder, stage: str) -> None:
    """The stage is done, and the run's host has all of it."""
    if folder.url is None:
        return
    store = Store(f"{folder.url}/{HANDED}/{stage}")
    _remove_all(store, store.names())


def _remove_all(store: Store, names: Iterable[str]) -> None:
    for name in names:
        store.remove(name, FILE_S)


def place_of(folder: RunFolder | None, host: str) -> str:
    """The same words for all processes that see one disk."""
    return f"elsewhere: {host}" if folder is not None and is_elsewhere(folder) else "the run's"

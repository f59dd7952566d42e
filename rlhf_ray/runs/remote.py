"""Run folders in a store (s3://, gs://, file://, memory://): `in_store` around a run, `local_copy` for whoever only reads.

Everything else works on local paths: each host has a working copy, which the store mirrors (`runs.mirror`). The store holds the
run: the copy may be deleted, and another host may go on.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.runs.contents import (
    CONTENTS,
    LEASE,
    LINEAGE,
    Contents,
    StoredFile,
    Wanted,
    checkpoint_of,
    everything,
    start_model_files,
)
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.fetching import fetch, fetch_run, goes_on_from, read_contents
from rlhf_ray.runs.lease import Lease
from rlhf_ray.runs.mirror import EVERY_S, LIVE_DEADLINE_S, Mirror, Waiting, unheard
from rlhf_ray.runs.remote_store import StorageAway, Store, is_url
from rlhf_ray.runs.run_folder import RunFolder, held, working_copy
from rlhf_ray.runs.sealed import digest_of
from rlhf_ray.runs.storage import write_atomically
from rlhf_ray.runs.troubles import Troubles

READING = "reading"  # the kind of copies that readers make
LEVELS = 4  # folders between a model or checkpoint and the run folder that it is in, at most


class Stored:
    """A run's hold on its folder in a store: the mirror, and whom it tells."""

    def __init__(self, folder: RunFolder, store: Store, lease: Lease):
        self.folder, self.store, self.lease = folder, store, lease
        self.heard: Callable[[str], None] | None = None  # a line for the terminal
        self._early: list[str] = []  # lines of before there was one
        self.mirror: Mirror | None = None

    def tell(self, words: str) -> None:
        if self.heard is None:
            self._early.append(words)
        else:
            self.heard(words)

    def tells(self, heard: Callable[[str], None]) -> None:
        """From now on lines go there; those that came before do now."""
        self.heard = heard
        while self._early:
            heard(self._early.pop(0))

    def check(self) -> None:
        """RunFailed where another run has taken this one's place."""
        if self.mirror is not None:
            self.mirror.check()

    def finish(self, deadline_s: float, waiting: Waiting = unheard) -> None:
        """Wait until the store has what the folder has. RunFailed with what it has not."""
        assert self.mirror is not None
        missing = self.mirror.finish(deadline_s, waiting)
        if missing is not None:
            raise RunFailed(missing)


@contextmanager
def in_store(folder: RunFolder, deadline_s: float, every_s: float = EVERY_S) -> Generator[Stored | None]:
    """The run's folder is held, and up to date with its store, which follows it until the end. None for a folder without a store.

    deadline_s: for what is not uploaded at the end; RunFailed says what that is then, unless another error ends the run.
    UserError where the store can't be written, or another run works there.
    """
    if folder.url is None:
        yield None
        return
    store = Store(folder.url)
    store.check_writable()
    with held(folder):
        lease = Lease(store)
        lease.take()
        stored = Stored(folder, store, lease)
        try:
            contents, session = _brought_up_to_date(folder, store, stored.tell)
            stored.folder = replace(folder, session=session)
            watched = Store(folder.url, Troubles(EventLog(folder.events).add, stored.tell))
            lease.store = watched
            stored.mirror = Mirror(
                folder.path, watched, contents, session, lease=lease, tell=stored.tell, every_s=every_s,
                committed=lambda: _write_lineage(folder.path / LINEAGE, session, contents.session, stored=True),
            )  # fmt: skip
            stored.mirror.start()
            try:
                yield stored
            except BaseException:  # fault boundary: the run; what it has done is uploaded, however it ends
                with suppress(KeyboardInterrupt):
                    missing = stored.mirror.finish(deadline_s)
                    if missing is not None:
                        stored.tell(missing)
                raise
            else:
                stored.finish(deadline_s)
            finally:
                stored.mirror.close()
        finally:
            lease.store = store
            with suppress(StorageAway):
                lease.release(LIVE_DEADLINE_S)


def _brought_up_to_date(folder: RunFolder, store: Store, tell: Callable[[str], None]) -> tuple[Contents, str]:
    """Make the working copy what the run goes on from -> (what the store holds, the session that begins).

    The copy stays where it goes on from the store's last session: then it is as new, or newer by what was not uploaded. Otherwise
    the run went on elsewhere, and the copy becomes what the store holds.
    """
    lineage, contents = folder.path / LINEAGE, read_contents(store)
    session = uuid.uuid4().hex
    if contents is None:
        if lineage.exists() and json.loads(lineage.read_text(encoding="utf-8")).get("stored"):
            aside = folder.path.with_name(f"{folder.path.name}-{time.strftime('%Y%m%d-%H%M%S')}")
            shutil.copytree(folder.path, aside, copy_function=_moved, ignore=shutil.ignore_patterns(".lock"))
            _emptied(folder.path)
            tell(f"{store.url} is empty, so the run begins anew; the copy of the run that was there is now {aside}")
        contents = Contents()
    elif not goes_on_from(lineage, contents.session):
        began = time.monotonic()
        contents = fetch_run(store, folder.path, tell)
        count = len(contents.files)
        tell(f"fetched the run from {store.url} ({count} files) to {folder.path}, in {time.monotonic() - began:.1f} s")
    _write_lineage(lineage, session, contents.session, stored=contents.session != "")
    return contents, session


def _write_lineage(lineage: Path, session: str, previous: str, *, stored: bool) -> None:
    """stored: whether the store has ever held what is in the folder."""
    write_atomically(lineage, json.dumps({"session": session, "previous": previous, "stored": stored}) + "\n")


def _moved(source: str, target: str) -> None:
    shutil.move(source, target)


def _emptied(folder: Path) -> None:
    for each in folder.iterdir():
        if each.name != ".lock":  # this process holds it
            shutil.rmtree(each) if each.is_dir() else each.unlink()


# -- readers ---------------------------------------------------------------------------------------------------------------


def local_copy(given: str | Path, wanted: Wanted = everything) -> Path:
    """A path as it is; of a URL of a run folder, a copy of what is wanted of it on this machine; of a URL of a folder in one (a
    model, a checkpoint), a copy of that folder.

    Again: only what has changed is fetched. UserError where there is no run.
    """
    if not is_url(given):
        return Path(given)
    url = str(given).rstrip("/")
    store, inside = _run_of(url)
    copy = working_copy(store.url, READING)

    beside = start_model_files if checkpoint_of(f"{inside}/{CONTENTS}") else _recipe_alone

    def needed(name: str) -> bool:
        return (_is_below(name, inside) or beside(name)) if inside else wanted(name)

    contents, damaged = fetch(store, copy, needed)
    if inside and not any(_is_below(name, inside) for name in contents.files):
        raise UserError(f"{url} is not there: the run {store.url} has no {inside}")
    if inside in damaged:
        raise RunFailed(f"{url} is damaged: its files are not those that the run wrote; take the checkpoint before it")
    for name in [str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()]:
        if name not in contents.files:  # the run has deleted it since
            (copy / name).unlink(missing_ok=True)
    return copy / inside if inside else copy


def reading_copy(given: str | Path) -> Path:
    """Where `local_copy` puts it, without looking at the store."""
    return working_copy(str(given).rstrip("/"), READING) if is_url(given) else Path(given)


def put_back(given: str | Path, file: Path, name: str) -> str:
    """Put one live file that a reader has made (report.html) into the run's folder in the store -> where it is. While a run works
    there, and of a path, it stays where it is."""
    if not is_url(given):
        return str(file)
    store = Store(str(given))
    contents = read_contents(store)
    if contents is None or store.read(LEASE) is not None:
        return str(file)
    store.put(file, name, LIVE_DEADLINE_S)
    stat = file.stat()
    contents.files[name] = StoredFile(stat.st_size, digest_of(file), stat.st_mtime, name)
    store.write(CONTENTS, contents.to_json(), LIVE_DEADLINE_S)
    return f"{store.url}/{name}"


def _recipe_alone(name: str) -> bool:
    return name == "recipe.yaml"


def _is_below(name: str, folder: str) -> bool:
    return name.startswith(f"{folder}/")


def _run_of(url: str) -> tuple[Store, str]:
    """(the store of the run that the URL is in, where in it)."""
    above, inside = url, ""
    for _ in range(LEVELS):
        store = Store(above)
        if store.read(CONTENTS) is not None:
            return store, inside
        above, _, last = above.rpartition("/")
        inside = f"{last}/{inside}" if inside else last
        if above.endswith((":/", "/")) or "://" not in above:
            break
    raise UserError(f"{url} holds no run (no {CONTENTS} there or above); name the folder that was given as --run-dir")

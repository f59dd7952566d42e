"""A run folder's copy in a store, kept up to date beside the run: `Mirror`.

A thread looks at the folder every few seconds. It uploads live files at once, and what belongs together (`runs.contents`) in
rounds: the files are held by hard links while they are uploaded, two at a time, so that the run may replace and delete them;
CONTENTS.json comes last. Where checkpoints come faster than uploads, those in between are left out. A storage that does not answer
stops nobody: it is told, and tried again.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from rlhf_ray.errors import RunFailed, whole_message
from rlhf_ray.runs.contents import (
    CONTENTS,
    HANDED,
    OUTGOING,
    Contents,
    Found,
    StoredFile,
    checkpoint_of,
    found_in,
    is_live,
    torn_checkpoints,
)
from rlhf_ray.runs.disk import in_words
from rlhf_ray.runs.lease import Lease, LeaseLost
from rlhf_ray.runs.outgoing import UploadRound, digests_in, hold, is_version, keys_for, stage_in
from rlhf_ray.runs.remote_store import FileGone, StorageAway, Store
from rlhf_ray.runs.sealed import MANIFEST, digest_of

EVERY_S, HURRY_S = 10.0, 0.2  # between two looks at the folder
SLOW_BYTES = 1e6  # a live file that is larger is uploaded less often: every EVERY_S per this size
UPLOADS_AT_ONCE = 2
LIVE_DEADLINE_S, FILE_DEADLINE_S = 20.0, 600.0
Tell = Callable[[str], None]
Waiting = Callable[[str, float], None]


def unheard(what: str, seconds: float) -> None:
    """A wait that nobody is told of."""


class Mirror:
    """Of one run folder. `start` begins, `finish` waits until all is there, `close` ends the thread."""

    def __init__(
        self,
        folder: Path,
        store: Store,
        contents: Contents,
        session: str,
        *,
        lease: Lease | None = None,
        tell: Tell = lambda words: None,
        every_s: float = EVERY_S,
        file_deadline_s: float = FILE_DEADLINE_S,
        committed: Callable[[], None] = lambda: None,
    ):
        """contents: what the store holds. session: whose it will be. tell: hears when this run has lost its place. file_deadline_s:
        of one file's upload; then the round begins again with what is there then. committed: called when the store has the
        session."""
        self.folder, self.store, self.session, self.lease, self.tell = folder, store, session, lease, tell
        self.every_s, self.file_deadline_s, self.committed, self._first = every_s, file_deadline_s, committed, True
        self._settled = {name: entry for name, entry in contents.files.items() if not is_live(name)}
        self._live = {name: entry for name, entry in contents.files.items() if is_live(name)}
        self._keys = {entry.key for entry in contents.files.values()}  # of the last CONTENTS.json
        self._known: dict[str, Found] = {}
        #: in the store, and not fetched: older checkpoints
        self._not_here = {name for name in self._settled if not (folder / name).exists()}
        self._first_checkpoints = {place for name in self._settled if (place := checkpoint_of(name)) is not None}
        self._uploaded_at: dict[str, float] = {}
        self._to_remove: set[str] = set()
        self._round: UploadRound | None = None
        self._arrived: dict[str, tuple[Found, StoredFile]] = {}  # uploaded in a round that failed for other files
        self._torn: set[str] = set()  # folders that look like checkpoints, and are not whole
        self._gone: set[str] = set()  # settled files that were missing at the last look
        self._uncommitted = True  # the session is new
        self._pool = ThreadPoolExecutor(UPLOADS_AT_ONCE, "upload")
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._wake, self._ended, self._looked = threading.Event(), threading.Event(), threading.Condition()
        self._hurry, self._looks, self._level_at = False, 0, -1
        self._left: dict[str, Found] = {}
        self.lost: str | None = None  # why nothing is uploaded any more
        self.last_error: str | None = None
        self.session_before = contents.session

    # -- for the run ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        shutil.rmtree(self.folder / OUTGOING, ignore_errors=True)  # of a run that died
        self._thread.start()

    def check(self) -> None:
        """RunFailed where another run has taken this one's place."""
        if self.lost is not None:
            raise RunFailed(self.lost)

    def finish(self, deadline_s: float, waiting: Waiting = unheard) -> str | None:
        """Wait until all that is in the folder now is in the store -> in words what is not there at the deadline, if anything."""
        began = time.monotonic()
        with self._looked:
            asked = self._looks + 1  # a look that began before is too early
            self._hurry = True
            self._wake.set()
            while self._level_at < asked and self.lost is None and self._thread.is_alive():
                spent = time.monotonic() - began
                if spent > deadline_s:
                    break
                waiting(f"the upload of {self._left_in_words()} to {self.store.url}", spent)
                self._looked.wait(min(1.0, deadline_s - spent + 0.01))
            self._hurry = False
            if self.lost is not None:
                return self.lost
            if self._level_at >= asked:
                return None
            why = f" ({self.last_error})" if self.last_error else ""
            return (
                f"not yet in {self.store.url} after {time.monotonic() - began:.0f} s: {self._left_in_words()}{why}; all of it is "
                f"in {self.folder} on this host, and the same command here uploads the rest"
            )

    def close(self) -> None:
        """End the thread; what is not uploaded stays here."""
        self._ended.set()
        self._wake.set()
        self.store.give_up()
        if self._thread.is_alive():
            self._thread.join(timeout=LIVE_DEADLINE_S)
        self._pool.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self.folder / OUTGOING, ignore_errors=True)

    def _left_in_words(self) -> str:
        if not self._left:
            return "the last lines"
        folders = sorted({str(PurePosixPath(name).parent) if "/" in name else name for name in self._left})
        size = in_words(sum(found.size for found in self._left.values()))
        more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
        return f"{len(self._left)} files ({size}) in {', '.join(folders[:3])}{more}"

    # -- the thread ---------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._ended.is_set() and self.lost is None:
            try:
                self.look()
            except LeaseLost as lost:
                self.lost = str(lost)
                self.tell(self.lost)
            except (StorageAway, OSError) as error:  # told by the store's listener; a full disk by the run
                self.last_error = whole_message(error)
            except Exception as error:  # fault boundary: the mirror; the run goes on without it
                if self._ended.is_set():
                    return
                told, self.last_error = self.last_error, whole_message(error)
                if told != self.last_error:
                    self.tell(f"nothing was uploaded to {self.store.url}: {type(error).__name__}: {self.last_error}")
            with self._looked:
                self._looked.notify_all()
            self._wake.wait(HURRY_S if self._hurry else self.every_s)
            if not self._hurry:
                self._wake.clear()
            elif self._ended.is_set():
                return

    def look(self) -> None:
        """Look at the folder once, and do what can be done now. The thread does it again and again."""
        with self._looked:
            self._looks += 1
        found = found_in(self.folder)
        self._count_left(found)
        if self.lease is not None:
            self.lease.renew(LIVE_DEADLINE_S)
        if self._round is None:
            self._round = self._begin(found)
        elif self._round.done:
            self._end(self._round)
        self._upload_live(found)
        if self._first and self.session_before:
            self._sweep()
        if self._uncommitted:
            self._commit()
        self._remove_old()
        with self._looked:
            if not self._count_left(found) and self._round is None and not self._gone:
                self._level_at, self.last_error = self._looks, None

    def _count_left(self, found: Mapping[str, Found]) -> int:
        """Of the files found, those that the store has not."""
        self._left = {
            name: each
            for name, each in found.items()
            if self._known.get(name) != each and checkpoint_of(name) not in self._torn
        }
        return len(self._left)

    # -- live files -----------------------------------------------------------------------------------------------------

    def _upload_live(self, found: Mapping[str, Found]) -> None:
        now = time.monotonic()
        for name, each in found.items():
            if not is_live(name) or self._known.get(name) == each:
                continue
            rests_s = self.every_s * each.size / SLOW_BYTES
            rows = name.endswith(".jsonl")  # a checkpoint counts on the rows before it
            if not (self._hurry or rows) and now - self._uploaded_at.get(name, -rests_s) < rests_s:
                continue
            copy = self._outgoing(f"live-{name.replace('/', '_')}")
            try:
                shutil.copyfile(self.folder / name, copy)
            except FileNotFoundError:
                continue
            try:
                self.store.put(copy, name, LIVE_DEADLINE_S)
                self._live[name] = StoredFile(copy.stat().st_size, digest_of(copy), each.modified, name)
            finally:
                copy.unlink(missing_ok=True)
            self._known[name], self._uploaded_at[name], self._uncommitted = each, now, True
        for name in [name for name in self._live if name not in found]:
            del self._live[name]
            self._uncommitted = True

    # -- settled files ----------------------------------------------------------------------------------------------------

    def _begin(self, found: Mapping[str, Found]) -> UploadRound | None:
        """A round, if something has changed and can be held."""
        settled = {name: each for name, each in found.items() if not is_live(name)}
        self._torn = torn_checkpoints(settled, lambda manifest: digests_in(self.folder / manifest))
        settled = {name: each for name, each in settled.items() if checkpoint_of(name) not in self._torn}
        gone = self._settled.keys() - settled.keys() - self._not_here
        seen_before, self._gone = self._gone, gone
        changed = {
            name: each for name, each in settled.items() if self._known.get(name) != each or name not in self._settled
        }
        if gone - seen_before and not seen_before:  # it may be back in a moment, under the same name
            return None
        if not changed and not gone:
            return None
        held: dict[str, Path] = {}
        for number, (name, each) in enumerate(changed.items()):
            held[name] = self._outgoing(str(number))
            if not hold(self.folder / name, held[name], each):
                self._let_go()
                return None
        digests = {f"{folder}/{file}": digest for folder in {checkpoint_of(name) for name in changed} - {None}
                   for file, digest in (digests_in(self.folder / str(folder) / MANIFEST) or {}).items()}  # fmt: skip
        taken = {entry.key for entry in self._settled.values()} | self._keys | self._to_remove
        uploads = {
            name: self._pool.submit(self._upload, name, held[name], each, digests.get(name), taken)
            for name, each in changed.items()
        }
        return UploadRound(settled, uploads)

    def _upload(self, name: str, file: Path, found: Found, digest: str | None, taken: set[str]) -> StoredFile:
        """In a thread of the pool."""
        sha256 = digest or digest_of(file)
        there = self._settled.get(name)
        if there is not None and there.sha256 == sha256 and there.size == found.size:
            return StoredFile(there.size, sha256, found.modified, there.key)
        arrived = self._arrived.get(name)
        if arrived is not None and arrived[0] == found:
            return arrived[1]
        key = next(each for each in keys_for(name, sha256) if each not in taken)
        self.store.put(file, key, self.file_deadline_s)
        file.unlink(missing_ok=True)  # if it was deleted meanwhile, its room is free again
        return StoredFile(found.size, sha256, found.modified, key)

    def _end(self, done: UploadRound) -> None:
        self._round = None
        self._let_go()
        self._arrived = {
            name: (done.found[name], upload.result())
            for name, upload in done.uploads.items()
            if upload.exception() is None
        }
        try:
            uploaded = {name: upload.result() for name, upload in done.uploads.items()}
        except FileGone:
            return
        self._arrived = {}
        self._settled = {
            name: entry
            for name, entry in {**self._settled, **uploaded}.items()
            if name in done.found or name in self._not_here
        }
        self._not_here -= done.found.keys()
        # An older checkpoint that was never fetched goes when there is a newer one.
        new = {folder for name in done.found if (folder := checkpoint_of(name)) is not None} - self._first_checkpoints
        outdated = {name for name in self._not_here if stage_in(name, new)}
        self._not_here -= outdated
        self._settled = {name: entry for name, entry in self._settled.items() if name not in outdated}
        self._known |= {name: done.found[name] for name in uploaded}
        for name in self._gone:
            self._known.pop(name, None)
        self._gone, self._uncommitted = set(), True

    def _commit(self) -> None:
        contents = Contents(self.session, self._settled | self._live)
        self.store.write(CONTENTS, contents.to_json(), LIVE_DEADLINE_S)
        keys = {entry.key for entry in contents.files.values()}
        self._to_remove = (self._to_remove | (self._keys - keys)) - keys
        self._keys, self._uncommitted = keys, False
        if self._first:
            self._first = False
            self.committed()

    def _remove_old(self) -> None:
        """What CONTENTS.json has ceased to name."""
        for key in sorted(self._to_remove):
            self.store.remove(key, LIVE_DEADLINE_S)
            self._to_remove.discard(key)

    def _sweep(self) -> None:
        """What a run that died has uploaded and not named. Only what is certain to be a run's: the store may hold more."""
        for name in self.store.names(deadline_s=LIVE_DEADLINE_S):
            ours = checkpoint_of(name) is not None or is_version(name)
            if ours and name not in self._keys and not name.startswith(HANDED):
                self._to_remove.add(name)

    # -- files that are being uploaded -------------------------------------------------------------------------------------

    def _outgoing(self, name: str) -> Path:
        place = self.folder / OUTGOING
        place.mkdir(mode=0o700, exist_ok=True)
        return place / name

    def _let_go(self) -> None:
        shutil.rmtree(self.folder / OUTGOING, ignore_errors=True)

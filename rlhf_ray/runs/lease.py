"""LEASE.json: which run works in a folder of a store. No two do, on whatever hosts.

The holder renews it every few seconds. Whoever finds one that is renewed is refused; one that has stood still for a while, or
whose process is gone from this host, is taken. A holder that finds another's name there has been away for long, and ends. Object
stores have no locks that all of them offer alike, so two that begin in the same moment are told apart by who is read back.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from typing import Any, cast

from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.runs.contents import LEASE
from rlhf_ray.runs.remote_store import CHECK_DEADLINE_S, Store
from rlhf_ray.runs.status_file import process_started

STANDS_STILL_S = 60.0  # then its holder is taken for dead; a living one renews it every 10 s
LOOK_S = 1.0


class LeaseLost(RunFailed):
    """Another run works in the folder."""


class Lease:
    """Of one run on one store."""

    def __init__(self, store: Store, stands_still_s: float = STANDS_STILL_S):
        self.store, self.stands_still_s = store, stands_still_s
        self.nonce, self.beats = uuid.uuid4().hex, 0

    def take(self) -> None:
        """UserError where another run holds it. Waits for as long as it takes to tell a dead holder from a living one."""
        first = self._found()
        if first is not None and not _gone_from_here(first):
            began = time.monotonic()
            while (now := self._found()) is not None and time.monotonic() - began < self.stands_still_s:
                if now != first:
                    raise UserError(
                        f"{self.store.url} is in use by process {now.get('process')} on {now.get('host')}; wait for it, or choose "
                        "another --run-dir"
                    )
                time.sleep(min(LOOK_S, self.stands_still_s / 4))
        self._write(CHECK_DEADLINE_S)
        held = self._found()
        if held is None or held.get("nonce") != self.nonce:
            raise UserError(f"another run has just begun in {self.store.url}; wait for it, or choose another --run-dir")

    def renew(self, deadline_s: float) -> None:
        """LeaseLost where it is another's."""
        found = self._found(deadline_s)
        if found is not None and found.get("nonce") != self.nonce:
            raise LeaseLost(
                f"process {found.get('process')} on {found.get('host')} works in {self.store.url} now: this run was away for too "
                "long, and uploads nothing more"
            )
        self._write(deadline_s)

    def release(self, deadline_s: float) -> None:
        found = self._found(deadline_s)
        if found is not None and found.get("nonce") == self.nonce:
            self.store.remove(LEASE, deadline_s)

    def _found(self, deadline_s: float = CHECK_DEADLINE_S) -> dict[str, Any] | None:
        text = self.store.read(LEASE, deadline_s)
        try:
            found = None if text is None else json.loads(text)
        except ValueError:
            return None
        return cast(dict[str, Any], found) if isinstance(found, dict) else None

    def _write(self, deadline_s: float) -> None:
        self.beats += 1
        me = os.getpid()
        told = {
            "nonce": self.nonce, "beats": self.beats, "host": socket.gethostname(), "process": me,
            "process_started": process_started(me),
        }  # fmt: skip
        self.store.write(LEASE, json.dumps(told).encode(), deadline_s)


def _gone_from_here(found: dict[str, Any]) -> bool:
    """Whether it is certain that its process has ended."""
    process = found.get("process")
    if found.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    return process_started(process) != found.get("process_started")

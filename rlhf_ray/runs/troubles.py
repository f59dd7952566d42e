"""What is told of a storage that does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

QUIET_S = 5.0
TOLD_AFTER_S = 30.0  # a storage that is away for less is in events.jsonl only
Tell = Callable[[str], None]


class Troubles:
    """A `remote_store.Listener`: two events for each time that a storage does not answer, and a line where that lasts."""

    def __init__(self, add_event: Callable[..., Any], tell: Tell, quiet_s: float = QUIET_S):
        """quiet_s: without a failure, and it is over."""
        self._add, self._tell, self._quiet_s = add_event, tell, quiet_s
        self._lock = threading.Lock()
        self._since: float | None = None
        self._last, self._tries, self._told = 0.0, 0, False

    def failed(self, name: str, error: str) -> None:
        with self._lock:
            now = time.monotonic()
            first = self._since is None
            self._since = now if self._since is None else self._since
            self._last, self._tries = now, self._tries + 1
            lasted = now - self._since
            long = lasted > TOLD_AFTER_S and not self._told
            self._told = self._told or long
        if first:
            self._note(f"storage: {name} failed: {error}", "tried again with growing pauses; the run goes on")
        if long:
            self._tell(
                f"the storage has not answered for {lasted:.0f} s ({name}: {error}); the run goes on, and uploads are tried again"
            )

    def done(self, name: str) -> None:
        with self._lock:
            if self._since is None or time.monotonic() - self._last < self._quiet_s:
                return
            lasted, tries, told = self._last - self._since, self._tries, self._told
            self._since, self._tries, self._told = None, 0, False
        self._note("storage: it answers again", f"{name} is done, after {tries} failed tries in all", lasted)
        if told:
            self._tell(f"the storage answers again, after {lasted:.0f} s")

    def _note(self, what: str, done: str, cost_s: float | None = None) -> None:
        try:
            self._add(what, done, cost_s)
        except OSError:  # a full disk has no room for the event
            return

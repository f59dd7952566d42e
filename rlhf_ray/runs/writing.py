"""Files that a thread writes while its process goes on training."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from rlhf_ray.errors import RunFailed


class Writing:
    """One set of them at a time."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._files: Future[dict[str, str]] | None = None

    def begin(self, write: Callable[[], dict[str, str]]) -> None:
        """write: -> {file: SHA-256}. What is still being written, of a step that was given up, is waited for."""
        self.result(wait=True)
        self._files = self._thread.submit(write)

    def result(self, *, wait: bool) -> dict[str, str] | str | None:
        """The digests; a sentence where the disk or the store has refused; None where it is not done, or nothing was asked for."""
        if self._files is None or not (wait or self._files.done()):
            return None
        try:
            return self._files.result()
        except (OSError, RunFailed) as error:
            return str(error)

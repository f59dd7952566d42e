"""Ctrl-C: the first finishes the step and writes a checkpoint, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from rlhf_ray.runs.run_folder import RunFolder

EXIT_CODE = 130


AT_ONCE_S = 15.0  # to release what is held; then the process ends anyway


@contextmanager
def polite_interrupts(
    folder: RunFolder, current_stage: Callable[[], str | None], say: Callable[[str], None], at_once: Callable[[], None]
) -> Generator[Callable[[], bool]]:
    """SIGINT and SIGTERM (what `ray job stop` sends) leave a STOP file in the running stage's folder.

    Yields a function that tells whether a signal came: a stage that does not look for the file is the last to run.
    Python handles signals in its main thread only: a run in another one is stopped by the file.
    """
    asked = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: asked
        return

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        stage = current_stage()
        if asked or stage is None:
            # No exception: the main thread may be inside a library that swallows it.
            threading.Timer(AT_ONCE_S, os._exit, (EXIT_CODE,)).start()
            at_once()
            os._exit(EXIT_CODE)
        asked = True
        folder.stage(stage).stop_file.touch()
        say("stopping after this step; a second Ctrl-C stops at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

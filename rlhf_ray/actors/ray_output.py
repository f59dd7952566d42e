"""What Ray itself prints in the process that runs a recipe goes to a file of the run, not between the lines of the terminal.

It comes by three ways. A thread prints what the cluster reports of itself ("(raylet) A worker died ..."). The logger `ray` writes
to standard error. And the C++ core writes its errors to file descriptor 2, past Python. What the run, the user's code in this
process and its child processes print stays where it is. Workers have files of their own (`actors.process`).
"""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from rlhf_ray.actors.ray_private import reports_given_to

FILTER = Path(__file__).with_name("ray_lines.py")
END_S = 2.0


@contextmanager
def ray_output_in(log: Path | None) -> Iterator[None]:
    """For the body of the `with`, which has to hold all of a session of Ray. None: Ray's lines stand in the terminal."""
    if log is None:
        yield
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        file = stack.enter_context(open(log, "a", buffering=1, encoding="utf-8", errors="replace"))
        stack.enter_context(_reports_in(file))
        stack.enter_context(_logger_in(file))
        stack.enter_context(_core_in(log))
        yield


@contextmanager
def _reports_in(file: io.TextIOWrapper) -> Iterator[None]:
    """With log_to_driver=False nothing but the cluster's reports comes this way."""

    def record(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        for line in data["lines"]:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} ({data['pid']}) {line}\n")

    with reports_given_to(record):
        yield


@contextmanager
def _logger_in(file: io.TextIOWrapper) -> Iterator[None]:
    logger = logging.getLogger("ray")
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s\t%(levelname)s %(filename)s:%(lineno)s -- %(message)s"))
    before, propagates = list(logger.handlers), logger.propagate
    logger.handlers[:], logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before, propagates


@contextmanager
def _core_in(log: Path) -> Iterator[None]:
    """File descriptor 2 leads to the filter (`ray_lines`). Python's own sys.stderr keeps the terminal itself."""
    try:
        terminal = os.dup(2)
    except OSError:  # closed: nobody sees what is written there
        yield
        return
    out, into = _message_pipe()
    parting = subprocess.Popen(
        [sys.executable, "-I", "-S", str(FILTER), str(log)], stdin=out, stdout=subprocess.DEVNULL, stderr=terminal,
        start_new_session=True,
    )  # fmt: skip
    os.close(out)
    before, ours = sys.stderr, None
    if _writes_to_terminal(before):
        # Never closed: the user's loggers may keep it.
        ours = sys.stderr = io.TextIOWrapper(
            os.fdopen(os.dup(terminal), "wb", buffering=0), encoding=before.encoding, errors=before.errors, write_through=True,
        )  # fmt: skip
    os.dup2(into, 2)
    os.close(into)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        if ours is not None and sys.stderr is ours:
            sys.stderr = before
        # It ends with the last process that holds the pipe: one that the user's code has left behind may go on.
        with suppress(subprocess.TimeoutExpired):
            parting.wait(END_S)


def _message_pipe() -> tuple[int, int]:
    """A pipe in which what was written at once is read at once, where the system has that."""
    if sys.platform == "linux":
        with suppress(OSError):
            return os.pipe2(os.O_CLOEXEC | os.O_DIRECT)
    return os.pipe()


def _writes_to_terminal(stream: TextIO | None) -> bool:
    """Whether it is Python's own standard error, and not what a test or a notebook has put in its place."""
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == 2
    except (OSError, ValueError):
        return False

"""The two kinds of failure that the command line tells apart, and what an error says in one line."""

from __future__ import annotations

import re

LONGEST_MESSAGE = 1500  # characters
_FRAME = re.compile(r'^[ |]*File ".*", line \d+')
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class UserError(ValueError):
    """A user's mistake: one sentence with the value and the remedy; the command exits with code 2 and no traceback."""


class RunFailed(RuntimeError):
    """A machine or a process failed, not the user: one sentence with the cause; the command exits with code 1.

    The same command goes on from the last checkpoint.
    """

    process_must_end = False  # at once: a thread of it hangs in a library, which an orderly end would wait for


class NotFinite(RunFailed):
    """A score, a loss, a gradient or a weight became NaN or infinite. It reaches no update, no file and no generator.

    The same command goes on from the last checkpoint, whose numbers are finite.
    """


def whole_message(error: BaseException | str) -> str:
    """All that an error says, on one line. Where that holds tracebacks (Ray hands those on as text): what the last one
    raised, with every line of its message.

    The first sentence says what is wrong and the last one what to do, so neither goes: a message that is too long loses its
    middle.
    """
    lines = _COLOUR.sub("", str(error)).strip().splitlines()
    frames = [number for number, line in enumerate(lines) if _FRAME.match(line)]
    if frames:
        rest = lines[frames[-1] + 1 :]
        depth = _depth(lines[frames[-1]])
        # The frame's own source line, and carets below it, stand further in than the frame.
        while rest and rest[0].strip() and _depth(rest[0]) > depth:
            rest = rest[1:]
        lines = rest or lines
    words = " ".join(" ".join(lines).split())
    if not words:
        return type(error).__name__
    half = LONGEST_MESSAGE // 2
    return words if len(words) <= LONGEST_MESSAGE else f"{words[:half]} ... {words[-half:]}"


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip(" |"))


def machine_failed(what: str, error: Exception) -> RunFailed:
    """What to tell of a full disk, a folder that may not be written, a file server that is gone."""
    return RunFailed(f"{what} failed: {error}; make room or mend that, then run the same command again")


class StageStopped(Exception):
    """A stage ended early because it was asked to (Ctrl-C); its checkpoint is written. The command exits with 130."""

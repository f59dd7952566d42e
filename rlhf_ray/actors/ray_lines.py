"""Parts the standard error of a process that uses Ray: Ray's own lines go to a file, everything else goes on to the terminal.

    python -I -S ray_lines.py LOG < pipe 2> terminal

In a process of its own: Ray's threads write while they hold locks, and what a process wrote before it died must arrive. Python's
own modules only.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator

#: How a message of Ray's C++ begins, and of the gRPC in it. The letter is its level; C and F end the process.
OURS = re.compile(
    rb"^(?:\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (?P<ray>[TDIWEC]) \d+ \d+\] "
    rb"|WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR"
    rb"|(?P<grpc>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ (?:chttp2|tcp|ev_|fork|http|channel|client|server|ssl|grpc|call|init|iomgr"
    rb"|subchannel|socket|timer|retry|completion|backup_poller|event_engine|posix|oss_)\w*\.cc:\d+\] )",
    re.MULTILINE,
)
PIECE = 65536
FULL = (4096, PIECE)  # of this size, a message may go on in the next one: what a pipe of messages holds in one, and what is read


def parted(message: bytes) -> Iterator[tuple[bytes, bool, bool]]:
    """(part, is it Ray's, does it tell of the process's end) of what was written at once: where one of Ray's lines begins,
    what follows is Ray's to the next one or the end."""
    starts = list(OURS.finditer(message))
    if not starts or starts[0].start() > 0:
        yield message[: starts[0].start() if starts else None], False, False
    ends = [after.start() for after in starts[1:]] + [len(message)]
    for start, end in zip(starts, ends, strict=False):  # of no start there is an end all the same
        part = message[start.start() : end]
        yield part, True, start["ray"] == b"C" or start["grpc"] == b"F" or b": *** SIG" in part


def write_all(file: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(file, data) :]
        except OSError:  # a full disk, a closed terminal: the other one still gets what is its own
            return


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that writes; this one ends when that has
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    ends = False  # the process: its reasons and the trace that follows are for the terminal, too
    goes_on = False
    while message := os.read(0, PIECE):
        is_ours = False
        for part, begins, fatal in parted(message):
            is_ours, ends, goes_on = begins or goes_on, ends or fatal, False
            if is_ours or ends:
                write_all(log, part)
            if not is_ours or ends:
                write_all(2, part)
        goes_on = is_ours and len(message) in FULL


if __name__ == "__main__":
    main()

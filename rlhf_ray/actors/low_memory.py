"""Ray ends processes of a host whose memory is nearly all in use, before the kernel would. What it says of that fills a screen;
this is what a user needs of it."""

from __future__ import annotations

import re

#: in Ray's words (2.56 and later): where, and how much
GUARD = re.compile(r"Memory on the node \(IP: (?P<host>[^,\s]+), ID: \w+\) was (?P<used>[\d.]+)GB used / (?P<limit>[\d.]+)GB limit")
REMEDY = (
    "end what else runs on that host, or lower what `rlhf-ray doctor` shows as large (microbatches, chunks, lengths, snapshots)"
)


def ended_by_guard(error: BaseException | None) -> str | None:
    """Why Ray ended a process, in a clause; None: it did not, for want of memory. Looks at the error's causes too."""
    while error is not None:
        found = GUARD.search(f"{error}\n{vars(error)}")
        if found is not None:
            used, limit = (f"{float(found[name]):.1f}" for name in ("used", "limit"))
            return f"Ray's memory guard ended it: {used} of {limit} GB were in use on the host {found['host']}"
        error = error.__cause__
    return None

"""A full disk, foreseen: what is about to be written against what is free."""

from __future__ import annotations

import shutil
from pathlib import Path

SPARE_BYTES = 64 * 1024**2  # stay free for metrics, events and logs, without which a run can't go on


def no_room(folder: Path, needed: int) -> str | None:
    """Why `needed` bytes don't fit into the file system of a folder that exists, in words; None: they do."""
    free = shutil.disk_usage(folder).free
    if free >= needed + SPARE_BYTES:
        return None
    return (
        f"the file system of {folder} has {in_words(free)} free, and this takes {in_words(needed)} beside {in_words(SPARE_BYTES)} "
        "that stay free"
    )


def in_words(count: int) -> str:
    """1234567 -> '1.23 MB'."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} bytes"

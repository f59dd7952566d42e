"""Rows of local files that a check has read and found right, kept for the data stage of this process: a file is read once.

They are kept until they are taken, once, or until the next check. The stage holds the rows of all sources at a time itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

_KEPT: dict[Hashable, Any] = {}


def stamps(files: Sequence[str]) -> Hashable | None:
    """What changes when one of the files does: size and time of each; None where a file is not on this machine.

    A folder counts with all its files.
    """
    found: list[tuple[str, int, int]] = []
    for name in files:
        path = Path(name)
        try:
            each = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            found += [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in each]
        except OSError:
            return None
    return tuple(found)


def keep(key: Hashable | None, rows: Any) -> None:
    if key is not None:
        _KEPT[key] = rows


def take(key: Hashable | None) -> Any:
    """The rows that were kept under this key, which are then nobody else's; None: there are none."""
    return None if key is None else _KEPT.pop(key, None)


def forget() -> None:
    _KEPT.clear()

"""What all processes of a run use, by /proc, and what they leave behind. A process is the run's if its environment says so."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
#: how a process's command line begins or what it holds -> what it is called in the samples
KINDS = {"ray::IDLE": "idle workers", "Agent": "agents", "ray::": "actors", "gcs_server": "gcs_server", "raylet/raylet": "raylet",
         "fork_server": "fork server", "log_monitor": "log monitor", "soak.py": "driver"}  # fmt: skip


@dataclass
class Usage:
    """Bytes and counts, summed over the processes."""

    processes: int = 0
    rss: int = 0
    pss: int = 0  # what several map is shared out among them
    shared: int = 0  # the part of pss that is shared memory: the object store above all
    descriptors: int = 0
    threads: int = 0
    pss_of: dict[str, int] = field(default_factory=dict)  # kind -> bytes
    descriptors_of: dict[str, int] = field(default_factory=dict)  # kind -> how many


def processes_of(variable: str, value: str) -> list[int]:
    """Those that were started with the variable, and have not ended."""
    wanted, found = f"{variable}={value}".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (place / "environ").read_bytes().split(b"\0") and _state(place) not in "ZX":
                found.append(int(place.name))
    return found


def usage(pids: Iterable[int]) -> Usage:
    total = Usage()
    for pid in pids:
        place = Path(f"/proc/{pid}")
        with suppress(OSError):  # it has ended meanwhile
            memory = _memory(place / "smaps_rollup")
            kind = kind_of(place)
            total.pss_of[kind] = total.pss_of.get(kind, 0) + memory["Pss"]
            total.rss += memory["Rss"]
            total.pss += memory["Pss"]
            total.shared += memory.get("Pss_Shmem", 0)
            descriptors = len(os.listdir(place / "fd"))
            total.descriptors += descriptors
            total.descriptors_of[kind] = total.descriptors_of.get(kind, 0) + descriptors
            total.threads += len(os.listdir(place / "task"))
            total.processes += 1
    return total


def kind_of(place: Path) -> str:
    words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return next((kind for sign, kind in KINDS.items() if sign in words), "other")


def files_in(folder: Path) -> tuple[int, int]:
    """(files and folders, bytes) below it."""
    count = size = 0
    for parent, folders, files in os.walk(folder):
        count += len(folders) + len(files)
        for name in files:
            with suppress(OSError):
                size += os.lstat(os.path.join(parent, name)).st_size
    return count, size


def names_in_shared_memory() -> set[str]:
    return {str(path.relative_to(SHARED_MEMORY)) for path in SHARED_MEMORY.rglob("*")}


def held_by_others(names: Iterable[str], own: Iterable[int]) -> set[str]:
    """Those of the names in shared memory that a process besides `own` has open or mapped."""
    wanted, found, known = {str(SHARED_MEMORY / name): name for name in names}, set(), set(own)
    for place in Path("/proc").glob("[0-9]*"):
        if int(place.name) in known or not wanted:
            continue
        with suppress(OSError):
            held = (place / "maps").read_text(errors="replace")
            for link in (place / "fd").iterdir():
                with suppress(OSError):  # closed meanwhile, as the one that lists them is when this process is looked at
                    held += f" {os.readlink(link)}"
            found |= {name for path, name in wanted.items() if path in held}
    return found


def _state(place: Path) -> str:
    return (place / "stat").read_text().rpartition(")")[2].split()[0]


def _memory(rollup: Path) -> dict[str, int]:
    """Name -> bytes."""
    lines = (line.split() for line in rollup.read_text().splitlines()[1:])
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}

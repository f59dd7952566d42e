"""The folder that a run's own Ray writes to (sockets, a log per process): it goes when the run ends.

Ray leaves them in the temporary folder for ever. That of a run that fails stays, for its messages point there. A run whose process
is killed removes nothing: the next one does that starts a Ray here. Folders of other Rays are never touched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray

from rlhf_ray.actors.pulse import started_at
from rlhf_ray.errors import StageStopped

OWNER = "rlhf_ray_owner"  # a file in the folder: whose it is, as `_who` says it


@contextmanager
def session_cleared(shut_down: Callable[[], None]) -> Iterator[None]:
    """Around the use of the Ray that this process has just started: its folder goes with it, those of killed runs go first."""
    folder: Path | None = None
    stays = True
    try:
        try:
            folder = Path(ray.nodes()[0]["RayletSocketName"]).parent.parent  # SESSION/sockets/raylet
            remove_left(folder.parent)
            with suppress(OSError):  # a full disk, or no Linux: then the next run does not know it
                (folder / OWNER).write_text(_who(os.getpid()))
            yield
        finally:
            shut_down()
        stays = False
    except StageStopped:
        stays = False
        raise
    finally:
        if folder is not None and stays:  # whatever ended the run, there may be a reason in the logs
            (folder / OWNER).unlink(missing_ok=True)
        elif folder is not None:
            _remove(folder)


def remove_left(parent: Path) -> list[Path]:
    """Folders of runs whose process is gone -> which they were. parent: Ray's temporary folder."""
    left = [owner.parent for owner in parent.glob(f"session_2*/{OWNER}") if _is_gone(owner)]
    for folder in left:
        _remove(folder)
    return left


def _who(pid: int) -> str:
    """Not the process alone: a number is given again, and has another meaning on another host that shares the folder, or in a
    container."""
    return f"{pid} {started_at(pid)} {_here()}"


def _here() -> str:
    """This host since its last start, and the container."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _is_gone(owner: Path) -> bool:
    """A folder of another user, host or container that shares this temporary folder is nobody's to judge."""
    try:
        told = owner.read_text()
        ours = owner.stat().st_uid == os.geteuid() and told.endswith(f" {_here()}")
        return ours and told != _who(int(told.split()[0]))
    except (OSError, ValueError):  # removed meanwhile; half written
        return False


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    latest = folder.with_name("session_latest")
    if latest.is_symlink() and not latest.exists():
        with suppress(OSError):  # another run removes it, too
            latest.unlink()

"""Checkpoints of a supervised stage: Hugging Face folders checkpoint-<step>, each marked once it is whole."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_ray.errors import UserError
from rlhf_ray.runs.storage import write_atomically

MARK = "COMPLETE"
REMEDY = "delete this folder to go on from the checkpoint before it, or the stage's folder to start the stage again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint and what is needed to go on from it."""

    step: int
    elapsed_s: float  # seconds of training up to it, over all resumes
    workers: int
    zero_stage: int


def mark_complete(folder: Path, checkpoint: Checkpoint) -> None:
    """Flush every file of the folder to disk, then mark it: a folder without the mark may be half-written.

    The mark holds every file's size: transformers goes on without a random state, say, if its file is missing.
    """
    sizes: dict[str, int] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != MARK:
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
            sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    write_atomically(folder / MARK, json.dumps(asdict(checkpoint) | {"files": sizes}))


def newest_complete(checkpoints: Path) -> tuple[Path, Checkpoint] | None:
    """The whole checkpoint of the latest step, if there is any. UserError where a part of it is missing since."""
    marked = [mark.parent for mark in checkpoints.glob(f"checkpoint-*/{MARK}")]
    if not marked:
        return None
    newest = max(marked, key=lambda folder: int(folder.name.rpartition("-")[2]))
    return newest, _read(newest)


def _read(folder: Path) -> Checkpoint:
    try:
        mark = json.loads((folder / MARK).read_text())
        files = dict(mark.pop("files", {}))  # earlier versions wrote none
        checkpoint = Checkpoint(**mark)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{folder / MARK} is not what the stage has written ({error}); {REMEDY}") from error
    changed = [name for name, size in files.items() if not (folder / name).is_file() or (folder / name).stat().st_size != size]
    if changed:
        raise UserError(f"the checkpoint {folder} has lost or changed {', '.join(changed[:3])}; {REMEDY}")
    return checkpoint


def check_fits(stage: str, checkpoint: Checkpoint, *, workers: int, zero_stage: int) -> None:
    """ZeRO splits optimiser state over the ranks that wrote it. UserError where other ranks would read it."""
    if zero_stage != checkpoint.zero_stage:
        raise UserError(
            f"{stage}.zero_stage is {zero_stage}, but the checkpoint of step {checkpoint.step} was written with "
            f"{checkpoint.zero_stage}; set it back, or delete the stage's folder to start it again"
        )
    if zero_stage > 0 and workers != checkpoint.workers:
        raise UserError(
            f"{stage}.workers is {workers}, but the checkpoint of step {checkpoint.step} was written by "
            f"{checkpoint.workers} ranks under ZeRO; set it back, or delete the stage's folder to start it again"
        )

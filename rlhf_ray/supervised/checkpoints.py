"""Checkpoints of a supervised stage: Hugging Face folders checkpoint-<step>, each marked once it is whole."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_ray.errors import UserError
from rlhf_ray.runs.storage import write_atomically

MARK = "COMPLETE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint and what is needed to go on from it."""

    step: int
    elapsed_s: float  # seconds of training up to it, over all resumes
    workers: int
    zero_stage: int


def mark_complete(folder: Path, checkpoint: Checkpoint) -> None:
    """Flush every file of the folder to disk, then mark it: a folder without the mark may be half-written."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
    write_atomically(folder / MARK, json.dumps(asdict(checkpoint)))


def newest_complete(checkpoints: Path) -> tuple[Path, Checkpoint] | None:
    """The whole checkpoint of the latest step, if there is any."""
    found = [
        (mark.parent, Checkpoint(**json.loads(mark.read_text()))) for mark in checkpoints.glob(f"checkpoint-*/{MARK}")
    ]
    return max(found, key=lambda pair: pair[1].step, default=None)


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

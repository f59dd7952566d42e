"""PPO checkpoints: whole, checksummed folders; a reader finds the last good one.

    checkpoints/step_000020/  state.json                     the controller's state
                              policy-00-of-01.safetensors    one file per rank: float32 weights and Adam moments by name
                              critic-00-of-01.safetensors
                              MANIFEST.json                  SHA-256 of every other file

Everything is written into a temporary folder that is renamed at the end. There is no pickle in it, and as tensors are
whole, it loads at any ZeRO stage and rank count.
"""

from __future__ import annotations

# safetensors is annotated in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from rlhf_ray.errors import UserError
from rlhf_ray.models.finite_weights import first_bad, refuse_bad
from rlhf_ray.models.tensor_file import write_tensors
from rlhf_ray.runs import sealed
from rlhf_ray.runs.storage import write_atomically

STATE, PATTERN = "state.json", "step_*"
FORMAT = 1  # raised when the same bytes would come to mean something else: names of tensors, the order of draws, the loop's state
WRITER = "written_by"  # key of state.json: {"format": 1, "rlhf_ray": "0.2.0"}; earlier versions, whose format is 1, wrote none
STATE_KEYS = ("step", "kl_coef", "best_score", "best_step")  # those that every version has written
REMEDY = "delete this folder to go on from the checkpoint before it (or, if there is none, the stage's folder to start again)"


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def temporary_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f".step_{step:06d}.tmp"


def rank_file(role: str, rank: int, ranks: int) -> str:
    return f"{role}-{rank:02d}-of-{ranks:02d}.safetensors"


def share_of_rank(
    role: str, rank: int, ranks: int, state: Iterable[tuple[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """A copy of this rank's share of the role's state: every ranks-th tensor. All ranks iterate `state` together.

    NotFinite where it holds a NaN: a run that goes on from a checkpoint can trust it.
    """
    share = {name: _copied(tensor) for i, (name, tensor) in enumerate(state) if i % ranks == rank}
    refuse_bad(share.items(), f"no checkpoint is written: the {role}'s state is not finite")
    return share


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def write_share(
    folder: Path, role: str, rank: int, ranks: int, share: Mapping[str, torch.Tensor], steps_taken: int
) -> dict[str, str]:
    """Write and flush it -> {the file's name: its SHA-256}."""
    name = rank_file(role, rank, ranks)
    return {name: write_tensors(folder / name, share, {"steps_taken": str(steps_taken)})}


def read_role(folder: Path, role: str) -> tuple[dict[str, torch.Tensor], int]:
    """(whole state by name, optimiser steps taken), whatever the number of ranks that wrote it.

    UserError where a rank's file or its count of steps is missing, can't be read, or holds a NaN.
    """
    there = {file.name for file in folder.glob(f"{role}-*-of-*.safetensors")}
    ranks = max((int(name.removesuffix(".safetensors").rpartition("-")[2]) for name in there), default=1)
    files = [rank_file(role, rank, ranks) for rank in range(ranks)]
    missing = [name for name in files if name not in there]
    if missing:
        raise UserError(f"{folder} has no {', '.join(missing)}, so the {role} can't go on from it; {REMEDY}")
    state: dict[str, torch.Tensor] = {}
    try:
        for name in files:
            state |= load_file(folder / name)
        with cast(Any, safe_open)(folder / files[0], "pt") as opened:  # it comes without types
            steps_taken = int((opened.metadata() or {})["steps_taken"])
    except SafetensorError as error:
        raise UserError(f"{folder} has a file of the {role} that can't be read ({error}); {REMEDY}") from error
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder / files[0]} does not say how many optimiser steps were taken; {REMEDY}") from error
    bad = first_bad(state.items())
    if bad is not None:
        raise UserError(f"{folder} holds values that are not finite (the {role}'s {bad}); {REMEDY}")
    return state, steps_taken


def publish(checkpoints: Path, step: int, state: dict[str, Any], keep: int, digests: Mapping[str, str]) -> Path:
    """Add the controller's state and the manifest to the temporary folder, rename it, drop all but the last `keep`.

    digests: what the ranks' `write_share` returned.
    """
    temporary, folder = temporary_folder(checkpoints, step), step_folder(checkpoints, step)
    write_atomically(temporary / STATE, json.dumps(state | {WRITER: sealed.writer(FORMAT)}, indent=2) + "\n")
    # A run goes on from its last good checkpoint, so one that stands at this step or a later one is damaged.
    for damaged in [path for path in complete(checkpoints) if path.name >= folder.name]:
        shutil.rmtree(damaged)
    sealed.seal(temporary, folder, digests)
    for old in complete(checkpoints)[:-keep]:
        shutil.rmtree(old)
    return folder


def complete(checkpoints: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sealed.sealed(checkpoints, PATTERN)


def last_good(checkpoints: Path, report: Callable[[str], None] = lambda message: None) -> Path | None:
    """`sealed.last_good` of PPO's."""
    return sealed.last_good(checkpoints, PATTERN, STATE, report)


def read_state(folder: Path) -> dict[str, Any]:
    """The controller's state. UserError where it is missing, not JSON, or lacks a key."""
    path = folder / STATE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); {REMEDY}") from error
    missing = [key for key in STATE_KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}; {REMEDY}")
    sealed.check_format(folder, state.pop(WRITER, None), FORMAT)
    return cast(dict[str, Any], state)

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
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rlhf_ray.errors import UserError
from rlhf_ray.models.finite_weights import first_bad, refuse_bad
from rlhf_ray.runs.storage import write_atomically

MANIFEST, STATE = "MANIFEST.json", "state.json"
STATE_KEYS = ("step", "kl_coef", "best_score", "best_step")  # those that every version has written
REMEDY = "delete this folder to go on from the checkpoint before it (or, if there is none, the stage's folder to start again)"


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def temporary_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f".step_{step:06d}.tmp"


def rank_file(role: str, rank: int, ranks: int) -> str:
    return f"{role}-{rank:02d}-of-{ranks:02d}.safetensors"


def write_rank(
    folder: Path, role: str, rank: int, ranks: int, state: Iterable[tuple[str, torch.Tensor]], steps_taken: int
) -> None:
    """This rank's share of the role's state: every ranks-th tensor. All ranks iterate `state` together.

    NotFinite, and nothing is written, where it holds a NaN: a run that goes on from a checkpoint can trust it.
    """
    share = {name: tensor.detach().float().cpu().clone() for i, (name, tensor) in enumerate(state) if i % ranks == rank}
    refuse_bad(share.items(), f"no checkpoint is written: the {role}'s state is not finite")
    path = folder / rank_file(role, rank, ranks)
    save_file(share, path, metadata={"steps_taken": str(steps_taken)})
    _flush(path)


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


def publish(checkpoints: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Add the controller's state and the manifest to the temporary folder, rename it, drop all but the last `keep`."""
    temporary, folder = temporary_folder(checkpoints, step), step_folder(checkpoints, step)
    write_atomically(temporary / STATE, json.dumps(state, indent=2) + "\n")
    hashes = {file.name: _hash(file) for file in sorted(temporary.iterdir())}
    write_atomically(temporary / MANIFEST, json.dumps(hashes, indent=2) + "\n")
    _flush(temporary)
    # A run goes on from its last good checkpoint, so one that stands at this step or a later one is damaged.
    for damaged in [path for path in complete(checkpoints) if path.name >= folder.name]:
        shutil.rmtree(damaged)
    os.rename(temporary, folder)
    _flush(checkpoints)
    for old in complete(checkpoints)[:-keep]:
        shutil.rmtree(old)
    return folder


def complete(checkpoints: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted(path for path in checkpoints.glob("step_*") if (path / MANIFEST).exists())


def last_good(checkpoints: Path, report: Callable[[str], None] = lambda message: None) -> Path | None:
    """The newest checkpoint whose files have their checksums; `report` hears of each that has not.

    None: there is none at all. UserError: there are, and all are damaged.
    """
    broken: list[str] = []
    for folder in reversed(complete(checkpoints)):
        bad = _damaged_files(folder)
        if not bad:
            return folder
        broken.append(folder.name)
        report(f"checkpoint {folder.name} is damaged ({', '.join(bad)}); using the one before it")
    if broken:
        raise UserError(
            f"every checkpoint in {checkpoints} is damaged ({', '.join(broken)}); delete them to start the stage again"
        )
    return None


def _damaged_files(folder: Path) -> list[str]:
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
    except ValueError:  # cut off, or not even text
        return [MANIFEST]
    if not isinstance(hashes, dict) or STATE not in hashes:
        return [MANIFEST]
    return [
        name
        for name, expected in cast(dict[str, Any], hashes).items()
        if not (folder / name).is_file() or _hash(folder / name) != expected
    ]


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
    return cast(dict[str, Any], state)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

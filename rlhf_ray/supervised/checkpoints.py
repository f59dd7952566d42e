"""Checkpoints of a supervised stage: sealed folders (`runs.sealed`), safetensors and JSON. Nothing in them can run code.

    checkpoints/checkpoint-20/  state.json                     step, seconds, the schedule's position
                                trainer_state.json             what transformers' Trainer counts
                                trained-00-of-01.safetensors   one file per rank: float32 weights and Adam moments by name
                                random-00-of-01.safetensors    one file per rank: the states of its generators
                                MANIFEST.json                  SHA-256 of every other file

Only what trains is there; the rest is built again from the recipe. Tensors are whole, so they load at any ZeRO stage and number of
workers.
"""

from __future__ import annotations

# safetensors is annotated in part only.
# pyright: reportUnknownMemberType=false
import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rlhf_ray.errors import UserError
from rlhf_ray.runs import sealed
from rlhf_ray.runs.storage import write_atomically

STATE, PATTERN = "state.json", "checkpoint-*"
LEFT_OVER = ".checkpoint-*.tmp"  # of a process that died while it wrote
FORMAT = 2  # 1: DeepSpeed's pickles
REMEDY = "delete this folder to go on from the checkpoint before it, or the stage's folder to start the stage again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint and what is needed to go on from it."""

    step: int
    elapsed_s: float  # seconds of training up to it, over all resumes
    rate_step: int  # where the learning rate's schedule is


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"checkpoint-{step}"


def temporary_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f".checkpoint-{step}.tmp"


def rank_file(kind: str, rank: int, ranks: int) -> str:
    return f"{kind}-{rank:02d}-of-{ranks:02d}.safetensors"


def publish(checkpoints: Path, checkpoint: Checkpoint, digests: Mapping[str, str], keep: int) -> None:
    """Add the state and the manifest to what the ranks have written (`digests`), rename it, drop all but the last `keep`."""
    temporary = temporary_folder(checkpoints, checkpoint.step)
    state = asdict(checkpoint) | {"written_by": sealed.writer(FORMAT)}
    write_atomically(temporary / STATE, json.dumps(state, indent=2) + "\n")
    folder = step_folder(checkpoints, checkpoint.step)
    whole = sealed.sealed(checkpoints, PATTERN)
    # Training goes on from the last good one, so one that stands at this step or a later one is damaged.
    for damaged in [path for path in whole if sealed.number_of(path) >= checkpoint.step]:
        shutil.rmtree(damaged)
    sealed.seal(temporary, folder, digests)
    for old in sealed.sealed(checkpoints, PATTERN)[:-keep]:
        shutil.rmtree(old)


def newest_complete(
    checkpoints: Path, report: Callable[[str], None] = lambda message: None
) -> tuple[Path, Checkpoint] | None:
    """The last good checkpoint, if there is any. `report` hears of each later one that is damaged.

    UserError where all are damaged, or of another version of this code.
    """
    for old in checkpoints.glob("checkpoint-*/COMPLETE"):
        sealed.check_format(old.parent, {"format": 1, "rlhf_ray": "0.2.0 or before, with pickles, which can run code"}, FORMAT)
    folder = sealed.last_good(checkpoints, PATTERN, STATE, report)
    return None if folder is None else (folder, read_state(folder))


def read_state(folder: Path) -> Checkpoint:
    """UserError where it is not there, damaged, or of another version of this code."""
    try:
        state = json.loads((folder / STATE).read_text())
        sealed.check_format(folder, state.pop("written_by", None), FORMAT)
        return Checkpoint(**state)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / STATE} is not what the stage has written ({error}); {REMEDY}") from error


def read_trained(folder: Path) -> dict[str, torch.Tensor]:
    """The whole state by name, whatever the number of ranks that wrote it. UserError where a rank's file is not there."""
    return {name: tensor for file in _rank_files(folder, "trained") for name, tensor in _load(file).items()}


def _rank_files(folder: Path, kind: str) -> list[Path]:
    there = {file.name: file for file in folder.glob(f"{kind}-*-of-*.safetensors")}
    ranks = max((int(name.removesuffix(".safetensors").rpartition("-")[2]) for name in there), default=1)
    wanted = [rank_file(kind, rank, ranks) for rank in range(ranks)]
    missing = [name for name in wanted if name not in there]
    if missing:
        raise UserError(f"{folder} has no {', '.join(missing)}, so training can't go on from it; {REMEDY}")
    return [there[name] for name in wanted]


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} can't be read ({error}); {REMEDY}") from error


# -- random numbers ---------------------------------------------------------------------------------------------------


def random_state() -> dict[str, torch.Tensor]:
    """A copy of the states of this process's generators: torch's, numpy's, Python's, and those of GPUs."""
    version, words, gauss_next = random.getstate()
    name, keys, position, has_gauss, gauss = np.random.get_state()
    assert (version, name) == (3, "MT19937"), "as Python and numpy have had them for two decades"
    state = {
        "torch": torch.random.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss_next is None else [gauss_next], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state


def read_random(folder: Path, rank: int) -> None:
    """Set this process's generators as they were. Where there are more ranks than wrote it, some begin alike."""
    files = _rank_files(folder, "random")
    state = _load(files[rank % len(files)])
    torch.random.set_rng_state(state["torch"])
    random.setstate((3, tuple(state["python"].tolist()), next(iter(state["python_gauss"].tolist()), None)))
    *keys, position, has_gauss = state["numpy"].tolist()
    numpy_state: Any = ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(state["numpy_gauss"]))
    np.random.set_state(numpy_state)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(state["cuda"])

"""The parts of an evaluation that are done: one whose process ends goes on at the chunk where it stopped.

A part is arrays by name, in evaluation/parts/NAME.npz, written whole or not at all, without pickle. They go when the evaluation is
done, and where they are of another recipe, other models or other prompts than today's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rlhf_ray.config import Recipe
from rlhf_ray.config.sampling_params import Completion
from rlhf_ray.messages import Scores, flatten, unflatten
from rlhf_ray.runs.own_modules import digests
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.storage import write_atomically

Arrays = Mapping[str, np.ndarray]
PREFIX = "array/"  # a user's trait may have the name of an argument of `np.savez`


class KeptParts:
    """Makes a part, or reads it where it was made before."""

    def __init__(self, folder: Path, of: str):
        """of: what the parts follow from (`inputs_of`)."""
        self.folder = folder
        mark = folder / "OF"
        if not mark.exists() or mark.read_text() != of:
            self.drop()
            write_atomically(mark, of)

    def arrays(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        path = self.folder / f"{name}.npz"
        try:
            with np.load(path) as read:
                return {key.removeprefix(PREFIX): read[key] for key in read}
        except (OSError, ValueError, zipfile.BadZipFile):  # not there; or damaged, then made again
            found = make()
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **{PREFIX + key: values for key, values in found.items()})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return found

    def array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        return self.arrays(name, lambda: {"array": make()})["array"]

    def completions(self, name: str, make: Callable[[], list[Completion]]) -> list[Completion]:
        return _as_completions(self.arrays(name, lambda: _as_arrays(make())))

    def scores(self, name: str, make: Callable[[], Scores]) -> Scores:
        found = dict(self.arrays(name, lambda: _scores_as_arrays(make())))
        terms = {key.removeprefix("term/"): found[key] for key in found if key.startswith("term/")}
        return Scores(
            total=found["total"], terms=terms, disagreement=found.get("disagreement"), late=found.get("late")
        )

    def drop(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def inputs_of(recipe: Recipe, folder: RunFolder) -> str:
    """SHA-256 of all that an evaluation follows from: the recipe, its own modules, the models and the prompts."""
    found = hashlib.sha256(json.dumps([recipe.model_dump(mode="json"), digests(recipe)], sort_keys=True).encode())
    weights = [path for stage in recipe.stages for path in folder.stage(stage).path.glob("**/model/*.safetensors")]
    prompts = [folder.data(role) for role in ("eval_prompts", "other_text")]
    for path in sorted([*weights, *(path for path in prompts if path.exists())]):
        with open(path, "rb") as file:
            found.update(f"{path.relative_to(folder.path)}".encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _as_arrays(completions: Sequence[Completion]) -> Arrays:
    found = {
        "ids": flatten((each.response_ids for each in completions), np.int32),
        "logprobs": flatten((each.logprobs for each in completions), np.float32),
        "lengths": np.array([len(each.response_ids) for each in completions], np.int64),
        "reasons": np.array([each.finish_reason for each in completions]),
    }
    supports = [each.support for each in completions if each.support is not None]
    if len(supports) == len(completions):
        found["support"] = flatten((ids for each in supports for ids in each), np.int32)
        found["counts"] = np.array([len(ids) for each in supports for ids in each], np.int64)
        found["log_mass"] = flatten((each.log_mass for each in completions if each.log_mass is not None), np.float32)
    return found


def _as_completions(found: Arrays) -> list[Completion]:
    lengths = found["lengths"]
    rows = range(len(lengths))
    ids, logprobs = unflatten(found["ids"], lengths), unflatten(found["logprobs"], lengths)
    supports: list = [None for _ in rows]
    masses: list = [None for _ in rows]
    if "support" in found:
        tokens, starts = unflatten(found["support"], found["counts"]), [0, *np.cumsum(lengths).tolist()]
        supports = [tokens[starts[row] : starts[row + 1]] for row in rows]
        masses = unflatten(found["log_mass"], lengths)
    return [
        Completion(
            response_ids=ids[row], logprobs=logprobs[row], finish_reason=found["reasons"][row].item(), support=supports[row],
            log_mass=masses[row],
        )
        for row in rows
    ]  # fmt: skip


def _scores_as_arrays(scores: Scores) -> Arrays:
    others = {"disagreement": scores.disagreement, "late": scores.late}
    terms = {f"term/{name}": values for name, values in scores.terms.items()}
    return {"total": scores.total} | terms | {name: values for name, values in others.items() if values is not None}

"""The data stage's Parquet files in a run folder: RUN/data/<role>.parquet.

    role                                      columns
    sft_train, sft_eval                       prompt, response                 (plain text: prompt == "")
    reward_train, reward_eval (also judge_*)  prompt, chosen, rejected         (objective: pairs)
                                              prompt, response, score (float)  (objective: scores)
    prompts, eval_prompts                     prompt

reward_eval_<name> and judge_eval_<name> are further held-out sets, where a builder makes them.

All text, already in the chat template, so that any tokenizer can read it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from rlhf_ray.errors import UserError
from rlhf_ray.run_folder import RunFolder

COLUMNS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "scores": ("prompt", "response", "score"),
    "sft": ("prompt", "response"),
    "prompts": ("prompt",),
}
ROLES = re.compile(r"sft_(train|eval)|(reward|judge)_(train|eval|eval_[a-z0-9_]+)|(eval_)?prompts")


def write_role(folder: RunFolder, role: str, rows: list[dict], columns: tuple[str, ...]) -> None:
    """Write one role's rows (of which only `columns` are kept), under a temporary name first."""
    assert ROLES.fullmatch(role), role
    types = {"score": pa.float64()}
    schema = pa.schema([(column, types.get(column, pa.string())) for column in columns])
    table = pa.Table.from_pydict({column: [row[column] for row in rows] for column in columns}, schema=schema)
    target: Path = folder.data(role)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    pq.write_table(table, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())  # before DONE says that it is there
    os.replace(temporary, target)


def has_role(folder: RunFolder, role: str) -> bool:
    assert ROLES.fullmatch(role), role
    return folder.data(role).exists()


def read_role(folder: RunFolder, role: str) -> Dataset:
    """The prepared rows of one role, in memory (no cache outside the run folder)."""
    if not has_role(folder, role):
        there = sorted(path.stem for path in folder.data(role).parent.glob("*.parquet"))
        raise UserError(
            f"{folder.data(role)} is not there (the run folder holds {', '.join(there) or 'no prepared data'}); "
            f"give the recipe data for '{role}' and run its data stage, in a new run folder if this one has other data"
        )
    return Dataset(pq.read_table(folder.data(role)))

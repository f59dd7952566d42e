"""The data stage's Parquet files in a run folder: RUN/data/<role>.parquet.

    role                                      columns
    sft_train, sft_eval, other_text           prompt, response                 (plain text: prompt == "")
    reward_train, reward_eval (also judge_*)  prompt, chosen, rejected         (objective: pairs)
                                              prompt, response, score (float)  (objective: scores)
    prompts, eval_prompts                     prompt, and the rows' other columns (a gold answer, an id, ...);
                                              whole_prompt, where prompts were cut: theirs, without marks

reward_eval_<name> and judge_eval_<name> are further held-out sets, where a builder makes them.

All text, already in the chat template, so that any tokenizer can read it. What people wrote is marked where it names a
control token (`models.control_tokens`; `shown` takes the marks out). Prompts that are conversations keep their messages in
the column `messages`, as JSON, unless the data has a column of that name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_ray.config import Recipe
from rlhf_ray.config.columns import WHOLE, column_problems
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "scores": ("prompt", "response", "score"),
    "sft": ("prompt", "response"),
    "prompts": ("prompt",),
}
CHAT = "messages"  # of a prompt that is a conversation
JSON = {b"holds": b"JSON"}  # metadata of a column that we wrote as JSON
CUT = {b"holds": b"cut prompts"}  # metadata of WHOLE where we wrote it: null where the prompt is whole
ROLES = re.compile(r"sft_(train|eval)|(reward|judge)_(train|eval|eval_[a-z0-9_]+)|(eval_)?prompts|other_text")
OTHER_TEXT_TOKENS = 256  # of each text of `data.other_text`, the closing token included


def write_role(folder: RunFolder, role: str, rows: list[dict], columns: tuple[str, ...]) -> None:
    """Write `columns` of one role's rows, and of prompts their other columns too, first under a temporary name."""
    assert ROLES.fullmatch(role), role
    types = {"score": pa.float64()}
    schema = pa.schema([(column, types.get(column, pa.string())) for column in columns])
    table = pa.Table.from_pydict({column: [row[column] for row in rows] for column in columns}, schema=schema)
    if role.endswith("prompts"):
        others = [row.get("columns", {}) for row in rows]
        for name in kept_columns(rows):
            if any(name in each for each in others):
                table = table.append_column(name, _array(name, [each.get(name) for each in others], role))
            elif name == WHOLE:
                whole = pa.array([_whole(row) for row in rows], pa.string())
                table = table.append_column(pa.field(WHOLE, pa.string(), metadata=CUT), whole)
            else:
                texts = [json.dumps(row["messages"], default=str) if row.get("messages") else None for row in rows]
                table = table.append_column(pa.field(name, pa.string(), metadata=JSON), pa.array(texts, pa.string()))
    target: Path = folder.data(role)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    pq.write_table(table, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())  # on the disk before DONE is written
    os.replace(temporary, target)


def kept_columns(rows: Sequence[dict]) -> list[str]:
    """The names of the columns that prompts keep."""
    names = dict.fromkeys(name for row in rows for name in row.get("columns", {}))
    if any(row.get("messages") for row in rows):
        names[CHAT] = None
    if any(_whole(row) is not None for row in rows):
        names[WHOLE] = None
    return list(names)


def _whole(row: dict) -> str | None:
    """The text of a row's prompt before it was cut (its key); None where it is whole."""
    from rlhf_ray.models.control_tokens import shown

    key = row.get("key") or row["prompt"]
    return shown(key) if key != row["prompt"] else None


def has_role(folder: RunFolder, role: str) -> bool:
    assert ROLES.fullmatch(role), role
    return folder.data(role).exists()


def read_role(folder: RunFolder, role: str) -> Dataset:
    """The prepared rows of one role, in memory (no cache outside the run folder). UserError if there are none."""
    from datasets import Dataset

    return Dataset(pq.read_table(_path(folder, role)))


def read_prompts(folder: RunFolder, role: str = "prompts") -> list[str]:
    """The prompts of the role "prompts" or "eval_prompts", marked, to encode. Raises as `read_role`.

    PPO's processes read nothing else. Without an import of `datasets` each starts half a second sooner.
    """
    return pq.read_table(_path(folder, role), columns=["prompt"])["prompt"].to_pylist()


class PromptColumns:
    """A role's prompts and their other columns. They stay in Arrow's memory; only rows asked for become Python values."""

    def __init__(self, table: pa.Table):
        self._table = table
        self.names: list[str] = [name for name in table.column_names if name != "prompt"]
        holds = {name: (table.schema.field(name).metadata or {}).get(b"holds") for name in self.names}
        self._json = [name for name in self.names if holds[name] == JSON[b"holds"]]
        self._cut = holds.get(WHOLE) == CUT[b"holds"]

    def __len__(self) -> int:
        return len(self._table)

    def prompts(self, rows: Sequence[int]) -> list[str]:
        """The stored text of these rows, marked."""
        return self._rows(["prompt"], rows)["prompt"]

    def of(self, rows: Sequence[int]) -> dict[str, list]:
        """name of another column -> the values of these rows, in their order."""
        values = self._rows(self.names, rows) if self.names else {}
        if self._cut:
            from rlhf_ray.models.control_tokens import shown

            texts = zip(values[WHOLE], self.prompts(rows), strict=True)
            values[WHOLE] = [shown(prompt) if whole is None else whole for whole, prompt in texts]
        return values | {name: [_read(text) for text in values[name]] for name in self._json}

    def messages(self, rows: Sequence[int]) -> list[list[dict] | None]:
        """The conversations that these rows are; None where a prompt is plain text."""
        if CHAT not in self._json:
            return [None] * len(rows)
        return [_read(text) for text in self._rows([CHAT], rows)[CHAT]]

    def take(self, rows: Sequence[int]) -> PromptColumns:
        """These rows alone."""
        return PromptColumns(self._table.take(pa.array(rows, pa.int64())))

    def _rows(self, names: list[str], rows: Sequence[int]) -> dict[str, list]:
        return self._table.select(names).take(pa.array(rows, pa.int64())).to_pydict()


def _read(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def read_prompt_columns(folder: RunFolder, role: str = "prompts") -> PromptColumns:
    """The prompts and other columns of the role "prompts" or "eval_prompts". Raises as `read_role`."""
    return PromptColumns(pq.read_table(_path(folder, role)))


def prompt_columns(folder: RunFolder, role: str) -> list[str]:
    """The names of these columns, without reading them."""
    return [name for name in pq.read_schema(_path(folder, role)).names if name != "prompt"]


def check_columns(recipe: Recipe, folder: RunFolder, roles: Sequence[str] = ("prompts", "eval_prompts")) -> None:
    """UserError where a function of the recipe asks for a column that the prepared prompts lack."""
    problems: list[str] = []
    for role in roles:
        problems += column_problems(recipe, prompt_columns(folder, role), str(folder.data(role)))
    if problems:
        raise UserError("\n".join(problems))


def _array(name: str, values: list, role: str) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
        raise UserError(
            f"data.{role}: the values of the column '{name}' are of several types ({error}); give them one type, "
            "or leave the column out"
        ) from error


def count_rows(folder: RunFolder, role: str) -> int:
    """How many rows a role has. Raises as `read_role`."""
    return pq.read_metadata(_path(folder, role)).num_rows


def _path(folder: RunFolder, role: str) -> Path:
    if not has_role(folder, role):
        there = sorted(path.stem for path in folder.data(role).parent.glob("*.parquet"))
        raise UserError(
            f"{folder.data(role)} is not there (the run folder holds {', '.join(there) or 'no prepared data'}); "
            f"give the recipe data for '{role}' and run its data stage, in a new run folder if this one has other data"
        )
    return folder.data(role)

"""Rows of Parquet files, as they are typed there."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from rlhf_ray.data.text_files import UNPACKING, Broken, unpacked
from rlhf_ray.errors import UserError


def read_parquet(files: Sequence[tuple[str, str]], where: str) -> Dataset:
    """All rows of the files. files: (name in messages, local path). Raises UserError for what can't be read."""
    tables: list[pa.Table] = []
    for name, path in files:
        try:
            table = _read(path)
            tables += [] if table is None else [table]
        except Broken as broken:
            raise UserError(f"{where}: '{name}'{broken}") from broken
        except UNPACKING as error:
            what = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
            raise UserError(
                f"{where}: '{name}' could not be read ({what}); it is cut off, damaged or no Parquet file: copy it again"
            ) from error
    if not tables:
        return Dataset.from_dict({})
    try:
        return Dataset(pa.concat_tables(tables, promote_options="permissive"))
    except (pa.ArrowException, ValueError, NotImplementedError) as error:
        what = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"{where}: the columns of {files[0][0]} and the others do not go together ({what})") from error


def _read(path: str) -> pa.Table | None:
    """None of an empty file. Categories become the texts that they stand for."""
    if os.path.getsize(path) == 0:
        return None
    with unpacked(path) as content:
        plain = isinstance(content, io.BufferedReader)
        table = pq.ParquetFile(path if plain else pa.BufferReader(content.read())).read()
    names = table.column_names
    if len(set(names)) < len(names):
        raise Broken(f": two columns are called '{next(name for name in names if names.count(name) > 1)}'; rename one")
    for place, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(place, column.name, table.column(place).cast(column.type.value_type))
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        raise Broken(f" holds text that is not UTF-8, or is damaged ({str(error)[:200]}); write it again") from error
    return table

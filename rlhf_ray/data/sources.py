"""Reads rows of raw columns from files or the hub, and checks that they are what their role needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, cast

import datasets
import pyarrow as pa
from datasets import Dataset
from datasets.data_files import resolve_pattern
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules.csv.csv import CsvConfig

from rlhf_ray.config import SourceConfig
from rlhf_ray.data.formats import Role, detect
from rlhf_ray.data.kept_rows import keep, stamps, take
from rlhf_ray.data.locate import HubName, LocalFiles, locate
from rlhf_ray.data.parquet import read_parquet
from rlhf_ray.data.paths import suffix_of
from rlhf_ray.data.text_files import TextRows, read_text_files
from rlhf_ray.data.values import (
    NUMBERS,
    TEXT_OR_MESSAGES,
    as_numbers,
    check_not_written_out,
    check_one_type,
    check_values,
)
from rlhf_ray.errors import UserError, whole_message
from rlhf_ray.models.hub import look_up

Rows = Dataset | TextRows
LOOKED_AT = 100  # rows of typed text, to see what it is


def load_source(
    source: SourceConfig, root: str | None, seed: int, where: str, form: Role, *, with_prompts: bool = False
) -> Rows:
    """All rows of a source, or `max_rows` of them drawn at random (many files are sorted by label).

    UserError for columns or values that are not what a row of this form needs. with_prompts: their other columns stay with
    the prompts, and so need one type each.
    """
    rows = take(_key(source, root, where, form, with_prompts))
    if rows is None:
        rows = _read_and_check(source, root, where, form, with_prompts)
    if source.max_rows is None or len(rows) <= source.max_rows:
        return rows
    if isinstance(rows, TextRows):
        return rows.sample(source.max_rows, seed)
    return rows.shuffle(seed=seed).select(range(source.max_rows))


def _read_and_check(source: SourceConfig, root: str | None, where: str, form: Role, with_prompts: bool) -> Rows:
    rows = _load(source, root, where)
    if len(rows) == 0:
        raise UserError(f"{where}: '{source.path}' has no rows; give a data set with rows")
    check_rows(rows, source, where, form, with_prompts=with_prompts)
    return rows


def _key(source: SourceConfig, root: str | None, where: str, form: Role, with_prompts: bool) -> Hashable | None:
    """What the checked rows of local files follow from; None for other sources."""
    place = locate(source, root, where)
    found = stamps(place.files) if isinstance(place, LocalFiles) else None
    return None if found is None else (found, source.model_dump_json(), root, where, form, with_prompts)


def check_rows(rows: Rows, source: SourceConfig, where: str, form: Role, *, with_prompts: bool) -> None:
    columns = detect(rows.column_names, source.columns, form, where)
    if isinstance(rows, TextRows):

        def place(index: int) -> str:
            return f"{where}: {rows.place(index)}"

        if rows.untyped:
            score = {columns["score"]} if "score" in columns else set()
            as_numbers(rows.rows, [name for name in rows.column_names if name in NUMBERS or name in score])
        check_values(rows, columns, place)
        check_not_written_out(rows, columns, place)
        if with_prompts:
            check_one_type(rows.rows, other_columns(rows, columns), place)
        return

    def numbered(index: int) -> str:
        return f"{where}: '{source.path}', row {index + 1}"

    some = rows.select(range(min(len(rows), LOOKED_AT))).select_columns(list(columns.values()))
    check_not_written_out(cast(Iterable[dict[str, Any]], some), columns, numbered)
    text = {ours for ours, theirs in columns.items() if _is_text(rows.features[theirs])}
    # Text is right for these, so nothing is read; of a pair both are looked at, or neither: they are of one kind.
    right = text & {*TEXT_OR_MESSAGES, "text"}
    if not {"chosen", "rejected"} <= right:
        right -= {"chosen", "rejected"}
    look_at = {ours: theirs for ours, theirs in columns.items() if ours not in right}
    if look_at:
        selected = rows.select_columns(list(look_at.values()))
        check_values(cast(Iterable[dict[str, Any]], selected), look_at, numbered)


def _is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def columns_of(
    source: SourceConfig, root: str | None, where: str, form: Role, *, with_prompts: bool = False
) -> list[str] | None:
    """The column names; None where they are known only after a download. Rows of files are read and checked, and kept for the
    next `load_source` of them."""
    place = locate(source, root, where)
    if isinstance(place, LocalFiles):
        key = _key(source, root, where, form, with_prompts)  # of the files as they are before they are read
        rows = _read_and_check(source, root, where, form, with_prompts)
        keep(key, rows)
        return rows.column_names
    look_up(place.name, "dataset", where)
    builder = _call(where, source.path, lambda: datasets.load_dataset_builder(place.name, source.name))
    if builder.info.splits and source.split not in builder.info.splits and source.split.isidentifier():
        raise UserError(
            f"{where}: '{place.name}' has no split '{source.split}'; it has {', '.join(builder.info.splits)}"
        )
    return list(builder.info.features) if builder.info.features else None


def other_columns(dataset: Rows, used: Mapping[str, str]) -> tuple[str, ...]:
    """Columns that are not part of a role's row and can stay with it: text, numbers, and lists and structs of them."""
    taken = {*used.values(), "prompt"}
    if isinstance(dataset, TextRows):
        return tuple(name for name in dataset.column_names if name not in taken)
    return tuple(name for name, kind in dataset.features.items() if name not in taken and _is_plain(kind))


def _is_plain(kind: object) -> bool:
    if isinstance(kind, dict):
        return all(_is_plain(part) for part in kind.values())
    if isinstance(kind, (list, datasets.List, datasets.LargeList)):
        return _is_plain(kind[0] if isinstance(kind, list) else kind.feature)
    return isinstance(kind, (datasets.Value, datasets.ClassLabel))


def _load(source: SourceConfig, root: str | None, where: str) -> Rows:
    place = locate(source, root, where)
    datasets.disable_progress_bars()
    if isinstance(place, HubName):
        look_up(place.name, "dataset", where)
        return _call(where, source.path, lambda: _from_hub(place.name, source))
    if place.reader == "arrow":
        saved = _call(where, source.path, lambda: datasets.load_from_disk(place.files[0]))
        if isinstance(saved, Dataset):
            return saved
        if source.split not in saved:
            raise UserError(f"{where}: '{source.path}' has no split '{source.split}'; it has {', '.join(saved)}")
        return saved[source.split]
    files = [each for file in place.files for each in _call(where, file, lambda file=file: _local(file))]
    if place.reader == "parquet":
        return read_parquet(files, where)
    delimiter = "\t" if suffix_of(place.files[0]) == ".tsv" else ","
    return read_text_files(place.reader, files, where, delimiter)


def _from_hub(name: str, source: SourceConfig) -> Dataset:
    """CSV there is text, too, unless its author says otherwise: "NA" is a word, and "00501" keeps its zeros."""
    builder = datasets.load_dataset_builder(name, source.name)
    if not isinstance(builder.config, CsvConfig) or builder.info.features:
        return datasets.load_dataset(name, source.name, split=source.split)
    first = next(iter(datasets.load_dataset(name, source.name, split=source.split, streaming=True)), {})
    text = datasets.Features({column: datasets.Value("string") for column in first})
    return datasets.load_dataset(name, source.name, split=source.split, features=text, keep_default_na=False)


def _local(file: str) -> list[tuple[str, str]]:
    """(name in messages, local path) of a file, or of those that a URI or a pattern of URIs stands for."""
    if "://" not in file:
        return [(file, file)]
    uris = resolve_pattern(file, "") if any(sign in file for sign in "*?[") else [file]
    return [(uri, str(datasets.DownloadManager().download(uri))) for uri in uris]


def _call(where: str, path: str, load: Callable):
    """Run a `datasets` loader; its errors about a user's data become one sentence."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs the same failure again, with half the file
    try:
        return load()
    except DatasetGenerationError as error:
        raise UserError(
            f"{where}: '{path}' could not be read ({whole_message(error.__cause__ or error)}); correct the file"
        ) from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{where}: the data set '{path}' is not on the hub or the hub cannot be reached ({whole_message(error)}); "
            "check the name, or give a local copy with data.root"
        ) from error
    except (ValueError, OSError, EOFError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"{where}: '{path}' could not be loaded ({whole_message(error)}); correct path, name or split"
        ) from error
    finally:
        logger.setLevel(level)

"""Rows of JSON, CSV, TSV and text files: UTF-8, packed or not.   Whatever is wrong with a file is one sentence with its line.

Nothing is guessed from what a cell looks like: in CSV and TSV a cell is text ("NA", "00501", "2024-01-01"), in JSON a value
has the type that is written.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import pyarrow as pa

from rlhf_ray.data.values import kind_of
from rlhf_ray.errors import UserError

Line = int  # of the file, from 1 on
Row = dict[str, Any]
PACKINGS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
NAMED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
FOREIGN = {
    b"PK\x03\x04": "a ZIP archive or an Excel file; unpack it, or save it as CSV",
    b"PAR1": "a Parquet file; give it a name that ends in .parquet",
    b"\xff\xfe": "UTF-16; save it as UTF-8, for example with: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8, for example with: iconv -f UTF-16 -t UTF-8",
}
UNPACKING = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
SPACE = re.compile(r"\s*")


class Broken(Exception):
    """What is wrong with a file, without its name."""


@dataclass(slots=True)
class TextRows:
    """The rows of files of one kind, and where each of them stands: each as a dict with every column."""

    rows: list[Row] = field(default_factory=list)
    column_names: list[str] = field(default_factory=list)
    untyped: bool = False  # of CSV and TSV: every value is text
    starts: list[tuple[int, str]] = field(default_factory=list)  # (number of its first row, file)
    lines: array = field(default_factory=lambda: array("Q"))  # of each row, in its file

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def place(self, index: int) -> str:
        """'rows.jsonl, line 7'."""
        file = next(name for first, name in reversed(self.starts) if first <= index)
        return f"'{file}', line {self.lines[index]}"

    def sample(self, count: int, seed: int) -> TextRows:
        """`count` rows, those that `datasets.Dataset.shuffle(seed)` would begin with."""
        chosen = np.random.default_rng(seed).permutation(len(self.rows))[:count]
        return TextRows([self.rows[index] for index in chosen], self.column_names, self.untyped)


def read_text_files(reader: str, files: Sequence[tuple[str, str]], where: str, delimiter: str = ",") -> TextRows:
    """All rows of the files, each with every column (None where its file or its line lacks it).

    reader: json, csv or text. files: (name in messages, local path). Raises UserError for what can't be read.
    """
    parse: Callable[[IO[str]], Iterator[tuple[Line, Row]]]
    parse = {"json": _json_rows, "csv": lambda lines: _csv_rows(lines, delimiter), "text": _text_rows}[reader]
    newline = {"json": "\n", "csv": "", "text": None}[reader]
    read = TextRows(untyped=reader == "csv")
    names: dict[str, None] = {}
    for name, path in files:
        read.starts.append((len(read.rows), name))
        try:
            for line, row in _parsed(path, parse, newline):
                names.update(dict.fromkeys(row))
                read.rows.append(row)
                read.lines.append(line)
        except Broken as broken:
            raise UserError(f"{where}: '{name}'{broken}") from broken
    read.column_names = list(names)
    for row in read.rows:
        if len(row) < len(names):
            row |= {missing: None for missing in names if missing not in row}
    return read


@contextmanager
def unpacked(path: str) -> Iterator[IO[bytes]]:
    """The file's content, unpacked where its first bytes say that it is packed. Broken for packing that it only claims."""
    with open(path, "rb") as file:
        head = file.read(32)
        file.seek(0)
        if head.startswith(b"version https://git-lfs"):
            raise Broken(" is a pointer of Git LFS and not the file itself; get that with: git lfs pull")
        packing = next((name for magic, name in PACKINGS.items() if head.startswith(magic)), None)
        if packing == "bzip2" and head[4:10] not in (b"1AY&SY", b"\x17rE8P\x90"):
            packing = None  # a text that begins with these letters
        claimed = next((name for ending, name in NAMED.items() if path.lower().endswith(ending)), None)
        if claimed is not None and packing is None and head:
            raise Broken(f" is named like a {claimed} file and is none; correct its name, or copy it again")
        if packing == "zstd":
            yield pa.CompressedInputStream(pa.PythonFile(file), "zstd")
            return
        openers = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
        yield openers[packing](file, "rb") if packing is not None else file  # type: ignore[operator]


def _parsed(
    path: str, parse: Callable[[IO[str]], Iterator[tuple[Line, Row]]], newline: str | None
) -> Iterator[tuple[Line, Row]]:
    try:
        with unpacked(path) as content:
            yield from parse(io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline))
    except UnicodeDecodeError as error:
        raise Broken(_not_utf8(path)) from error
    except UNPACKING as error:
        raise Broken(f" could not be read ({_words(error)}); it is cut off or damaged: copy it again") from error


def _not_utf8(path: str) -> str:
    with unpacked(path) as content:
        for number, line in enumerate(content, 1):
            for magic, what in FOREIGN.items():
                if number == 1 and line.startswith(magic):
                    return f" is {what}"
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at place {error.start + 1}"
                return (
                    f", line {number}: {byte} is not UTF-8; save the file as UTF-8, for example with: "
                    "iconv -f LATIN1 -t UTF-8"
                )
    return " is not UTF-8"


def _words(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


# -- JSON -------------------------------------------------------------------------------------------------------------


def _json_rows(lines: IO[str]) -> Iterator[tuple[Line, Row]]:
    """One object per line, or one list of objects."""
    decoder, first = json.JSONDecoder(object_pairs_hook=_object), True
    for number, line in enumerate(_without_nul(lines), 1):
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            yield from _items(decoder, line + lines.read(), number)
            return
        first, line = False, line.rstrip("\r\n")
        value, end = _value(decoder, line, len(line) - len(line.lstrip()), number)
        if line[end:].strip():
            raise Broken(f", line {number}: is not JSON (more follows at place {end + 1}); write one object per line")
        yield number, _checked(value, number)


def _items(decoder: json.JSONDecoder, text: str, line: Line) -> Iterator[tuple[Line, Row]]:
    """The objects of a list that begins on this line."""
    at, done, between = text.index("[") + 1, 0, "["
    while True:
        at = SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if text.startswith("]", at) and between != ",":
            break
        if between == "":
            if not text.startswith(",", at):
                line += text.count("\n", done, at)
                raise Broken(f", line {line}: is not JSON (no ',' or ']' follows an object); correct it, or copy the file again")
            at, between = at + 1, ","
            continue
        line, done = line + text.count("\n", done, at), at
        value, at = _value(decoder, text, at, line)
        yield line, _checked(value, line)
        between = ""
    if text[at + 1 :].strip():
        raise Broken(f", line {line + text.count(chr(10), done, at)}: more follows the list; write one list per file")


def _checked(value: Any, line: Line) -> Row:
    if not isinstance(value, dict):
        raise Broken(f", line {line}: is {kind_of(value)}, not an object; write {{column: value, ...}}")
    return value


def _value(decoder: json.JSONDecoder, text: str, at: int, line: Line) -> tuple[Any, int]:
    """(the value that begins at `at`, where it ends)."""
    try:
        value, end = decoder.raw_decode(text, at)
        if SURROGATE.search(text, at, end):
            json.dumps(value, ensure_ascii=False).encode()
        return value, end
    except json.JSONDecodeError as error:
        line += text.count("\n", at, error.pos)
        what = error.msg.removesuffix(" at").removesuffix(" starting")
        said = f"is not JSON ({what} at place {error.colno}); correct it, with one object per line"
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        said = f"holds half of a character (the lone surrogate {half}); write whole characters"
    except (ValueError, RecursionError) as error:  # more digits, or levels, than Python reads
        said = f"can't be read ({_words(error)}); correct or remove it"
    except Broken as broken:
        said = str(broken)
    raise Broken(f", line {line}: {said}")


def _object(pairs: list[tuple[str, Any]]) -> Row:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Broken(f"the key '{twice}' stands there twice; keep one of the two")
    return made


# -- CSV, TSV, text ---------------------------------------------------------------------------------------------------


def _csv_rows(lines: IO[str], delimiter: str) -> Iterator[tuple[Line, Row]]:
    csv.field_size_limit(sys.maxsize)  # of a cell; 131,072 characters otherwise
    reader = csv.reader(_without_nul(lines), delimiter=delimiter, strict=True)
    names: list[str] = []
    following = 1  # the line that the next row begins with
    try:
        for cells in reader:
            line, following = following, reader.line_num + 1
            if not cells:
                continue
            if not names:
                names = [name or f"Unnamed: {place}" for place, name in enumerate(cells)]  # as pandas calls its index
                twice = next((name for name in names if names.count(name) > 1), None)
                if twice is not None:
                    raise Broken(f", line {line}: two columns are called '{twice}'; rename one")
                continue
            if len(cells) != len(names):
                raise Broken(
                    f", line {line}: has {len(cells)} cells, and the header has {len(names)}; correct the line "
                    f"(a cell that holds {'a tab' if delimiter == chr(9) else 'a comma'}, a quote or a line break stands in quotes)"
                )
            yield line, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise Broken(
            f", line {following}: is not {'TSV' if delimiter == chr(9) else 'CSV'} ({error}); close each quote that opens "
            'a cell, and write a quote inside a quoted cell twice ("")'
        ) from error


def _text_rows(lines: IO[str]) -> Iterator[tuple[Line, Row]]:
    for number, line in enumerate(_without_nul(lines), 1):
        yield number, {"text": line.rstrip("\n")}


def _without_nul(lines: IO[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise Broken(f", line {number}: holds a NUL byte; the file is binary, UTF-16, or damaged: save it as UTF-8")
        yield line

"""Files that are written whole or not at all, and what stands in them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from rlhf_ray.errors import UserError


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write to a temporary name, flush to disk, rename: a reader sees the old file or the new one, never half.

    durable False: without the flush, for what is written again in a moment anyway.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:  # whatever the locale: it is read as UTF-8
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object that a file of a run folder holds. UserError with the remedy for a file that is gone or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; {remedy}")
    return cast(dict[str, Any], found)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; a last line that a crash cut off is left out. [] where there is no file."""
    if not path.exists():
        return []
    try:
        # Not splitlines(): in JSON as we write it a text may hold U+2028 or U+0085, which end a line for Python only.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); mend that, or delete it") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not UTF-8 ({error}); delete it, or the lines that are not text") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            # Only the last line can be half-written: each is flushed whole before the next begins.
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not JSON; delete that line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is not a JSON object; delete that line")
        rows.append(cast(dict[str, Any], row))
    return rows

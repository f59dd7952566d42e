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
    with open(temporary, "w") as file:
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

"""Folders that are whole or not there, and whose every byte is known: what a checkpoint is.

They are filled under a temporary name. `seal` writes down each file's SHA-256 in MANIFEST.json, flushes all to disk and renames the
folder. A reader compares: a byte that has changed since, or a file that is torn or gone, is found before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from rlhf_ray.errors import UserError
from rlhf_ray.runs.storage import write_atomically

MANIFEST = "MANIFEST.json"
READERS = 4  # threads; hashing waits for the disk, and releases the interpreter


def new_folder(temporary: Path) -> None:
    """An empty one, whatever an earlier try has left there."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True, mode=0o700)


def seal(temporary: Path, folder: Path, digests: Mapping[str, str]) -> None:
    """Make the folder appear. digests: of the files that were flushed and hashed while they were written; the others, small ones,
    are now. OSError where a file that has a digest is not there."""
    names = sorted(file.name for file in temporary.iterdir())
    missing = sorted(digests.keys() - set(names))
    if missing:
        raise OSError(f"{temporary} has no {', '.join(missing)}, which should have been written there")
    whole = {name: digests.get(name) or _flushed_digest(temporary / name) for name in names}
    write_atomically(temporary / MANIFEST, json.dumps(whole, indent=2) + "\n")
    flush(temporary)
    os.rename(temporary, folder)
    flush(folder.parent)


def sealed(checkpoints: Path, pattern: str) -> list[Path]:
    """The folders of that pattern that were sealed, damaged or not, in the order of the numbers that their names end with."""
    found = [path for path in checkpoints.glob(pattern) if (path / MANIFEST).exists()]
    return sorted(found, key=number_of)


def number_of(folder: Path) -> int:
    digits = folder.name.replace("-", "_").rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def last_good(
    checkpoints: Path, pattern: str, always: str, report: Callable[[str], None] = lambda message: None
) -> Path | None:
    """The newest one whose files have their checksums; `report` hears of each that has not.

    always: a file that each has. None: there is none at all. UserError: there are, and all are damaged.
    """
    broken: list[str] = []
    for folder in reversed(sealed(checkpoints, pattern)):
        bad = damaged_files(folder, always)
        if not bad:
            return folder
        broken.append(folder.name)
        report(f"checkpoint {folder.name} is damaged ({', '.join(bad)}); using the one before it")
    if broken:
        raise UserError(
            f"every checkpoint in {checkpoints} is damaged ({', '.join(broken)}); delete them to start the stage again"
        )
    return None


def damaged_files(folder: Path, always: str) -> list[str]:
    """Those that are not what was sealed."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):  # cut off, or not even text
        return [MANIFEST]
    if not isinstance(hashes, dict) or always not in hashes:
        return [MANIFEST]
    expected = cast(dict[str, Any], hashes)
    with ThreadPoolExecutor(READERS) as readers:
        found = readers.map(_digest_or_none, [folder / name for name in expected])
        return [name for name, digest in zip(expected, found, strict=True) if digest != expected[name]]


def writer(number: int) -> dict[str, Any]:
    """What a checkpoint says of the code that wrote it."""
    return {"format": number, "rlhf_ray": _version()}


def check_format(folder: Path, said: Any, number: int) -> None:
    """UserError where another code than this wrote the checkpoint. said: its `writer`; None: of before there was one, format 1."""
    found = cast(dict[str, Any], said) if isinstance(said, dict) else {"format": 1, "rlhf_ray": "an earlier version"}
    if found.get("format") != number:
        raise UserError(
            f"{folder} was written by rlhf-ray {found.get('rlhf_ray')} (format {found.get('format')}), and this is {_version()} "
            f"(format {number}), which would read it wrongly; go on with the version that wrote it, or delete the stage's folder "
            "to start the stage again"
        )


def _version() -> str:
    try:
        return metadata.version("rlhf-ray")
    except metadata.PackageNotFoundError:  # on a cluster it is uploaded source only
        return "of unknown version"


def flush(path: Path) -> None:
    """To disk: a file's content, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flushed_digest(path: Path) -> str:
    flush(path)
    return digest_of(path)


def _digest_or_none(path: Path) -> str | None:
    try:
        return digest_of(path)
    except OSError:
        return None


def digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Where a source's rows are: files of one format, or a data set of the hub."""

from __future__ import annotations

import difflib
import glob
import os
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config import SourceConfig
from rlhf_ray.config.user_paths import expanded
from rlhf_ray.data.paths import READERS, suffix_of
from rlhf_ray.errors import UserError

SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval", "unsup", "unsupervised")


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """Files of one format. reader: the name of the reader in `datasets`."""

    reader: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HubName:
    name: str


def locate(source: SourceConfig, root: str | None, where: str) -> LocalFiles | HubName:
    """Decide what a source's path means. `where` names the source in messages, e.g. 'data.sft[0]'.

    With a root everything is local: root/path, else root/<last part of path> (so that a hub name finds its folder),
    else, unless the path is a file name, the root itself. Without a root, a path is local if it exists or looks local.
    """
    path = source.path
    if "://" in path:
        return LocalFiles(_reader_of([path], where), (path,))
    if root is not None:
        base = expanded(root).absolute()
        if not base.is_dir():
            raise UserError(f"data.root = '{root}' is not a folder; give the folder that holds {where}'s '{path}'")
        candidates = [base / path, base / Path(path).name]
        if suffix_of(path) not in READERS:
            candidates.append(base)
    else:
        candidates = [expanded(path).absolute()]
    for candidate in candidates:
        try:
            is_file, is_folder = candidate.is_file(), candidate.is_dir()
        except OSError as error:  # a name that is too long, say
            raise UserError(f"{where}: '{path[:80]}' is no path ({error.strerror}); correct it") from error
        if is_file:
            return LocalFiles(_reader_of([str(candidate)], where), (str(candidate),))
        if is_folder:
            return _folder(candidate, source.split, where)
        if matches := sorted(match for match in glob.glob(str(candidate)) if Path(match).is_file()):
            return LocalFiles(_reader_of(matches, where), tuple(matches))
    if (
        root is None
        and suffix_of(path) not in READERS
        and not path.startswith(("/", ".", "~"))
        and path.count("/") <= 1
    ):
        return HubName(path)
    for candidate in candidates:
        if os.path.lexists(candidate):
            what = "a link that leads nowhere" if candidate.is_symlink() else "no file and no folder"
            raise UserError(f"{where}: '{candidate}' is {what}; give a file of rows, or a folder that holds some")
    folder = candidates[0].parent
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    there = f"{folder} holds {', '.join(names[:8]) or 'nothing'}" if folder.is_dir() else f"{folder} does not exist"
    near = difflib.get_close_matches(candidates[0].name, names, 1)
    remedy = f"did you mean '{near[0]}'?" if near else "correct the path or set data.root"
    raise UserError(f"{where}: '{candidates[0]}' does not exist ({there}); {remedy}")


def _folder(folder: Path, split: str, where: str) -> LocalFiles:
    """The files of a folder that belong to a split, by their names: train.jsonl.gz, test-00000-of-00002.parquet."""
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return LocalFiles("arrow", (str(folder),))
    files = sorted(file for file in folder.rglob("*") if file.is_file() and suffix_of(file) in READERS)
    if not files:
        raise UserError(f"{where}: the folder {folder} holds no {', '.join(READERS)} file (gz too); give one that does")

    def belongs(file: Path, name: str) -> bool:
        stem = file.name.split(".")[0].lower()
        return (
            stem == name
            or stem.startswith((f"{name}-", f"{name}_"))
            or file.parent != folder
            and file.parent.name == name
        )

    chosen = [file for file in files if belongs(file, split)]
    if not chosen and (split != "train" or any(belongs(file, name) for file in files for name in SPLIT_NAMES)):
        names = ", ".join(file.name for file in files[:8])
        raise UserError(
            f"{where}: no file in {folder} is named after the split '{split}' (there are {names}); set split or path"
        )
    chosen = [str(file) for file in chosen or files if file.suffix != ".txt" or len(files) == 1]
    return LocalFiles(_reader_of(chosen, where), tuple(chosen))


def _reader_of(files: list[str], where: str) -> str:
    suffixes = {suffix_of(file) for file in files}
    unknown = sorted(suffixes - set(READERS))
    if unknown:
        raise UserError(f"{where}: '{files[0]}' ends in '{unknown[0]}'; files must be {', '.join(READERS)} (gz too)")
    if len(suffixes) > 1:
        raise UserError(
            f"{where}: files of {' and '.join(sorted(suffixes))} are mixed; give files of one kind in path"
        )
    return READERS[suffixes.pop()]

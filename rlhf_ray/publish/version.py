"""A version of a model: the files that it is made of, named by what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlhf_ray.errors import UserError

_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
#: written beside a version's files, and no part of it
ROWS_FILE = "logprobs.json"
_DIGITS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """What a replica loads."""

    id: str
    folder: str = field(compare=False)  # absolute path of a Hugging Face model folder
    adapter: str | None = field(default=None, compare=False)  # absolute path of an adapter on it, in peft's format

    @property
    def own_folder(self) -> Path:
        """That with the files which make it another one than its base."""
        return Path(self.adapter or self.folder)

    def to_json(self) -> dict[str, str | None]:
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, str | None]) -> Version:
        name, folder = given["id"], given["folder"]
        assert name is not None and folder is not None
        return cls(id=name, folder=folder, adapter=given.get("adapter"))

    def check(self) -> None:
        """UserError where its files are not those that it is named by: an answer never carries another version's name."""
        now = version_id(self.folder, self.adapter)
        if now != self.id:
            raise UserError(
                f"the files of version {self.id} in {self.own_folder} have changed (they are version {now} now); "
                "publish the folder, or put the files back"
            )


def version_of(folder: str | Path, adapter: str | Path | None = None) -> Version:
    return Version(
        id=version_id(folder, adapter), folder=str(folder), adapter=None if adapter is None else str(adapter)
    )


def version_id(folder: str | Path, adapter: str | Path | None = None) -> str:
    """Twelve hexadecimal digits that follow from weights, configuration and tokenizer, wherever the files lie."""
    total = hashlib.blake2b()
    for place in (folder, *([] if adapter is None else [adapter])):
        for file in _files(Path(place)):
            with open(file, "rb") as opened:
                total.update(file.name.encode() + b"\0" + hashlib.file_digest(opened, "blake2b").digest())
    return total.hexdigest()[:_DIGITS]


def _files(folder: Path) -> list[Path]:
    found = {file for pattern in _PATTERNS for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file() and file.name != ROWS_FILE)

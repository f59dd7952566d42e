"""What a store holds of a run folder: CONTENTS.json. It is written last, and what it does not name does not exist for readers.

Two kinds of files:

- **live** ones grow or are rewritten all the time (metrics, events, status, logs). Each is overwritten under its own name, by
  one put.
- **settled** ones (models, checkpoints, data, DONE) belong together: `DONE` says that there is a model. CONTENTS.json changes
  from one set of them to the next at once. One that replaces another goes to a name of its own (`ppo/best/config.json~1a2b3c4d`).

So a store always holds what a crash at some moment would have left on the disk of the run's host, and the code that goes on after a
crash goes on from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

from rlhf_ray.errors import RunFailed
from rlhf_ray.runs.sealed import MANIFEST, number_of

CONTENTS = "CONTENTS.json"
LEASE = "LEASE.json"
FORMAT = 1
CHECKPOINTS = "checkpoints"
#: at the top of a run folder, rewritten while the run goes on
LIVE = frozenset({"status.json", "timings.json", "recipe.yaml", "environment.json", "stages.json", "report.html"})
LIVE_FOLDERS = frozenset({"logs", "tensorboard"})
NOT_KEPT = frozenset({".lock", "STOP", CONTENTS, LEASE})
#: of this machine alone: links to files that are being uploaded, and which state of the store this folder goes on from
OUTGOING, LINEAGE = ".outgoing", ".lineage.json"
#: in the store alone: on its way from another host to the run's (`runs.elsewhere`)
HANDED = ".handed"
#: at the top of a run folder: copies for a server on this host (ppo.publish_every)
PUBLISHED = "published"
DIGITS = 8  # of a digest, in the name of a file that replaces another

Wanted = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in the store."""

    size: int  # bytes
    sha256: str
    modified: float  # on the run's host, seconds since 1970
    key: str  # its name in the store


@dataclass(slots=True)
class Contents:
    """session: of the run that wrote it last."""

    session: str = ""
    files: dict[str, StoredFile] = field(default_factory=dict[str, StoredFile])

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes, url: str) -> Contents:
        """RunFailed where it is not what `to_json` writes."""
        try:
            found = cast(dict[str, Any], json.loads(text))
            if found["format"] != FORMAT:
                raise RunFailed(
                    f"{url}/{CONTENTS} was written by another version of rlhf-ray (format {found['format']}); use that one"
                )
            return cls(
                str(found["session"]), {_safe(name): StoredFile(**entry) for name, entry in found["files"].items()}
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunFailed(
                f"{url}/{CONTENTS} is damaged ({error}); restore it from a version that the bucket keeps, if it does"
            ) from error


def _safe(name: str) -> str:
    """A name that stays inside the folder it is written to."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"it names {name!r}")
    return name


def is_live(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return name in LIVE or name.endswith(".jsonl") or not LIVE_FOLDERS.isdisjoint(parts[:-1])


def is_kept(name: str) -> bool:
    """Whether a file of a run folder belongs into the store."""
    parts = PurePosixPath(name).parts
    return name not in NOT_KEPT and parts[0] not in (PUBLISHED, HANDED) and all(_is_kept(part) for part in parts)


def _is_kept(part: str) -> bool:
    temporary = part.startswith(".") and part.endswith((".tmp", ".old"))
    return part not in (".lock", "STOP", "__pycache__", OUTGOING, LINEAGE) and not temporary


@dataclass(frozen=True, slots=True)
class Found:
    """A file on this machine. Another inode or time: another file."""

    size: int
    modified_ns: int
    inode: int

    @property
    def modified(self) -> float:
        return self.modified_ns / 1e9


def found_in(folder: Path) -> dict[str, Found]:
    """Name -> the files of a run folder that belong into a store. What goes while we look is left out."""
    found: dict[str, Found] = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if _is_kept(each)]
        for file in files:
            path = os.path.join(place, file)
            name = os.path.relpath(path, folder)
            if not is_kept(name):
                continue
            try:
                stat = os.stat(path)
            except OSError:
                continue
            found[name] = Found(stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def checkpoint_of(name: str) -> str | None:
    """'ppo/checkpoints/step_000020/state.json' -> 'ppo/checkpoints/step_000020'."""
    parts = PurePosixPath(name).parts
    if CHECKPOINTS not in parts[:-2]:
        return None
    return str(PurePosixPath(*parts[: parts.index(CHECKPOINTS) + 2]))


def torn_checkpoints(names: Mapping[str, Any], digests_of: Callable[[str], Mapping[str, str] | None]) -> set[str]:
    """Folders among the names that are no whole checkpoints: without a manifest, or without a file that it lists. One that is
    being deleted looks so. digests_of: what a manifest holds; None where it can't be read."""
    folders = {folder for name in names if (folder := checkpoint_of(name)) is not None}
    torn: set[str] = set()
    for folder in folders:
        manifest = f"{folder}/{MANIFEST}"
        listed = digests_of(manifest) if manifest in names else None
        if listed is None or any(f"{folder}/{file}" not in names for file in listed):
            torn.add(folder)
    return torn


def older_checkpoints(names: Mapping[str, Any]) -> set[str]:
    """The checkpoint folders among the names that are not the newest of their stage."""
    by_stage: dict[str, set[str]] = {}
    for name in names:
        if (folder := checkpoint_of(name)) is not None:
            by_stage.setdefault(str(PurePosixPath(folder).parent), set()).add(folder)
    newest = {max(folders, key=lambda folder: number_of(Path(folder))) for folders in by_stage.values()}
    return {folder for folders in by_stage.values() for folder in folders} - newest


# -- what readers want -----------------------------------------------------------------------------------------------------


def everything(name: str) -> bool:
    return True


def to_tell(name: str) -> bool:
    """What `status` and `report` read: no weights, no data, no logs."""
    parts = PurePosixPath(name).parts
    if checkpoint_of(name) is not None:
        return parts[-1] == MANIFEST
    return (
        not name.endswith((".safetensors", ".parquet", ".npz"))
        and LIVE_FOLDERS.isdisjoint(parts)
        and "tokenizer" not in parts
    )


def to_serve(name: str) -> bool:
    """Models, and what is said of them: no checkpoints, no logs, no data but the prompts and the tokenizer."""
    parts = PurePosixPath(name).parts
    return checkpoint_of(name) is None and LIVE_FOLDERS.isdisjoint(parts) and (
        not name.endswith((".parquet", ".npz")) or name == "data/prompts.parquet"
    )  # fmt: skip


def to_export(stage: str) -> Wanted:
    """The model of a stage ("best": PPO's best policy), and which others there are."""
    folder = "ppo/best/" if stage == "best" else f"{stage}/model/"
    return lambda name: name.startswith(folder) or name == "recipe.yaml" or name.endswith("/config.json")


def start_model_files(name: str) -> bool:
    """What is needed beside a checkpoint of PPO to make a model of it."""
    return name == "recipe.yaml" or name.startswith("sft/model/")


def before_ppo(name: str) -> bool:
    """What `--start-from` takes over, and the recipe."""
    return checkpoint_of(name) is None and PurePosixPath(name).parts[0] not in ("ppo", "evaluation", "logs")

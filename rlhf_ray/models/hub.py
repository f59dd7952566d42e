"""Whether a model or a data set that is no folder here is on the hub: asked once, with a deadline of seconds.

The hub's own client tries again for half a minute per file, and a recipe's model is looked at two dozen times before a run.
"""

from __future__ import annotations

import difflib
import functools
import os
import threading
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from rlhf_ray.errors import UserError

Kind = Literal["model", "dataset"]
LOOK_UP_S = 8.0
REMEDY = {
    "model": "check the name, or give a folder that holds the model",
    "dataset": "check the name, or give a local copy with data.root",
}


def look_up(name: str | Path, kind: Kind = "model", where: str = "") -> None:
    """UserError unless `name` is here, in the hub's cache, or on the hub. where: the key, for the message.

    Where the hub is out of reach and its cache has a copy, this process does not ask the hub again.
    """
    name = str(name)
    if Path(name).expanduser().exists():
        return
    problem = _no_path(name) if is_path(name) else _not_on_hub(name, kind, os.getcwd())
    if problem is not None:
        raise UserError(f"{where}: {problem}" if where else problem)


def is_path(name: str) -> bool:
    """Whether it can only be a path: the hub's names have one '/' at most."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _no_path(name: str) -> str:
    return f"the model folder '{name}' does not exist; {_did_you_mean(name) or 'check the path'}"


@functools.cache
def _not_on_hub(name: str, kind: Kind, folder: str) -> str | None:
    """folder: the working directory, in which the name was looked for."""
    cached = _in_cache(name, kind)
    if constants.is_offline_mode():
        said = None if cached else "the hub is not asked, because HF_HUB_OFFLINE is set (its cache has no copy)"
    else:
        said = _ask(name, kind)
        if said is not None and cached and "has no" not in said:
            os.environ["HF_HUB_OFFLINE"] = "1"  # for the workers
            constants.HF_HUB_OFFLINE = True
            said = None
    if said is None:
        return None
    if kind == "dataset":
        return f"the data set '{name}': {said}; {REMEDY[kind]}"
    return f"there is no folder '{name}' here, and {said}; {_did_you_mean(name) or REMEDY[kind]}"


def _ask(name: str, kind: Kind) -> str | None:
    """None: the hub has it; else what is wrong, in words."""
    answer: list[str | None] = []

    def ask() -> None:
        api = huggingface_hub.HfApi()
        try:
            (api.model_info if kind == "model" else api.dataset_info)(name, timeout=LOOK_UP_S)
            answer.append(None)
        except (RepositoryNotFoundError, HFValidationError):
            what = "model" if kind == "model" else "data set"
            answer.append(f"the hub has no {what} of that name (or it is private: set HF_TOKEN)")
        except OfflineModeIsEnabled:
            answer.append("the hub is not asked, because HF_HUB_OFFLINE is set (its cache has no copy)")
        except HfHubHTTPError as error:
            answer.append(f"the hub answered {error.response.status_code} ({_first_line(error)})")
        except Exception as error:  # fault boundary: whatever the connection raises
            answer.append(f"the hub can't be reached ({_first_line(error)})")

    # In a thread: a look-up of the host's name keeps to no deadline of ours.
    thread = threading.Thread(target=ask, name="look-up on the hub", daemon=True)
    thread.start()
    thread.join(LOOK_UP_S + 2)
    return answer[0] if answer else f"the hub did not answer within {LOOK_UP_S:.0f} s"


def _in_cache(name: str, kind: Kind) -> bool:
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "snapshots"
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets") / name.replace("/", "___")
    try:
        return any(snapshots.glob("*/*")) or (kind == "dataset" and prepared.is_dir())
    except OSError:  # a name that is too long, or a folder of somebody else's
        return False


def _did_you_mean(name: str) -> str | None:
    """The nearest folder beside the place that `name` points to, or the nearest model of the hub's cache."""
    beside = Path(name).expanduser().parent
    try:
        folders = [str(beside / entry.name) for entry in beside.iterdir() if entry.is_dir()]
    except OSError:
        folders = []
    try:
        parts = [entry.name.split("--") for entry in Path(constants.HF_HUB_CACHE).glob("models--*")]
    except OSError:
        parts = []
    near = difflib.get_close_matches(name, [*folders, *("/".join(part[1:]) for part in parts)], 1, cutoff=0.7)
    return f"did you mean '{near[0]}'?" if near else None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]

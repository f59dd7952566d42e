"""Whether a model or a data set that is no folder here is on the hub: asked once, with a deadline of seconds.

The hub's own client tries again for half a minute per file, and a recipe's model is looked at two dozen times before a run. That a
name is there holds for the life of the process; a failure holds for a minute, so that a notebook may try again.
"""

from __future__ import annotations

import difflib
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from rlhf_ray.config.user_paths import expanded
from rlhf_ray.errors import UserError

Kind = Literal["model", "dataset"]
LOOK_UP_S = 8.0
AGAIN_S = 60.0  # before the hub is asked again about a name that it did not have or did not answer about
REST_S = 600.0  # before it is asked again about a name of which there is a copy
REMEDY = {
    "model": "check the name, or give a folder that holds the model",
    "dataset": "check the name, or give a local copy with data.root",
}


def look_up(name: str | Path, kind: Kind = "model", where: str = "") -> None:
    """UserError unless `name` is here, in the hub's cache, or on the hub. where: the key, for the message.

    Where the hub is out of reach and its cache has a copy, this process and its workers use that copy without asking.
    """
    name = str(name)
    if expanded(name).exists():
        return
    problem = _no_path(name) if is_path(name) else _not_on_hub(name, kind)
    if problem is not None:
        raise UserError(f"{where}: {problem}" if where else problem)


def is_path(name: str) -> bool:
    """Whether it can only be a path: the hub's names have one '/' at most."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _no_path(name: str) -> str:
    return f"the model folder '{name}' does not exist; {_did_you_mean(name) or 'check the path'}"


@dataclass(slots=True)
class _Asked:
    """What the hub has said so far. Times are `time.monotonic`."""

    there: set[tuple[str, Kind]] = field(default_factory=set)
    failed: dict[tuple[str, Kind], tuple[float, str]] = field(default_factory=dict)  # when, and what it said
    #: when this process itself turned offline mode on, why, and the value of HF_HUB_OFFLINE before
    out_of_reach: tuple[float, str, str | None] | None = None

    def recent_failure(self, name: str, kind: Kind) -> str | None:
        when, said = self.failed.get((name, kind), (float("-inf"), None))
        return said if time.monotonic() - when < AGAIN_S else None

    def go_offline(self, why: str) -> None:
        self.out_of_reach = time.monotonic(), why, os.environ.get(OFFLINE[0])
        os.environ[OFFLINE[0]] = "1"  # for the workers
        _set_offline_mode(True)

    def go_online(self, *, after_s: float) -> None:
        """Where this process went offline by itself, so long ago."""
        if self.out_of_reach is None or time.monotonic() - self.out_of_reach[0] < after_s:
            return
        before, self.out_of_reach = self.out_of_reach[2], None
        os.environ.pop(OFFLINE[0], None)
        if before is not None:
            os.environ[OFFLINE[0]] = before
        _set_offline_mode(False)


OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # either turns the offline mode of the hub's client on
_ASKED = _Asked()


def _set_offline_mode(value: bool) -> None:
    """Both libraries read their variable once."""
    constants.HF_HUB_OFFLINE = value
    datasets = sys.modules.get("datasets.config")
    if datasets is not None:
        vars(datasets)["HF_HUB_OFFLINE"] = value


def _not_on_hub(name: str, kind: Kind) -> str | None:
    cached = _in_cache(name, kind)
    _ASKED.go_online(after_s=REST_S if cached else AGAIN_S)
    remedy = REMEDY[kind]
    if constants.is_offline_mode():
        said = None if cached else _offline_words()
        if _ASKED.out_of_reach is None:
            remedy = f"unset {_offline_variable()}, or {remedy}"
    elif (name, kind) in _ASKED.there:
        return None
    else:
        said = _ASKED.recent_failure(name, kind) or _ask(name, kind)
        if said is None:
            _ASKED.there.add((name, kind))
        elif cached and "has no" not in said:
            _ASKED.go_offline(said)
            said = None
        elif _ASKED.recent_failure(name, kind) is None:
            _ASKED.failed[name, kind] = time.monotonic(), said
    if said is None:
        return None
    if kind == "dataset":
        return f"the data set '{name}': {said}; {remedy}"
    return f"there is no folder '{name}' here, and {said}; {_did_you_mean(name) or remedy}"


def _offline_words() -> str:
    """Why the hub is not asked about a name that its cache lacks: the user says so, or it did not answer a moment ago."""
    lacks = f"its cache, {constants.HF_HUB_CACHE}, has no copy"
    if _ASKED.out_of_reach is None:
        return f"the hub is not asked, because {_offline_variable()} is set ({lacks})"
    when, why, _ = _ASKED.out_of_reach
    return f"{why}, {time.monotonic() - when:.0f} s ago ({lacks})"


def _offline_variable() -> str:
    return next((name for name in OFFLINE if os.environ.get(name)), OFFLINE[0])


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
            answer.append(_offline_words())
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
    beside = expanded(name).parent
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

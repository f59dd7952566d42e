"""What a run is doing, or how it ended, from its folder alone: on any host that sees it, while it runs and afterwards."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rlhf_ray.config.recipe_file import read_yaml
from rlhf_ray.errors import UserError
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.sealed import MANIFEST
from rlhf_ray.runs.status_file import Written, process_started
from rlhf_ray.runs.storage import read_object

SILENT_S = 30.0  # without a new status.json a run is not taken for alive
SILENT_ELSEWHERE_S = 90.0  # the same for a run on another host: a network file system shows files up to a minute old
DIED = 137  # what a shell makes of a process that was killed
NO_SIGN = 75  # EX_TEMPFAIL: it can't be told from here


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A run as it is now."""

    state: str  # running, silent (no sign of life, and it can't be told why), died, finished, stopped, failed
    exit_code: int | None  # None: it runs; 75: that can't be told from here
    words: str | None  # why it ended, or is taken for dead
    written: Written | None  # None: an earlier version has written no status.json
    done: tuple[str, ...]  # stages
    to_do: tuple[str, ...]
    restarts: dict[str, int]  # role -> how often it was made again, in all that was done in this folder
    last_event: dict[str, Any] | None
    checkpoint: str | None  # the newest whole one of the stage
    checkpoint_age_s: float | None
    silent_s: float | None  # since status.json was written

    @property
    def ended(self) -> bool:
        return self.state not in ("running", "silent")


def read_status(folder: RunFolder) -> Status:
    """UserError where it is no run folder."""
    if not folder.recipe.exists() and not folder.status.exists():
        raise UserError(f"{folder.path} is no run folder (it has no recipe.yaml); name one, for example runs/demo")
    stages = _stages(folder)
    done = tuple(name for name in stages if folder.stage(name).done)
    written = _written(folder.status)
    silent_s = None if written is None else max(time.time() - written.written, 0.0)
    to_do = tuple(name for name in stages if name not in done)
    state, exit_code, words = _state(written, silent_s, to_do)
    events = EventLog(folder.events).read()
    stage = written.stage if written is not None else next(iter(to_do), None)
    checkpoint, age_s = newest_checkpoint(folder, stage, stages)
    return Status(
        state=state, exit_code=exit_code, words=words, written=written, done=done, to_do=to_do,
        restarts=dict(Counter(str(event["role"]) for event in events if "role" in event and not event.get("budget_ended"))),
        last_event=events[-1] if events else None, checkpoint=checkpoint, checkpoint_age_s=age_s, silent_s=silent_s,
    )  # fmt: skip


def _state(written: Written | None, silent_s: float | None, to_do: tuple[str, ...]) -> tuple[str, int | None, str | None]:
    """(state, exit code, words)."""
    if written is None or silent_s is None:
        if to_do:
            return "stopped", 130, "no process of the run has left a status.json"
        return "finished", 0, None
    if written.state != "running":
        return written.state, written.exit_code, written.words
    if written.host == socket.gethostname():
        if process_started(written.process) != written.process_started:
            return "died", DIED, (
                f"its process {written.process} is gone, and has not said why: it was killed (for memory, perhaps), or this host "
                "was restarted; the same command goes on from the last checkpoint"
            )
        if silent_s > SILENT_S:
            words = f"its process {written.process} is there, but has said nothing for {silent_s:.0f} s: is it stopped?"
            return "silent", None, words
    elif silent_s > SILENT_ELSEWHERE_S:
        return "silent", NO_SIGN, (
            f"no sign of life for {silent_s:.0f} s from process {written.process} on {written.host}: look there whether it runs"
        )
    return "running", None, None


def _written(path: Path) -> Written | None:
    if not path.exists():
        return None
    remedy = "the run writes it again"
    found = read_object(path, remedy)
    known = {each.name for each in fields(Written)}
    try:
        return Written(**{name: value for name, value in found.items() if name in known})
    except TypeError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error


def _stages(folder: RunFolder) -> list[str]:
    """Those of the run's recipe, in order. Not from the recipe's type: a reader may not have imported its plugins."""
    sections = read_yaml(str(folder.recipe)) if folder.recipe.exists() else {}
    # A stage with an empty section does not run; one without a section (the data, the evaluation) always does.
    return [name for name in folder.stage_titles if sections.get(name, True) is not None]


def newest_checkpoint(
    folder: RunFolder, stage: str | None, others: Sequence[str] = ()
) -> tuple[str | None, float | None]:
    """(its path in the run folder, its age in seconds) of the stage, else of any of the others."""
    for names in ([] if stage is None else [stage], others):
        found: list[tuple[float, Path]] = []
        for mark in (mark for name in names for mark in _marks(folder.stage(name).path)):
            with suppress(FileNotFoundError):  # a newer one has just taken its place
                found.append((mark.stat().st_mtime, mark.parent))
        if found:
            written, newest = max(found)
            return str(newest.relative_to(folder.path)), max(time.time() - written, 0.0)
    return None, None


def _marks(stage: Path) -> Iterator[Path]:
    for checkpoints in (stage / "checkpoints", *stage.glob("member_*/checkpoints")):
        yield from checkpoints.glob(f"[!.]*/{MANIFEST}")


def as_json(status: Status) -> str:
    """For scripts."""
    return json.dumps(asdict(status), indent=2)

"""Checkpoints of the PPO stage, written beside training.

Between two steps each rank copies its share of the state (that is memory, not disk), and a thread of its process writes and hashes
the copy while the next steps go on. After each step the controller asks whether all ranks are done, without waiting for them, and
only then makes the checkpoint appear. A process that dies in between costs that checkpoint; the one before it is still the last.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from rlhf_ray.config import Recipe
from rlhf_ray.errors import RunFailed, StageStopped
from rlhf_ray.ppo import checkpoint
from rlhf_ray.ppo.loop import LoopState
from rlhf_ray.runs.disk import no_room
from rlhf_ray.runs.elsewhere import take_in
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.sealed import new_folder

Progress = Callable[[dict], None]
BYTES_PER_WEIGHT_BYTE = 3  # a weight and Adam's two moments, all float32


class Ranks(Protocol):
    """Those of a DeepSpeed group (`groups.TrainerGroup`)."""

    weight_bytes: int

    def call(self, method: str, *args: Any) -> list[Any]: ...


class Checkpoints:
    """Those of a run's PPO stage."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        groups: Sequence[Ranks],
        get: Callable[[list[Any], str], list[Any]],
        progress: Progress,
    ):
        """get: the values of handles (`Waiter.get`)."""
        self.folder, self.groups, self.get, self.progress = folder, groups, get, progress
        self.keep, self.path = recipe.ppo.keep_checkpoints, folder.stage("ppo").checkpoints
        self.events = EventLog(folder.events)
        self._pending: LoopState | None = None
        self._fetching: Future[str | None] | None = None  # shares of ranks on other hosts, for the pending one
        self._fetcher = ThreadPoolExecutor(1, "shares")
        self._abandoned = False  # ranks that live may still write one that was given up
        self._without_room = False  # and it was told

    def save(self, state: LoopState) -> bool:
        """Have the ranks copy their state, and go on. False where there is no room: the caller comes again.

        One that is still being written is waited for, so at most one copy of the state is held.
        """
        self.finish()
        if self._abandoned:
            self.get(self._all("saved", True), "writing a checkpoint that was given up")
            self._abandoned = False
        temporary = checkpoint.temporary_folder(self.path, state.step)
        try:
            new_folder(temporary)
            problem = no_room(temporary, BYTES_PER_WEIGHT_BYTE * sum(group.weight_bytes for group in self.groups))
        except OSError as error:
            problem = str(error)
        if problem is not None:
            self._tell_of_none(state.step, problem)
            return False
        if self._without_room:
            self._without_room = False
            self._tell(f"there is room again: the checkpoint of step {state.step} is written", "ppo goes on", state.step)
        self.get(self._all("save", temporary), f"copying the state for the checkpoint of step {state.step}")
        self._pending = state
        return True

    def look(self) -> None:
        """Make the pending one appear if it is whole. To be called after each step."""
        self._take(wait=False)

    def finish(self) -> None:
        """Wait until the pending one is on disk."""
        self._take(wait=True)

    def abandon(self) -> None:
        """Some of the ranks that were writing it are gone."""
        self._abandoned = self._abandoned or self._pending is not None
        self._pending = self._fetching = None

    def stopped(self, state: LoopState, total: int) -> StageStopped:
        """What a stage that was asked to stop ends with. It says what the same command will go on from."""
        saved = [int(path.name.rpartition("_")[2]) for path in checkpoint.complete(self.path)]
        words = f"ppo stopped after step {state.step} of {total}; "
        if state.step in saved:
            return StageStopped(words + "its checkpoint is written")
        since = f"step {saved[-1]}" if saved else "the start"
        return StageStopped(words + f"no checkpoint could be written since {since}, see events.jsonl")

    def _take(self, *, wait: bool) -> None:
        state = self._pending
        if state is None:
            return
        answers = self.get(self._all("saved", wait), f"writing the checkpoint of step {state.step}")
        if any(answer is None for answer in answers):
            return
        problem = next((answer for answer in answers if isinstance(answer, str)), None)
        digests = {name: digest for answer in answers if isinstance(answer, dict) for name, digest in answer.items()}
        if problem is None:
            files = [checkpoint.temporary_folder(self.path, state.step) / name for name in digests]
            missing = [file for file in files if not file.exists()]
            if missing and self._fetching is None:  # on the disks of other hosts
                self._fetching = self._fetcher.submit(self._fetch, missing)
            if self._fetching is not None:
                if not wait and not self._fetching.done():
                    return
                problem = self._fetching.result()
        self._pending = self._fetching = None
        try:
            if problem is None:
                checkpoint.publish(self.path, state.step, state.to_json(), self.keep, digests)
        except OSError as error:  # the disk is full all the same
            problem = str(error)
        if problem is None:
            publish_best(self.folder, state)
        else:
            self._tell_of_none(state.step, problem)

    def _fetch(self, shares: list[Path]) -> str | None:
        """In a thread -> what went wrong, if anything did."""
        try:
            take_in(self.folder, *shares)
        except (RunFailed, OSError) as error:
            return str(error)
        return None

    def _tell_of_none(self, step: int, problem: str) -> None:
        """Once, until there is room again."""
        shutil.rmtree(checkpoint.temporary_folder(self.path, step), ignore_errors=True)
        saved = checkpoint.complete(self.path)
        last = f"{saved[-1].name} is the last good one" if saved else "there is none yet"
        if not self._without_room:
            done = f"ppo goes on; {last}; tried again after each step"
            self._tell(f"no checkpoint of step {step} is written: {problem}", done, step)
        self._without_room = True

    def _tell(self, what: str, done: str, step: int) -> None:
        try:
            self.events.add(what, done, stage="ppo", step=step)
        except OSError:  # a full disk has no room for the event either; the terminal has
            done += "; events.jsonl can't be written either"
        self.progress({"stage": "ppo", "say": f"{what}; {done}", "warns": True})

    def _all(self, method: str, *args: Any) -> list[Any]:
        return [handle for group in self.groups for handle in group.call(method, *args)]


def publish_best(folder: RunFolder, state: LoopState, *, only: bool = False) -> None:
    """The best policy that the checkpoint of this state knows becomes ppo/best; earlier candidates go. only: later ones too.

    It waits for the checkpoint, because a run that goes on from an older one, with another recipe perhaps, must not find the
    best policy of steps that it never took.
    """
    chosen = folder.candidate(state.best_step)
    if chosen.exists():
        shutil.rmtree(folder.best_model, ignore_errors=True)
        chosen.rename(folder.best_model)
    for other in folder.stage("ppo").path.glob(".best_*"):
        if only or int(other.name.rpartition("_")[2]) <= state.step:
            shutil.rmtree(other)

"""Ray Train as supervised stages use it: without what they don't need, and with a record of what failed."""

from __future__ import annotations

from contextlib import suppress

from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.callback import UserCallback

from rlhf_ray.actors.low_memory import ended_by_guard
from rlhf_ray.actors.ray_private import meeting_backend, unused_callbacks
from rlhf_ray.errors import UserError, whole_message
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.checkpoints import newest_complete
from rlhf_ray.training.distributed import meet


class StageTorchTrainer(TorchTrainer):
    """TorchTrainer without two actors that a stage does not need; each is a process of 0.2 GB that takes seconds to start.

    One distributes Ray Data sets; our rows are files of the run folder. The other removes the placement group of a
    controller that died, but the group ends with its controller anyway. It looks for the controller through the state
    API, which chooses a cluster by itself: where there are two it asks the wrong one, and removes our group under the worker.
    """

    def _create_default_callbacks(self):  # ray_private.DEFAULT_CALLBACKS
        unused = unused_callbacks()
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]


class MeetingConfig(TorchConfig):
    """Of a group of CPU or GPU ranks; `backend` is given. They meet at a store that listens on rank 0's address alone
    (`training.distributed`)."""

    @property
    def backend_cls(self):
        return meeting_backend(meet)


class RecordFailures(UserCallback):
    """Writes each failure of the worker group to events.jsonl. Runs in Ray Train's controller process."""

    def __init__(self, folder: RunFolder, stage: str, member: int, restarts: int):
        self.folder, self.stage, self.member, self.restarts, self.failures = folder, stage, member, restarts, 0

    def after_exception(self, run_context, worker_exceptions):
        self.failures += 1
        done = f"worker group restarted from the newest checkpoint (restart {self.failures} of {self.restarts})"
        restarted = {"role": self.stage}  # of what is made again; `rlhf-ray status` counts these
        if self.failures > self.restarts:
            restarted = {}
            done = f"the stage failed: that was failure {self.failures}, and {self.restarts} restarts are allowed"
        step, steps_lost, seconds = self._lost()
        for place, error in worker_exceptions.items():
            seen = ended_by_guard(error) or whole_message(error)
            EventLog(self.folder.events).add(
                f"{self.stage} worker {place} failed: {seen}", done, seconds, stage=self.stage, step=step,
                phase="training", seen=seen, steps_lost=steps_lost, **restarted,
            )  # fmt: skip

    def _lost(self) -> tuple[int, int, float]:
        """(last step, steps since the newest checkpoint, training seconds since then)."""
        target = self.folder.stage(self.stage).member(self.member)
        rows = read_metrics(target.metrics)
        step, elapsed_s = (rows[-1]["step"], rows[-1]["elapsed_s"]) if rows else (0, 0.0)
        found = None
        with suppress(UserError):  # of a damaged one the worker tells
            found = newest_complete(target.checkpoints)
        kept_step, kept_s = (found[1].step, found[1].elapsed_s) if found is not None else (0, 0.0)
        return step, max(step - kept_step, 0), max(elapsed_s - kept_s, 0.0)

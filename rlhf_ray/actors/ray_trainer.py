"""Ray Train as supervised stages use it: without what they don't need, and with a record of what failed."""

from __future__ import annotations

from pathlib import Path

from ray.train.torch import TorchTrainer
from ray.train.v2.api.callback import UserCallback

from rlhf_ray.actors.ray_private import unused_callbacks
from rlhf_ray.errors import whole_message
from rlhf_ray.runs.events import EventLog


class StageTorchTrainer(TorchTrainer):
    """TorchTrainer without two actors that a stage does not need; each is a process of 0.2 GB that takes seconds to start.

    One distributes Ray Data sets; our rows are files of the run folder. The other removes the placement group of a
    controller that died, but the group ends with its controller anyway. It looks for the controller through the state
    API, which chooses a cluster by itself: where there are two it asks the wrong one, and removes our group under the worker.
    """

    def _create_default_callbacks(self):  # ray_private.DEFAULT_CALLBACKS
        unused = unused_callbacks()
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]


class RecordFailures(UserCallback):
    """Writes each failure of the worker group to events.jsonl. Runs in Ray Train's controller process."""

    def __init__(self, events: Path, stage: str, restarts: int):
        self.events, self.stage, self.restarts, self.failures = events, stage, restarts, 0

    def after_exception(self, run_context, worker_exceptions):
        self.failures += 1
        done = f"worker group restarted from the newest checkpoint (restart {self.failures} of {self.restarts})"
        if self.failures > self.restarts:
            done = f"the stage failed: that was failure {self.failures}, and {self.restarts} restarts are allowed"
        for place, error in worker_exceptions.items():
            EventLog(self.events).add(
                f"{self.stage} worker {place} failed: {whole_message(error)}", done, stage=self.stage
            )

"""The processes of a supervised stage's workers, which Ray Train starts: which they are, and whether one is hung.

Ray Train sees a worker that dies, and makes the group again. A worker that is stopped, or that does nothing for far longer than its
steps took, is ended here, and is then one that died.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rlhf_ray.actors.hung import SHORTEST_LIMIT_S, TIMES_AS_LONG, AwakeClock, Silence
from rlhf_ray.actors.pulse import ActorProcess, Pulse, end, pulse, this_process
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.storage import write_atomically


def note_process(folder: Path, rank: int) -> None:
    """This process is the worker of this rank."""
    mine = this_process()
    write_atomically(folder / f"{rank}.json", json.dumps(asdict(mine)))


class WorkerWatch:
    """Watches the workers of one stage, from one step to the next."""

    def __init__(
        self,
        folder: Path,
        stage: str,
        events: EventLog,
        time: Callable[[], float] = time.monotonic,
        look: Callable[[ActorProcess], Pulse | None] = pulse,
        end: Callable[[ActorProcess], None] = end,
    ):
        """folder: where the workers note their processes."""
        self.folder, self.stage, self.events = folder, stage, events
        self.clock, self._pulse, self._end = AwakeClock(time), look, end
        self.longest_s: float | None = None  # of a step
        self._silence = Silence.from_now(0.0)

    def look(self, step: int | None, went_on: bool, deadline_s: float) -> float:
        """End a worker that is hung -> seconds since the last step. went_on: whether there is a new step since the last look."""
        now = self.clock.tick()
        seconds = now - self._silence.since
        if went_on:
            self.longest_s = seconds if self.longest_s is None else max(self.longest_s, seconds)
            self._silence = Silence.from_now(now)
            return 0.0
        limit_s = deadline_s if self.longest_s is None else max(SHORTEST_LIMIT_S, TIMES_AS_LONG * self.longest_s)
        found = self._silence.look(self._processes(), now, min(limit_s, deadline_s), self._pulse)
        if found is not None:
            worker, how = found
            self._end(self._processes()[worker])
            what = f"{self.stage} worker {worker} was hung"
            self.events.add(what, "its process was ended", seconds, stage=self.stage, step=step, seen=f"it {how}")
            self.longest_s = 2 * limit_s / TIMES_AS_LONG  # it may have waited for good reason: more patience from now on
            self._silence = Silence.from_now(now)
        return seconds

    def _processes(self) -> dict[str, ActorProcess]:
        return {path.stem: ActorProcess(**json.loads(path.read_text())) for path in sorted(self.folder.glob("*.json"))}

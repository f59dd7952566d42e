"""How fast a stage goes and when it will end, from the steps that it has finished. Between two steps nothing of it changes but
the time left, which counts down."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Pace:
    """Of one stage in one process. Times are seconds of any one clock."""

    first: tuple[int, float] | None = None  # the first step that was heard of, and when it ended
    last: tuple[int, float] | None = None
    heard: float = 0.0  # when the last one was heard of, by the caller's clock

    def step(self, number: int, now: float, at: float | None = None) -> None:
        """Step `number` has ended: at `at` by a clock of the stage's own, which a stage that goes on from a checkpoint counts on
        with; None: now."""
        when = now if at is None else at
        if self.last is not None and number == self.last[0]:
            return
        if self.first is None or self.last is None or number < self.last[0] or when < self.last[1]:
            self.first = (number, when)  # also of workers that went back to a checkpoint
        self.last, self.heard = (number, when), now

    @property
    def seconds_per_step(self) -> float | None:
        """None before two steps have ended."""
        if self.first is None or self.last is None or self.last[0] == self.first[0]:
            return None
        return max(self.last[1] - self.first[1], 0.0) / (self.last[0] - self.first[0])

    def left(self, total: int, now: float, limit_s: float | None = None) -> float | None:
        """Seconds to the last of `total` steps, and no more than to the time limit, `limit_s` after the last step."""
        per_step = self.seconds_per_step
        if self.last is None or per_step is None:
            return None
        since = max(now - self.heard, 0.0)
        # The step that runs is no nearer to its end than its predecessors say, however long it takes.
        by_steps = per_step * (total - self.last[0]) - min(since, per_step)
        return max(by_steps if limit_s is None else min(by_steps, limit_s - since), 0.0)

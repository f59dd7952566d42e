"""Generation up to k steps ahead of training: what is asked for when, and the step that trains on it. No Ray (see `step`).

    step s         generators: ... | draw step s + k | take version s + 1 | draw step s + k + 1 | ...
                   trainers:   log-probs and update of step s: version s + 1 | step s + 1 | ...

Step s is asked for when step s - k begins, that is behind the sync of version s - k, and an actor does what it is asked in
order. So its samples are of version s - k or of a later one, and k versions old at most when they are trained on.
"""

from __future__ import annotations

from collections.abc import Callable

from rlhf_ray.messages import Chunk
from rlhf_ray.ppo.step import Handle, PhaseTimer, Roles, StepConfig, send_weights, train_on


class Ahead:
    """What was asked of the generators and not trained on yet. None of it is state: prompts follow from the step."""

    def __init__(
        self,
        roles: Roles,
        chunks: Callable[[int], list[Chunk]],
        *,
        steps_ahead: int,
        steps: int,
        in_flight: bool,
    ):
        """chunks: of a step. steps: of the run, none is drawn beyond them. in_flight: generators take weights between chunks,
        so that a sync does not wait for what they were asked before it."""
        self.roles, self.chunks = roles, chunks
        self.steps_ahead, self.steps, self.in_flight = steps_ahead, steps, in_flight
        self._asked: dict[int, tuple[list[Handle], list[Handle]]] = {}  # step -> rollouts, scores
        self._syncs: dict[int, list[Handle]] = {}  # version -> load_weights that nobody has waited for yet

    def fill(self, step: int) -> None:
        """Ask for `step` and those that it allows ahead of it, unless they have been asked for.

        They are scored where they are drawn, ahead too. Log-probs under the policy have to wait for its update; so does the
        reference, for it may be the policy with its adapter off, whose next update must not queue behind samples to come.
        """
        for later in range(step, min(step + self.steps_ahead + 1, self.steps)):
            if later not in self._asked:
                rollouts = self.roles.generation.generate(self.chunks(later))
                self._asked[later] = rollouts, self.roles.reward.score(rollouts)

    def step(self, config: StepConfig) -> dict[str, float]:
        """One PPO iteration on what was drawn for it. Returns its metrics."""
        clock = PhaseTimer()
        self.fill(config.step)
        rollouts, scores = self._asked.pop(config.step)
        self.settle(config.step - self.steps_ahead)
        metrics = train_on(self.roles, rollouts, scores, config, clock)
        self._sync(config.step + 1)
        clock.lap("sync")
        return metrics | clock.laps

    def settle(self, version: int) -> None:
        """Wait until the generators have taken the weights of every version up to this one: what they were asked for after
        that waits for it too."""
        for sent in sorted(each for each in self._syncs if each <= version):
            self.roles.wait(self._syncs.pop(sent), f"weight sync (version {sent})")

    def _sync(self, version: int) -> None:
        """Send the weights. Only generators that take them between chunks answer before all that they were asked is drawn."""
        self._syncs[version] = send_weights(self.roles, version)
        if self.in_flight:
            self.settle(version)

"""The evaluation in an actor of its own: the controller holds no models. One that dies or hangs is made again, and goes on at the
chunk where it stopped (`rlhf_ray.evaluation.kept`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import ray
from ray.exceptions import RayTaskError

from rlhf_ray.actors.budgets import Budget, Failure, in_short, tells_of_end
from rlhf_ray.actors.calls import Call, Member
from rlhf_ray.actors.hung import Deadline, Hung
from rlhf_ray.actors.wait import START_REMEDY, ActorDied, Waiter
from rlhf_ray.config import Recipe
from rlhf_ray.runs.elsewhere import take_in
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder


def evaluate_in_an_actor(recipe: Recipe, folder: RunFolder, progress: Callable[[dict], None]) -> None:
    """Until the evaluation is done. Raises what its own code raised; RunFailed where its actor was lost too often."""
    from rlhf_ray.actors.role_actors import EvaluationActor  # seconds of imports

    def on_wait(name: str, seconds: float, what: str) -> None:
        progress({"stage": "evaluation", "waiting_for": name, "waiting_s": seconds, "phase": what})

    resources = recipe.resources
    waiter = Waiter(resources.call_timeout_s, "raise resources.call_timeout_s", on_wait)
    config = resources.generation
    cpus = min(float(config.threads or 1), ray.cluster_resources().get("CPU", 1.0))
    options = EvaluationActor.options(num_cpus=cpus, num_gpus=config.gpus)
    member = Member("evaluation", 0, partial(options.remote, "evaluation-0", recipe, folder, config))
    budget = Budget(resources.restarts, tells_of_end(EventLog(folder.events), progress, "evaluation"))
    recovery = _Recovery(member, waiter, folder, budget, resources.start_timeout_s, progress)
    waiter.mend = recovery.mend
    try:
        recovery.start()
        waiter.get(member.call("evaluate", name="the evaluation"), "evaluation")
        take_in(folder, folder.stage("evaluation").path)
    finally:
        ray.kill(member.actor)


class _Recovery:
    """`Waiter.mend` of one actor, which keeps what it has done on disk."""

    def __init__(
        self,
        member: Member,
        waiter: Waiter,
        folder: RunFolder,
        budget: Budget,
        start_timeout_s: float,
        progress: Callable[[dict], None],
    ):
        self.member, self.waiter, self.folder, self.budget = member, waiter, folder, budget
        self.start_timeout_s, self.progress = start_timeout_s, progress
        self.parts = 0  # that were done when the actor was last lost

    def start(self) -> None:
        """Until the actor is ready; made again where it dies or hangs before."""
        while True:
            ready = self.waiter.track(self.member.actor.ready.remote(), f"{self.member.name} (start)")
            try:
                (self.member.process,) = self.waiter.get([ready], "evaluation", self.start_timeout_s, START_REMEDY)
                return
            except (ActorDied, Deadline) as failure:
                self.budget.charge_start(failure, f"start of {self.member.name}")
                self.member.make_again()

    def mend(self, call: Call, failure: Failure, phase: str) -> None:
        if not isinstance(failure, (ActorDied, Hung, RayTaskError)):
            raise failure
        seen, parts = time.monotonic(), len(list(self.folder.evaluation_parts.glob("*.npz")))
        if parts > self.parts:
            self.budget.start_over()
        self.parts = parts
        # What it does is many chunks, so a death says nothing of any; an error of its own code will come again.
        to_blame = call if isinstance(failure, RayTaskError) else None
        self.budget.charge(self.member, failure, f"after {parts} parts, {phase}", to_blame)
        self.member.make_again()
        self.start()
        call.send()
        done, told = f"made again, goes on after {parts} parts that are kept", in_short(failure)
        EventLog(self.folder.events).add(
            f"{self.member.name} was lost", done, time.monotonic() - seen, stage="evaluation", role="evaluation", step=parts,
            phase=phase, seen=told, steps_lost=0,
        )  # fmt: skip
        words = f"{self.member.name} was lost after {parts} parts: {told}; {done}"
        self.progress({"stage": "evaluation", "say": words, "warns": True})

"""What generating ahead saves, without a model:   python results/overlap/sleeping.py [--steps 12] [--seconds 0.8] [--json]

The real loop over real Ray actors on two "hosts" (custom resources); generators and trainers sleep as long as their phase
would take. For each pair of phases: seconds per step, and the wall time of all steps, the first generation that nothing hides
among them, over steps * max(generate, train). That is sum / max where phases alternate, and near 1 where the longer hides the
shorter. Beside it the mean age of the samples.
"""

import argparse
import json
import time
from collections import deque

import numpy as np
import ray

from rlhf_ray.actors.calls import members
from rlhf_ray.actors.groups import (
    ExperienceHandle,
    GenerationGroup,
    PolicyGroup,
    RayRoles,
    ReferenceGroup,
    RewardGroup,
)
from rlhf_ray.actors.role_actors import IN_FLIGHT
from rlhf_ray.actors.session import worker_environment
from rlhf_ray.actors.wait import CallReceipt, Waiter
from rlhf_ray.config import PPOConfig
from rlhf_ray.messages import Scores
from rlhf_ray.ppo.loop import LoopHooks, LoopState, PPOLoop

CHUNKS = 4  # of a step
GROUPS = {"reward": RewardGroup, "reference": ReferenceGroup, "policy": PolicyGroup}
MODES = {"alternating": {}, "1 ahead": {"steps_ahead": 1}, "2 ahead": {"steps_ahead": 2},
         "1 ahead, in flight": {"steps_ahead": 1, "weights_in_flight": True}}  # fmt: skip


class Sleeper:
    """Every role's verbs. What it returns says only which weights drew it."""

    def begin(self, seconds):
        self.seconds, self.version, self.posted = seconds, 0, deque(maxlen=1)

    def generate(self, chunk):
        if self.posted:
            self.version = self.posted.popleft()
        version = self.version
        time.sleep(0 if chunk.evaluation else self.seconds / CHUNKS)
        return (chunk.step, version), CallReceipt(self.seconds, 0)

    def load_weights(self, version, *parts):
        self.version = version

    def update_weights_in_flight(self, version, *parts):
        self.posted.append(version)

    def score(self, rollout):
        return Scores(total=np.ones(2, np.float32)), CallReceipt(0.0, 0)

    def texts(self, rollout, count):
        return [("prompt", "response")]

    def logprobs(self, rollout):
        time.sleep(0.1 * self.seconds / CHUNKS)
        return rollout, CallReceipt(0.0, 0)

    def assemble(self, chunks, kl_coef, *parts):
        ages = [step - version for step, version in parts[:chunks]]
        stats = {"objective/kl": 0.0, "policy/mismatch_max": 0.0, "rollout/importance_mean": 1.0,
                 "rollout/age_max": float(max(ages)), "rollout/age_mean": float(np.mean(ages))}  # fmt: skip
        return stats, "shard", CallReceipt(0.0, 0)

    def own_mismatch(self, *parts):
        return {"policy/mismatch_max": 0.0}

    def evaluate(self, *parts):
        return {"eval/score": 0.0}

    def update(self, shard, *rates):
        time.sleep(0.9 * self.seconds)
        return {"policy/loss": 0.0}, CallReceipt(0.0, 0)

    def weights(self, parts):
        return "weights", CallReceipt(0.0, 0)


def start_actors() -> dict:
    plain, in_flight = ray.remote(Sleeper), ray.remote(concurrency_groups={IN_FLIGHT: 1})(Sleeper)
    here, there = ({"num_cpus": 0, "resources": {host: 0.1}} for host in ("host_of_generators", "host_of_trainers"))
    trainers = {name: plain.options(**there).remote() for name in ("reward", "reference", "policy", "experience")}
    return trainers | {"generation": plain.options(**here).remote(), "in flight": in_flight.options(**here).remote()}


def seconds_of(actors: dict, mode: dict, *, generate: float, train: float, steps: int) -> tuple[float, float]:
    """(wall time of all steps, mean age of their samples)."""
    in_flight = mode.get("weights_in_flight", False)
    generator = actors["in flight" if in_flight else "generation"]
    waiter = Waiter(60, "look at what else runs on this machine")
    waiter.wait([
        waiter.track(actor.begin.remote(generate if actor is generator else train), f"{name} (begin)")
        for name, actor in actors.items()
    ], "start")  # fmt: skip
    roles = RayRoles(
        GenerationGroup(members("generation", [generator]), in_flight),
        *(group(members(role, [actors[role]])) for role, group in GROUPS.items()),
        None, ExperienceHandle(*members("experience", [actors["experience"]]), 1, 0, 1), waiter,
    )  # fmt: skip
    records = []
    hooks = LoopHooks(
        record=lambda step, metrics: records.append(metrics),
        samples=lambda *told: None, save=lambda state: None, save_best=lambda state: None,
    )  # fmt: skip
    config = PPOConfig(
        steps=steps, rollout_batch_size=2 * CHUNKS, minibatch_size=8, microbatch_size=8, eval_every=steps, eval_prompts=1,
        advantage="reinforce_pp", **mode,
    )  # fmt: skip
    started = time.perf_counter()
    PPOLoop(
        roles, config, hooks, LoopState(kl_coef=0.0), prompts=64, eval_prompts=1, chunk_size=2, seed=0
    ).run()  # fmt: skip
    wall = time.perf_counter() - started
    return wall, float(np.mean([metrics["rollout/age_mean"] for metrics in records[1:]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.8, help="of the shorter phase")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=128 * 1024**2,
        resources={"host_of_generators": 1, "host_of_trainers": 1}, logging_level="ERROR",
        runtime_env={"env_vars": worker_environment()},
    )  # fmt: skip
    actors, rows = start_actors(), []
    for generate, train in ((1, 1), (2, 1), (1, 2)):
        for name, mode in MODES.items():
            phases = {"generate": generate * given.seconds, "train": train * given.seconds}
            wall, age = seconds_of(actors, mode, **phases, steps=given.steps)
            rows.append({"mode": name, **phases, "step_s": wall / given.steps, "age": age,
                         "over_max": wall / given.steps / max(phases.values())})  # fmt: skip
            if not given.json:
                print(
                    f"generate {phases['generate']:.1f} s, train {phases['train']:.1f} s, {name:19}"
                    f"{rows[-1]['step_s']:6.2f} s a step, {rows[-1]['over_max']:.2f} x max, age {age:.2f}",
                    flush=True,
                )
    if given.json:
        print(json.dumps(rows))
    ray.shutdown()


if __name__ == "__main__":
    main()

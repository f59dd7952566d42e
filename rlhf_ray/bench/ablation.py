"""What each part of `cpu` brings: whole PPO iterations and generation, with it and without it, in turns.

    python -m rlhf_ray.bench.ablation [--size 14m] [--prompts 16] [--repeats 3] [--precision auto] [--generation] NAME ...

NAME: what to leave out, as in RLHF_RAY_CPU: parts separated by commas, or off. --generation: responses alone.
All roles are in this process, on one thread, so its CPU time is the work: other load on the machine lengthens wall time, but
hardly CPU time. Prints one line per NAME: the seconds with it, and how many times as long it takes without: median (least to most).
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from rlhf_ray.bench.flops import Work, shape_of
from rlhf_ray.bench.random_run import bench_recipe, write_random_run
from rlhf_ray.config import Recipe
from rlhf_ray.data.role_files import read_prompts
from rlhf_ray.generation.acceleration import hindrance
from rlhf_ray.models.critic import build_critic
from rlhf_ray.models.load import disable_dropout, fast_attention, load_causal_lm
from rlhf_ray.models.wire import pack_weights
from rlhf_ray.ppo.step import Roles, StepConfig, cut_chunks, ppo_step, sync_weights
from rlhf_ray.rewards.from_recipe import reward_scorer
from rlhf_ray.roles.configs import experience_config, policy_loss_config
from rlhf_ray.roles.critic_trainer import CriticTrainer
from rlhf_ray.roles.experience_maker import ExperienceMaker
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.policy_trainer import PolicyTrainer
from rlhf_ray.roles.reference_policy import Reference
from rlhf_ray.roles.reward import Reward
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.training.deepspeed_engine import DeepSpeedEngine, OptimiserConfig
from rlhf_ray.training.distributed import join_group
from rlhf_ray.training.forward import LogprobModel, ValueModel
from rlhf_ray.training.precision import resolve_precision


class Iterations:
    """The roles of PPO in this process, and `run`, one iteration; `generate`, its responses alone. -> seconds of CPU time."""

    def __init__(self, recipe: Recipe, folder: RunFolder, dtype: torch.dtype, *, trains: bool):
        ppo, start, reward = recipe.ppo, folder.stage("sft").model, folder.stage("reward").model
        self.rows, self.step, self.generation_s = ppo.rollout_batch_size, 0, 0.0
        self.generator = Generator(
            start, read_prompts(folder), [], sampling=recipe.generation.sampling, seed=recipe.ppo_seed, dtype=dtype, rows=self.rows
        )
        if not trains:
            return
        scorer = Reward(reward_scorer(recipe, folder, dtype, "cpu"), start, stop=recipe.generation.stop)
        reference = Reference(start, temperature=1.0, compute_dtype=dtype, **ppo.microbatches)
        experience = ExperienceMaker(experience_config(recipe))
        settings = OptimiserConfig(adam_eps=ppo.adam_eps, max_grad_norm=ppo.max_grad_norm, zero_stage=0)
        model = fast_attention(load_causal_lm(start), "cpu")
        disable_dropout(model)
        module = LogprobModel(model, temperature=1.0, compute_dtype=dtype)
        policy = PolicyTrainer(
            DeepSpeedEngine(module, settings, device=torch.device("cpu")), **ppo.microbatches,
            reuse_forward=ppo.reuse_forward, config=policy_loss_config(recipe),
        )  # fmt: skip
        backbone = build_critic(reward, "reward")
        fast_attention(backbone.backbone, "cpu")
        module = ValueModel(backbone, compute_dtype=dtype)
        critic = CriticTrainer(
            DeepSpeedEngine(module, settings, device=torch.device("cpu")), **ppo.microbatches,
            reuse_forward=ppo.reuse_forward, value_clip_range=ppo.value_clip_range, vf_coef=ppo.vf_coef,
        )  # fmt: skip

        def each(function: Callable) -> Callable:
            return lambda parts, *rest: [function(part, *rest) for part in parts]

        roles = SimpleNamespace(
            generation=SimpleNamespace(generate=each(self._draw), load_weights=self._load_weights),
            reward=SimpleNamespace(score=each(scorer.score)),
            reference=SimpleNamespace(logprobs=each(reference.logprobs)),
            policy=SimpleNamespace(logprobs=each(policy.logprobs), update=each(policy.update),
                                   weights=lambda: pack_weights(policy.weights(), 2, torch.float32)),
            critic=SimpleNamespace(values=each(critic.values), update=each(critic.update)),
            experience=experience,
            wait=lambda handles, what: None,
            get=lambda handles, what: list(handles),
        )  # fmt: skip
        self.roles = cast(Roles, roles)  # only the methods that an iteration calls
        sync_weights(self.roles, 0)

    def _load_weights(self, weights, policy_version: int) -> list:
        named = {name: array for part in weights for name, array in part.items()}
        return [self.generator.load_weights(named, policy_version)]

    def _draw(self, chunk):
        started = time.process_time()
        rollout = self.generator.generate(chunk)
        self.generation_s = time.process_time() - started
        return rollout

    def generate(self) -> tuple[float, float]:
        self._draw(cut_chunks(0, range(self.rows), 1, self.rows)[0])
        return self.generation_s, self.generation_s

    def run(self) -> tuple[float, float]:
        """-> (of the iteration, of its generation)"""
        chunks = cut_chunks(self.step, range(self.rows), 1, self.rows)
        config = StepConfig(step=self.step, kl_coef=0.05, learning_rate=1e-5, critic_learning_rate=1e-5,
                            max_mismatch=100.0, max_mismatch_kl=100.0, max_first_approx_kl=1.0)  # fmt: skip
        started = time.process_time()
        ppo_step(self.roles, chunks, config)
        self.step += 1
        return time.process_time() - started, self.generation_s


def ablate(build: Callable[[], Callable[[], tuple[float, float]]], names: list[str], repeats: int) -> None:
    """build: -> what to time; it reads RLHF_RAY_CPU."""

    def built(left_out: str) -> Callable[[], tuple[float, float]]:
        os.environ["RLHF_RAY_CPU"] = left_out
        run = build()
        run()
        return run

    whole = built("on")
    for name in names:
        part = built(name)
        pairs = []
        for number in range(repeats):
            order = (whole, part) if number % 2 == 0 else (part, whole)
            times = {run: run() for run in order}
            pairs.append((times[whole], times[part]))
        said = []
        for place, what in enumerate(("iteration", "generation")):
            ratios = [without[place] / whole_[place] for whole_, without in pairs]
            seconds = statistics.median(whole_[place] for whole_, _ in pairs)
            said.append(f"{what} {seconds:6.2f} s, x {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        print(f"without {name:30} {'   '.join(said)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each part of cpu/ brings, with it and without it, in turns.")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--size", default="14m")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--generation", action="store_true")
    given = parser.parse_args()
    for name in given.names:
        os.environ["RLHF_RAY_CPU"] = name
        try:
            hindrance()
        except ValueError as error:
            parser.error(str(error))
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join_group(rank=0, world_size=1, address="127.0.0.1", port=port, device_type="cpu", timeout_s=60)
    work = Work(rows=given.prompts, prompt=32, response=48, epochs=4)
    shape = shape_of(given.size, layers=None, width=None, heads=None, vocabulary=None)
    recipe = bench_recipe(shape, work, microbatch=min(32, given.prompts), precision=given.precision, resources={})
    dtype = resolve_precision(given.precision, "cpu")
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_bench_") as path:
        folder = RunFolder(Path(path))
        write_random_run(recipe, folder, prompts=given.prompts, length=work.prompt)

        def build() -> Callable[[], tuple[float, float]]:
            roles = Iterations(recipe, folder, dtype, trains=not given.generation)
            return roles.generate if given.generation else roles.run

        print(f"{given.size}, {given.prompts} prompts, {dtype}, {torch.backends.cpu.get_cpu_capability()}, one thread")
        ablate(build, given.names, given.repeats)


if __name__ == "__main__":
    main()

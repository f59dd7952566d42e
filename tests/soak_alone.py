"""An undisturbed run of the soak in one process and without Ray: the same role classes, called one after the other.

    python tests/soak_alone.py RUN_DIR      the last checkpoint of that run against as many steps of this one

RUN_DIR: what `soak` has left (--keep). A Ray of its own would take ten times the CPU, and prove less.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest  # noqa: F401 - sets the environment before torch is imported

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

import soak
import torch
from tiny import tiny_recipe, write_start

from rlhf_ray.actors import role_actors, trainer_actors
from rlhf_ray.config import Recipe
from rlhf_ray.data.role_files import count_rows
from rlhf_ray.ppo.checkpoint import last_good, read_state
from rlhf_ray.ppo.loop import LoopHooks, LoopState, PPOLoop
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.training import distributed


class Roles:
    """`ppo.step.Roles` over the actors' own classes. A handle is the value itself; receipts are dropped."""

    def __init__(self, recipe: Recipe, folder: RunFolder):
        start, resources = folder.stage("sft").model, recipe.resources

        def make(actor: Any, role: str, settings: Any, *args: Any) -> Any:
            return actor.__ray_metadata__.modified_class(f"{role}-0", recipe, folder, settings, *args)

        self.generator = make(role_actors.GenerationActor, "generation", resources.generation, str(start))
        self.scorer = make(role_actors.RewardActor, "reward", resources.reward, str(start))
        self.referee = make(role_actors.ReferenceActor, "reference", resources.reference, start)
        self.maker = make(role_actors.ExperienceActor, "experience", resources.reward)
        self.trained = {
            "policy": make(trainer_actors.PolicyActor, "policy", resources.policy, 0, 1),
            "critic": make(trainer_actors.CriticActor, "critic", resources.critic, 0, 1),
        }
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for role, model in (("policy", start), ("critic", folder.stage("reward").model)):
            self.trained[role].join(Path(model), "127.0.0.1", port)
        self.generation = SimpleNamespace(generate=self._each(self.generator.generate), load_weights=self._load_weights)
        self.reward = SimpleNamespace(score=self._each(self.scorer.score), texts=self.scorer.texts)
        self.reference = SimpleNamespace(logprobs=self._each(self.referee.logprobs))
        policy, critic = self.trained["policy"], self.trained["critic"]
        self.policy = SimpleNamespace(logprobs=self._each(policy.logprobs), update=self._update(policy), weights=self._weights)
        self.critic = SimpleNamespace(values=self._each(critic.values), update=self._update(critic))
        self.experience = SimpleNamespace(assemble=self._assemble, evaluate=self._evaluate)

    def wait(self, handles: Any, what: str) -> None:
        """Everything is there."""

    def get(self, handles: Any, what: str) -> list[Any]:
        return list(handles)

    @staticmethod
    def _each(method: Any) -> Any:
        return lambda parts: [method(part)[0] for part in parts]

    @staticmethod
    def _update(trainer: Any) -> Any:
        return lambda shards, *rates: [trainer.update(shards[0], rates)[0]]

    def _weights(self) -> list[dict[str, Any]]:
        parts = self.trained["policy"].weights(1)[:-1]
        return [{name: array.copy() for name, array in part.items()} for part in parts]

    def _load_weights(self, weights: list[dict[str, Any]], version: int) -> list[int]:
        return [self.generator.load_weights(version, *weights)]

    def _assemble(self, rollouts: list, *parts: Any) -> tuple[dict, list, list]:
        *lists, kl_coef = parts
        stats, policy, critic, _ = self.maker.assemble(len(rollouts), kl_coef, *rollouts, *(one for part in lists for one in part))
        return stats, [policy], [critic]

    def _evaluate(self, rollouts: list, *parts: list) -> dict[str, float]:
        return self.maker.evaluate(len(rollouts), *rollouts, *(one for part in parts for one in part))


def run_alone(folder: RunFolder, steps: int) -> str:
    """So many steps of the soak's recipe -> `soak.digest_of` their end."""
    recipe = tiny_recipe(ppo=soak.RECIPE["ppo"] | {"eval_every": 10**6})  # an evaluation changes nothing
    torch.set_num_threads(1)
    role_actors.set_up_process = lambda *_, **__: torch.device("cpu")
    join, joined = distributed.join_group, []
    distributed.join_group = lambda **place: None if joined else joined.append(join(**place))  # one process, one group
    roles = Roles(recipe, folder)
    hooks = LoopHooks(
        record=lambda step, metrics: print(step, flush=True) if step % 10 == 0 else None, samples=lambda *_: None,
        save=lambda state: True, save_best=lambda state: None, stop_requested=lambda: loop.state.step >= steps,
    )  # fmt: skip
    loop = PPOLoop(
        roles, recipe.ppo, hooks, LoopState(kl_coef=recipe.ppo.kl_coef), prompts=count_rows(folder, "prompts"),
        eval_prompts=recipe.ppo.eval_prompts, chunk_size=recipe.generation.chunk_size, seed=recipe.ppo_seed,
        temperature=recipe.generation.temperature,
    )  # fmt: skip
    loop.run()
    engines = {role: actor.role.engine for role, actor in roles.trained.items()}
    return soak.digest_of({role: (dict(engine.state()), engine.steps_taken) for role, engine in engines.items()})


def main() -> None:
    checkpoint = last_good(RunFolder(Path(sys.argv[1])).stage("ppo").checkpoints)
    assert checkpoint is not None, "there is no checkpoint"
    steps = read_state(checkpoint)["step"]
    with tempfile.TemporaryDirectory() as place:
        found = run_alone(write_start(tiny_recipe(), RunFolder(Path(place) / "run")), steps)
    wanted = soak.digest_of_checkpoint(checkpoint)
    print(f"step {steps}: {found}, {'equal' if found == wanted else f'but {wanted} there'}")
    sys.exit(found != wanted)


if __name__ == "__main__":
    main()

"""Thin Ray shells around the roles that do not train. Each builds its plain role and passes calls on; large results come with a
receipt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from rlhf_ray.actors.garbage_collection import collector_paused

with collector_paused():
    import ray
    import torch

    from rlhf_ray.actors import faults
    from rlhf_ray.actors.process import set_up_process
    from rlhf_ray.actors.pulse import ActorProcess, this_process
    from rlhf_ray.actors.receipt import with_receipt
    from rlhf_ray.actors.weight_transport import GenerationEnd, Place
    from rlhf_ray.config import Precision, Recipe, RoleConfig
    from rlhf_ray.runs.elsewhere import arrive, hand_in
    from rlhf_ray.runs.run_folder import RunFolder


class RoleActor(ABC):
    """Set-up that all actors share. Not an actor itself."""

    def __init__(self, name: str, recipe: Recipe, folder: RunFolder, settings: RoleConfig, *args):
        self.name, self.recipe, self.folder, self.settings = name, recipe, folder, settings
        faults.tell_process(name)
        self.device = set_up_process(name, folder.logs, threads=settings.threads, gpus=settings.gpus)
        arrive(folder)
        self.shares_gpu = 0 < settings.gpus < 1
        with collector_paused():
            self.build(*args)

    @abstractmethod
    def build(self, *args) -> None:
        """Import and make the plain role, as far as the actor can alone."""

    def compute_dtype(self, setting: Precision) -> torch.dtype:
        from rlhf_ray.training.precision import resolve_precision

        return resolve_precision(setting, self.device)

    def ready(self) -> ActorProcess:
        return this_process()

    def place(self) -> Place:
        from rlhf_ray.models.shared_gpu import gpu_id

        gpu = gpu_id(torch.cuda.current_device()) if self.device.type == "cuda" else None
        return Place(node=ray.get_runtime_context().get_node_id(), gpu=gpu)


class Generation(RoleActor, GenerationEnd):
    """Not an actor itself: there are two kinds, below."""

    def build(self, start: Path):
        from rlhf_ray.data.role_files import read_prompts
        from rlhf_ray.roles.generator import Generator

        recipe, generation = self.recipe, self.recipe.generation
        precision = recipe.ppo.precision if generation.precision == "auto" else generation.precision
        self.role = Generator(
            start,
            read_prompts(self.folder),
            read_prompts(self.folder, "eval_prompts"),
            sampling=generation.sampling,
            seed=recipe.ppo_seed,
            dtype=self.compute_dtype(precision),
            device=self.device,
            trust_remote_code=recipe.model.trust_remote_code,
            lora=recipe.ppo.lora,
            freeze_layers=recipe.ppo.freeze_layers,
            engine=generation.engine,
            rows=generation.rows,
            tensor_parallel=generation.tensor_parallel,
            shares_gpu=self.shares_gpu,
            float32_head=recipe.ppo.float32_head,
        )  # fmt: skip

    @with_receipt
    def generate(self, chunk, last=False):
        return self.role.generate(chunk, last)


Generation = faults.with_points(Generation)
GenerationActor = ray.remote(Generation)
#: Calls of this concurrency group run in a thread of their own, so weights arrive while the actor generates.
IN_FLIGHT = "in_flight"
SENDING = "sending"  # the same for the policy's, which is sent while it trains
InFlightGenerationActor = ray.remote(concurrency_groups={IN_FLIGHT: 1})(Generation)  # pyright: ignore[reportCallIssue] - not in Ray's annotation


@ray.remote
@faults.with_points
class RewardActor(RoleActor):
    def build(self, start: Path):
        from rlhf_ray.data.role_files import read_prompt_columns
        from rlhf_ray.rewards.from_recipe import judge_scorer, reward_scorer
        from rlhf_ray.roles.reward import Reward

        recipe = self.recipe
        models = recipe, self.folder, self.compute_dtype(recipe.ppo.precision), self.device
        self.role = Reward(
            reward_scorer(*models), start, judge=judge_scorer(*models) if recipe.ppo.judge_evaluations else None,
            stop=recipe.generation.stop, trust_remote_code=recipe.model.trust_remote_code,
            columns=(read_prompt_columns(self.folder), read_prompt_columns(self.folder, "eval_prompts")),
        )  # fmt: skip

    @with_receipt
    def score(self, rollout):
        return self.role.score(rollout)

    @with_receipt
    def judge(self, rollout):
        return self.role.judge(rollout)

    def texts(self, rollout, count):
        return self.role.texts(rollout, count)


@ray.remote
@faults.with_points
class ReferenceActor(RoleActor):
    def build(self, start: Path):
        from rlhf_ray.roles.reference_policy import Reference

        recipe = self.recipe
        self.role = Reference(
            start, temperature=recipe.generation.temperature, compute_dtype=self.compute_dtype(recipe.ppo.precision),
            device=self.device, **recipe.ppo.microbatches,
            trust_remote_code=recipe.model.trust_remote_code, float32_head=recipe.ppo.float32_head,
        )  # fmt: skip

    @with_receipt
    def logprobs(self, rollout):
        return self.role.logprobs(rollout)


@ray.remote
@faults.with_points
class ExperienceActor(RoleActor):
    def build(self):
        from rlhf_ray.roles.configs import experience_config
        from rlhf_ray.roles.experience_maker import ExperienceMaker

        self.role = ExperienceMaker(experience_config(self.recipe))

    @with_receipt
    def assemble(self, chunks: int, kl_coef: float, *parts):
        """parts: rollouts, scores, ref_logprobs, old_logprobs and old_values (unless there is no critic), `chunks` of each,
        as refs that Ray resolves."""
        groups = [list(parts[i : i + chunks]) for i in range(0, 5 * chunks, chunks)]  # no critic: the last one is empty
        stats, policy, critic = self.role.assemble(*groups, kl_coef=kl_coef)
        return [stats, *policy, *critic]

    def own_mismatch(self, chunks: int, *parts):
        """parts: rollouts and the policy's log-probs, `chunks` of each."""
        return self.role.own_mismatch(list(parts[:chunks]), list(parts[chunks:]))

    def zero_variance(self, chunks: int, *parts):
        """parts: rollouts and their scores, `chunks` of each."""
        return self.role.zero_variance(list(parts[:chunks]), list(parts[chunks:]))

    @with_receipt
    def pack(self, chunks: int, prompts: int, chunk_size: int, *parts):
        rollouts, scores = self.role.pack(list(parts[:chunks]), list(parts[chunks:]), prompts, chunk_size)
        return [*rollouts, *scores]

    def evaluate(self, chunks: int, *parts):
        """parts: rollouts, scores, ref_logprobs and the judge's scores (if it was asked), `chunks` of each."""
        return self.role.evaluate(*(list(parts[i : i + chunks]) for i in range(0, 4 * chunks, chunks)))


@ray.remote
@faults.with_points
class EvaluationActor(RoleActor):
    def build(self):
        from rlhf_ray.evaluation.evaluate import evaluate

        self.role = evaluate

    def evaluate(self) -> None:
        self.role(self.recipe, self.folder, self.told, device=self.device)
        hand_in(self.folder, self.folder.stage("evaluation").path)

    def told(self, state: dict) -> None:
        """A point for faults at each chunk."""

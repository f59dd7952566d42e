"""Thin Ray shells around the roles. Each builds its plain role and passes calls on; large results come with a receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_ray.actors.garbage_collection import collector_paused

with collector_paused():
    import numpy as np
    import ray
    import torch

    from rlhf_ray.actors import faults
    from rlhf_ray.actors.process import set_up_process
    from rlhf_ray.actors.pulse import Process, this_process
    from rlhf_ray.actors.receipt import with_receipt
    from rlhf_ray.actors.weight_transport import GenerationEnd, Place, PolicyEnd
    from rlhf_ray.config import GroupConfig, Precision, Recipe, RoleConfig
    from rlhf_ray.runs.run_folder import RunFolder


class RoleActor:
    """Set-up that all actors share. Not an actor itself."""

    def __init__(self, name: str, recipe: Recipe, folder: RunFolder, settings: RoleConfig, *args):
        self.name, self.recipe, self.folder, self.settings = name, recipe, folder, settings
        faults.tell_process(name)
        self.device = set_up_process(name, folder.logs, threads=settings.threads, gpus=settings.gpus)
        with collector_paused():
            self.build(*args)

    def build(self, *args) -> None:
        """Import and make the plain role, as far as the actor can alone."""
        raise NotImplementedError

    def compute_dtype(self, setting: Precision) -> torch.dtype:
        from rlhf_ray.training.precision import resolve_precision

        return resolve_precision(setting, self.device)

    def ready(self) -> Process:
        return this_process()

    def place(self) -> Place:
        from rlhf_ray.models.shared_gpu import gpu_id

        gpu = gpu_id(torch.cuda.current_device()) if self.device.type == "cuda" else None
        return Place(node=ray.get_runtime_context().get_node_id(), gpu=gpu)


class Generation(RoleActor, GenerationEnd):
    """Not an actor itself: there are two kinds, below."""

    def build(self, start: Path):
        from rlhf_ray.data.store import read_prompts
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
            rows=generation.chunk_size,
        )  # fmt: skip

    @with_receipt
    def generate(self, chunk, last=False):
        return self.role.generate(chunk, last)


Generation = faults.with_points(Generation)
GenerationActor = ray.remote(Generation)
#: Calls of this concurrency group run in a thread of their own, so weights arrive while the actor generates.
IN_FLIGHT = "in_flight"
InFlightGenerationActor = ray.remote(concurrency_groups={IN_FLIGHT: 1})(Generation)  # pyright: ignore[reportCallIssue] - not in Ray's annotation


@ray.remote
@faults.with_points
class RewardActor(RoleActor):
    def build(self, start: Path):
        from rlhf_ray.data.store import read_prompt_columns
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
        from rlhf_ray.roles.reference import Reference

        recipe = self.recipe
        self.role = Reference(
            start, temperature=recipe.generation.temperature, compute_dtype=self.compute_dtype(recipe.ppo.precision),
            device=self.device, **recipe.ppo.microbatches,
            trust_remote_code=recipe.model.trust_remote_code,
        )  # fmt: skip

    @with_receipt
    def logprobs(self, rollout):
        return self.role.logprobs(rollout)


@ray.remote
@faults.with_points
class ExperienceActor(RoleActor):
    def build(self):
        from rlhf_ray.roles.configs import experience_config
        from rlhf_ray.roles.experience import ExperienceMaker

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

    def told(self, state: dict) -> None:
        """A point for faults at each chunk."""


class TrainerActor(RoleActor):
    """One rank of a DeepSpeed group. Not an actor itself."""

    role_name: str
    settings: GroupConfig
    role: Any  # PolicyTrainer or CriticTrainer, whose module is imported in the actor only

    def build(self, rank: int, ranks: int):
        self.rank, self.ranks = rank, ranks

    def address(self) -> tuple[str, int]:
        """Where rank 0 can be met."""
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def _engine(self, module, address: str, port: int):
        with collector_paused():
            from rlhf_ray.training.deepspeed_engine import DeepSpeedEngine, OptimiserConfig
            from rlhf_ray.training.distributed import join_group

        resources = self.recipe.resources
        join_group(
            rank=self.rank,
            world_size=self.ranks,
            address=address,
            port=port,
            device_type=self.device.type,
            timeout_s=resources.call_timeout_s,
        )
        ppo = self.recipe.ppo
        settings = OptimiserConfig(
            adam_eps=ppo.adam_eps, adam_form=ppo.adam_form, max_grad_norm=ppo.max_grad_norm,
            zero_stage=self.settings.zero_stage,
        )  # fmt: skip
        return DeepSpeedEngine(module, settings, device=self.device)

    @with_receipt
    def update(self, shard, *rates):
        return self.role.update(shard, *rates)

    def save(self, folder: Path) -> int:
        """Write this rank's share of a checkpoint."""
        from rlhf_ray.ppo.checkpoint import write_rank

        engine = self.role.engine
        write_rank(folder, self.role_name, self.rank, self.ranks, engine.state(), engine.steps_taken)
        return self.rank

    def snapshot(self) -> tuple[dict[str, np.ndarray], int]:
        """This rank's share of the state, by name, and the optimiser steps taken."""
        engine = self.role.engine
        state = enumerate(engine.state())
        # Ray copies what a call returns into its store before this actor's next call, but ZeRO-3 takes its weights back at once.
        copy = self.settings.zero_stage == 3
        share = {
            name: tensor.detach().to("cpu", torch.float32, copy=copy).contiguous().numpy()
            for number, (name, tensor) in state
            if number % self.ranks == self.rank
        }
        return share, engine.steps_taken

    def restore(self, *parts: Any) -> int:
        """The inverse: what each rank's `snapshot` returned, one after the other."""
        from rlhf_ray.models.wire import as_tensor

        shares, (steps, *_) = parts[::2], parts[1::2]
        state = {name: as_tensor(array) for share in shares for name, array in share.items()}
        self.role.forget()
        self.role.engine.load_state(state, steps, f"the snapshot of the {self.role_name}")
        return steps

    def load(self, folder: Path) -> int:
        from rlhf_ray.ppo.checkpoint import read_role

        state, steps = read_role(folder, self.role_name)
        self.role.forget()
        self.role.engine.load_state(state, steps, f"the checkpoint {folder} ({self.role_name})")
        return steps


@ray.remote
@faults.with_points
class PolicyActor(TrainerActor, PolicyEnd):
    role_name = "policy"

    def join(self, start: Path, address: str, port: int) -> int:
        """Build the policy and meet the other ranks. Returns the bytes of its weights, as far as they train."""
        with collector_paused():
            from rlhf_ray.models.load import disable_dropout, fast_attention, load_causal_lm
            from rlhf_ray.models.trained_part import train_only_part
            from rlhf_ray.roles.configs import policy_loss_config
            from rlhf_ray.roles.trainer import PolicyTrainer
            from rlhf_ray.training.forward import LogprobModel

        ppo, self.start = self.recipe.ppo, start
        model = fast_attention(load_causal_lm(start, None, self.recipe.model.trust_remote_code), self.device)
        disable_dropout(model)
        train_only_part(
            model, lora=ppo.lora, freeze_layers=ppo.freeze_layers, gradient_checkpointing=ppo.gradient_checkpointing,
            seed=self.recipe.seed,
        )  # fmt: skip
        weight_bytes = sum(parameter.numel() * 4 for parameter in model.parameters() if parameter.requires_grad)
        self.dtype = self.compute_dtype(ppo.precision)
        module = LogprobModel(
            model, temperature=self.recipe.generation.temperature, compute_dtype=self.dtype,
            entropy_gradient=ppo.entropy_coef > 0,
        )  # fmt: skip
        engine = self._engine(module, address, port)
        self.role = PolicyTrainer(
            engine, **ppo.microbatches, reuse_forward=ppo.reuse_forward, config=policy_loss_config(self.recipe)
        )
        return weight_bytes

    @with_receipt
    def logprobs(self, rollout):
        return self.role.logprobs(rollout)

    @with_receipt
    def reference_logprobs(self, rollout):
        return self.role.reference_logprobs(rollout)

    def save_model(self, folder: Path, card: str, adapter: Path | None) -> int:
        """Write a Hugging Face folder, an adapter merged, and the adapter by itself to `adapter`; rank 0 writes, all
        gather."""
        from rlhf_ray.models.load import load_causal_lm, save_model
        from rlhf_ray.models.tokenizer import load_tokenizer
        from rlhf_ray.models.trained_part import load_trained, save_adapter

        ppo = self.recipe.ppo
        keep = self.rank == 0
        state = {name: tensor.float().cpu().clone() for name, tensor in self.role.weights() if keep}
        if keep:
            trust = self.recipe.model.trust_remote_code
            model = load_causal_lm(self.start, None, trust)
            if adapter is not None and ppo.lora is not None:
                save_adapter(model, state, ppo.lora, adapter, str(self.start))
            load_trained(model, state, lora=ppo.lora, freeze_layers=ppo.freeze_layers)
            # Not generation_config.stop_strings: with those a plain `generate` refuses to run without a tokenizer.
            model.config.response_stops = list(self.recipe.generation.stop)
            save_model(model, load_tokenizer(self.start, trust), folder, card)
        return self.rank


@ray.remote
@faults.with_points
class CriticActor(TrainerActor):
    role_name = "critic"

    def join(self, start: Path, address: str, port: int) -> int:
        """Build the critic and meet the other ranks. Returns the bytes of its weights, as far as they train."""
        with collector_paused():
            from rlhf_ray.models.critic import build_critic
            from rlhf_ray.models.load import fast_attention
            from rlhf_ray.models.trained_part import train_only_part
            from rlhf_ray.roles.trainer import CriticTrainer
            from rlhf_ray.training.forward import ValueModel

        ppo = self.recipe.ppo
        critic = build_critic(start, ppo.critic_init, None, self.recipe.model.trust_remote_code)
        train_only_part(
            fast_attention(critic.backbone, self.device), lora=ppo.critic_lora, freeze_layers=ppo.critic_freeze_layers,
            gradient_checkpointing=ppo.gradient_checkpointing, seed=self.recipe.seed,
        )  # fmt: skip
        module = ValueModel(critic, compute_dtype=self.compute_dtype(ppo.precision))
        engine = self._engine(module, address, port)
        self.role = CriticTrainer(
            engine, **ppo.microbatches, reuse_forward=ppo.reuse_forward, value_clip_range=ppo.value_clip_range,
            vf_coef=ppo.vf_coef,
        )  # fmt: skip
        return 4 * sum(parameter.numel() for parameter in critic.parameters() if parameter.requires_grad)

    @with_receipt
    def values(self, rollout):
        return self.role.values(rollout)

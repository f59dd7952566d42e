"""Thin Ray shells around the two trained roles, each one rank of its DeepSpeed group."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rlhf_ray.actors.garbage_collection import collector_paused

with collector_paused():
    import numpy as np
    import ray
    import torch

    from rlhf_ray.actors import faults
    from rlhf_ray.actors.receipt import with_receipt
    from rlhf_ray.actors.role_actors import SENDING, RoleActor
    from rlhf_ray.actors.weight_transport import PolicyEnd
    from rlhf_ray.config import GroupConfig
    from rlhf_ray.runs.elsewhere import arrive_at, hand_in, is_elsewhere
    from rlhf_ray.runs.writing import Writing


class TrainerActor(RoleActor):
    """One rank of a DeepSpeed group. Not an actor itself."""

    role_name: str
    settings: GroupConfig
    role: Any  # PolicyTrainer or CriticTrainer, whose module is imported in the actor only

    def build(self, rank: int, ranks: int):
        self.rank, self.ranks = rank, ranks
        self.writing = Writing()

    @property
    def reads_weights(self) -> bool:
        """Whether this rank loads a model's weights itself. At ZeRO-3 rank 0 does, and hands each its share."""
        return self.rank == 0 or self.settings.zero_stage < 3

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
            zero_stage=self.settings.zero_stage, offload_optimizer=self.settings.offload_optimizer,
            offload_param=self.settings.offload_param, compute_dtype=module.compute_dtype, rests=self.rests,
        )  # fmt: skip
        return DeepSpeedEngine(module, settings, device=self.device)

    @property
    def rests(self) -> bool:
        """Whether other roles have this rank's GPU while it does not train: then it leaves to them what it needs for that alone."""
        return self.shares_gpu and self.recipe.ppo.steps_ahead == 0

    def _rest(self) -> None:
        if self.rests:
            self.role.engine.rest()
            torch.cuda.empty_cache()

    @with_receipt
    def update(self, shard, rates, *before):
        """before: results of others, which had to come first."""
        figures = self.role.update(shard, *rates)
        self._rest()
        return figures

    def save(self, folder: Path) -> int:
        """Copy this rank's share of the state, and begin to write it into the folder. Training goes on meanwhile."""
        from rlhf_ray.ppo.checkpoint import share_of_rank

        engine, which = self.role.engine, (self.role_name, self.rank, self.ranks)
        share = share_of_rank(*which, engine.state())
        self._rest()
        self.writing.begin(partial(self._write, folder, *which, share, engine.steps_taken))
        return self.rank

    def _write(self, folder: Path, *share: Any) -> dict[str, str]:
        """In a thread -> {file: SHA-256}. On another host than the run's, the files go there by the store."""
        from rlhf_ray.ppo.checkpoint import write_share

        if not is_elsewhere(self.folder):
            return write_share(folder, *share)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # other ranks of this host write there too
        digests = write_share(folder, *share)
        hand_in(self.folder, *(folder / name for name in digests))
        for name in digests:
            (folder / name).unlink()
        return digests

    def saved(self, wait: bool) -> dict[str, str] | str | None:
        """Of the newest `save`: `Writing.result`."""
        return self.writing.result(wait=wait)

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
        self._rest()
        return share, engine.steps_taken

    def restore(self, *parts: Any) -> int:
        """The inverse: what each rank's `snapshot` returned, one after the other."""
        from rlhf_ray.models.wire import as_tensor

        shares, (steps, *_) = parts[::2], parts[1::2]
        state = {name: as_tensor(array) for share in shares for name, array in share.items()}
        self.role.forget()
        self.role.engine.load_state(state, steps, f"the snapshot of the {self.role_name}")
        self._rest()
        return steps

    def load(self, folder: Path) -> int:
        from rlhf_ray.ppo.checkpoint import read_role

        arrive_at(self.folder, folder)
        state, steps = read_role(folder, self.role_name)
        self.role.forget()
        self.role.engine.load_state(state, steps, f"the checkpoint {folder} ({self.role_name})")
        self._rest()
        return steps


class PolicyRank(TrainerActor, PolicyEnd):
    """Not an actor itself: there are two kinds, below."""

    role_name = "policy"

    def join(self, start: Path, address: str, port: int) -> int:
        """Build the policy and meet the other ranks. Returns the bytes of its weights, as far as they train."""
        with collector_paused():
            from rlhf_ray.models.float_head import logits_in_float32
            from rlhf_ray.models.frozen import hold_frozen
            from rlhf_ray.models.load import disable_dropout, fast_attention, load_causal_lm
            from rlhf_ray.models.trained_part import train_only_part
            from rlhf_ray.roles.configs import policy_loss_config
            from rlhf_ray.roles.policy_trainer import PolicyTrainer
            from rlhf_ray.training.forward import LogprobModel

        ppo, self.start = self.recipe.ppo, start
        model = load_causal_lm(start, None, self.recipe.model.trust_remote_code, weights=self.reads_weights)
        disable_dropout(fast_attention(model, self.device))
        self.dtype = self.compute_dtype(ppo.precision)
        if ppo.float32_head:
            logits_in_float32(model, self.dtype)
        train_only_part(
            model, lora=ppo.lora, freeze_layers=ppo.freeze_layers, gradient_checkpointing=ppo.gradient_checkpointing,
            seed=self.recipe.seed,
        )  # fmt: skip
        weight_bytes = sum(parameter.numel() * 4 for parameter in model.parameters() if parameter.requires_grad)
        module = LogprobModel(model, temperature=self.recipe.generation.temperature, compute_dtype=self.dtype)
        hold_frozen(module, self.dtype)
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

    def save_version(self, folder: Path, card: str) -> int:
        """A Hugging Face folder for a server, with this policy's log-probs of a few rows beside it."""
        from rlhf_ray.models.load import load_config
        from rlhf_ray.models.positions import positions_of
        from rlhf_ray.publish.checked_rows import rows_to_check, write_rows
        from rlhf_ray.roles.row_logprobs import row_logprobs

        config = load_config(self.start, self.recipe.model.trust_remote_code)
        rows = rows_to_check(config.get_text_config().vocab_size, positions_of(config))
        logprobs = row_logprobs(self.role, rows)
        self._save_model(folder, card, None)
        if self.rank == 0:
            write_rows(folder, rows, logprobs, "bfloat16" if "bfloat16" in str(self.dtype) else "float32")
            hand_in(self.folder, folder)
        return self.rank

    def save_model(self, folder: Path, card: str, adapter: Path | None) -> int:
        """Write a Hugging Face folder, an adapter merged, and the adapter by itself to `adapter`; rank 0 writes, all
        gather."""
        self._save_model(folder, card, adapter)
        if self.rank == 0:
            written = [folder] if adapter is None or self.recipe.ppo.lora is None else [folder, adapter]
            hand_in(self.folder, *written)
        return self.rank

    def _save_model(self, folder: Path, card: str, adapter: Path | None) -> None:
        from rlhf_ray.models.load import load_causal_lm
        from rlhf_ray.models.save import save_model
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
            folder.parent.mkdir(parents=True, exist_ok=True)
            save_model(model, load_tokenizer(self.start, trust), folder, card)


PolicyRank = faults.with_points(PolicyRank)
PolicyActor = ray.remote(PolicyRank)
#: Sends its weights in a thread of its own, for generators that draw ahead.
SendingPolicyActor = ray.remote(concurrency_groups={SENDING: 1})(PolicyRank)  # pyright: ignore[reportCallIssue] - not in Ray's annotation


@ray.remote
@faults.with_points
class CriticActor(TrainerActor):
    role_name = "critic"

    def join(self, start: Path, address: str, port: int) -> int:
        """Build the critic and meet the other ranks. Returns the bytes of its weights, as far as they train."""
        with collector_paused():
            from rlhf_ray.models.critic import build_critic
            from rlhf_ray.models.frozen import hold_frozen
            from rlhf_ray.models.load import fast_attention
            from rlhf_ray.models.trained_part import train_only_part
            from rlhf_ray.roles.critic_trainer import CriticTrainer
            from rlhf_ray.training.forward import ValueModel

        ppo = self.recipe.ppo
        critic = build_critic(start, ppo.critic_init, None, self.recipe.model.trust_remote_code, self.reads_weights)
        train_only_part(
            fast_attention(critic.backbone, self.device), lora=ppo.critic_lora, freeze_layers=ppo.critic_freeze_layers,
            gradient_checkpointing=ppo.gradient_checkpointing, seed=self.recipe.seed,
        )  # fmt: skip
        dtype = self.compute_dtype(ppo.precision)
        module = ValueModel(critic, compute_dtype=dtype)
        hold_frozen(module, dtype)
        engine = self._engine(module, address, port)
        self.role = CriticTrainer(
            engine, **ppo.microbatches, reuse_forward=ppo.reuse_forward, value_clip_range=ppo.value_clip_range,
            vf_coef=ppo.vf_coef,
        )  # fmt: skip
        return 4 * sum(parameter.numel() for parameter in critic.parameters() if parameter.requires_grad)

    @with_receipt
    def values(self, rollout):
        return self.role.values(rollout)

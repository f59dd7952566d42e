"""The policy: one rank of its DeepSpeed group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Unpack, cast

import torch

from rlhf_ray.algorithms.losses import entropy_bonus, kl_loss, policy_loss, token_weights
from rlhf_ray.messages import PolicyShard, RolloutBatch, TokenValues
from rlhf_ray.models.trained_part import adapter_off, plain_name
from rlhf_ray.roles.configs import PolicyLossConfig
from rlhf_ray.roles.trainer import Forwards, Trainer, in_order
from rlhf_ray.training.deepspeed_engine import DeepSpeedEngine
from rlhf_ray.training.forward import LogprobModel


class PolicyTrainer(Trainer[PolicyShard]):
    """The policy: old log-probs, clipped update, weights for the generators."""

    name = "policy"
    reads_support = True

    def __init__(self, engine: DeepSpeedEngine, *, config: PolicyLossConfig, **forwards: Unpack[Forwards]):
        super().__init__(engine, **forwards)
        self.config = config
        self._kl_coef = 0.0
        if config.entropy_coef > 0:
            self._extra_inputs = (True,)  # with_entropy
            cast(LogprobModel, engine.module).entropy_gradient = True

    def update(self, shard: PolicyShard, learning_rate: float, kl_coef: float) -> dict[str, float]:
        """As `Trainer.update`; kl_coef weighs the KL loss, where there is one."""
        self._kl_coef = kl_coef
        return super().update(shard, learning_rate)

    def logprobs(self, rollout: RolloutBatch) -> TokenValues:
        """old_logprobs of a chunk's responses, and the mean entropy per token."""
        parts, entropy = [], 0.0
        for rows, (logprobs, entropies) in self._first_forward(rollout, with_entropy=True):
            parts.append((rows, logprobs))
            entropy += float(entropies.sum())
        values = in_order(parts, rollout.sequences)
        return TokenValues(values=values, entropy=entropy / len(values))

    def reference_logprobs(self, rollout: RolloutBatch) -> TokenValues:
        """ref_logprobs of a chunk's responses: those of the policy with its adapter off, as `Reference` computes them."""
        with adapter_off(self.engine.module):
            return TokenValues(values=in_order(self._forward(rollout), rollout.sequences))

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(`plain_name`, full tensor) of what trains, one at a time; all ranks iterate together."""
        return ((plain_name(name), tensor) for name, tensor in self.engine.weights())

    def _floats(self, shard):
        floats = [shard.old_logprobs, shard.advantages]
        return floats if shard.ref_logprobs is None else [*floats, shard.ref_logprobs]

    def _loss(self, output, floats, mask, step):
        config, (old_logprobs, advantages, *reference) = self.config, floats
        logprobs, entropies = output if config.entropy_coef > 0 else (output, None)
        weights = token_weights(
            mask, config.aggregation, num_tokens=step.num_tokens, num_sequences=step.num_sequences,
            max_new_tokens=config.max_new_tokens,
        )  # fmt: skip
        loss, stats = policy_loss(
            logprobs, old_logprobs, advantages, mask, weights, clip_range=config.clip_range, clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip, num_tokens=step.num_tokens,
        )  # fmt: skip
        if config.kl_loss is not None:
            (ref_logprobs,) = reference
            kl = kl_loss(logprobs, ref_logprobs, mask, weights, estimator=config.kl_loss)
            loss, stats["policy/kl_loss"] = loss + self._kl_coef * kl, kl.detach()
        if entropies is not None:
            loss = loss + config.entropy_coef * entropy_bonus(entropies, mask, weights)
        return loss, stats

    def _is_enough(self, stats):
        limit = self.config.max_approx_kl
        return limit is not None and self.engine.sum_over_ranks(stats["policy/approx_kl"]) > limit

"""The critic: one rank of its DeepSpeed group."""

from __future__ import annotations

from typing import Unpack

from rlhf_ray.algorithms.losses import value_loss
from rlhf_ray.messages import CriticShard, RolloutBatch, TokenValues
from rlhf_ray.roles.trainer import Forwards, Trainer, in_order
from rlhf_ray.training.deepspeed_engine import DeepSpeedEngine


class CriticTrainer(Trainer[CriticShard]):
    """The critic: old values, clipped regression to the returns."""

    name = "value"

    def __init__(
        self, engine: DeepSpeedEngine, *, value_clip_range: float, vf_coef: float, **forwards: Unpack[Forwards]
    ):
        super().__init__(engine, **forwards)
        self.value_clip_range, self.vf_coef = value_clip_range, vf_coef

    def values(self, rollout: RolloutBatch) -> TokenValues:
        """old_values: of the state before each response token."""
        return TokenValues(values=in_order(self._first_forward(rollout), rollout.sequences))

    def _floats(self, shard):
        return [shard.old_values, shard.returns]

    def _loss(self, output, floats, mask, step):
        old_values, returns = floats
        loss, stats = value_loss(
            output, old_values, returns, mask, value_clip_range=self.value_clip_range, num_tokens=step.num_tokens
        )
        return self.vf_coef * loss, stats

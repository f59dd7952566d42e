"""The two trained roles: policy and critic, each one rank of its DeepSpeed group."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from rlhf_ray.algorithms.losses import Stats, policy_loss, value_loss
from rlhf_ray.engines.deepspeed_engine import DeepSpeedEngine
from rlhf_ray.engines.forward import action_mask, pad_rows, pad_tokens
from rlhf_ray.types import RolloutBatch, Sequences, TokenValues, TrainShard, flatten, unflatten


def microbatches(sequences: Sequences, microbatch_size: int) -> Iterator[slice]:
    for start in range(0, len(sequences), microbatch_size):
        yield slice(start, start + microbatch_size)


class Trainer:
    """What policy and critic share: forward over a unit of work, and one update over a shard."""

    def __init__(self, engine: DeepSpeedEngine, *, microbatch_size: int):
        self.engine, self.microbatch_size = engine, microbatch_size

    def _loss(self, output: torch.Tensor, old, target, mask, num_tokens: int) -> tuple[torch.Tensor, Stats]:
        raise NotImplementedError

    def _forward(self, rollout: RolloutBatch, **options) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """The module's output and the response lengths of each microbatch."""
        sequences = rollout.sequences
        prompts, responses = sequences.prompts(), sequences.responses()
        for part in microbatches(sequences, self.microbatch_size):
            batch = pad_rows(prompts[part], responses[part], pad_token_id=0, device=self.engine.device)
            yield self.engine.forward(*batch, **options), [len(ids) for ids in responses[part]]

    def update(self, shard: TrainShard, learning_rate: float) -> dict[str, float]:
        """All optimiser steps of the shard's schedule. Statistics are this rank's share: summing over ranks gives the
        mean over tokens, except for the gradient norm (`.../grad_norm`), which is the same on every rank.

        `first_` statistics are those of the first minibatch, where the ratio must still be 1.
        """
        data = self._device_rows(shard)
        totals: list[dict[str, float]] = []
        norms = []
        for step in shard.schedule:
            stats: list[Stats] = []

            def loss_of(output, rest, num_tokens=step.num_tokens, stats=stats):
                loss, part = self._loss(output, *rest, num_tokens)
                stats.append(part)
                return loss

            norms.append(self.engine.step(self._train_batches(data, step.rows), loss_of, learning_rate=learning_rate))
            totals.append({name: float(sum(part[name] for part in stats)) for name in stats[0]})
        mean = {name: float(np.mean([total[name] for total in totals])) for name in totals[0]}
        first = {f"first_{name}": value for name, value in totals[0].items()}
        return mean | first | {f"{self.name}/grad_norm": float(np.mean(norms))}

    def _device_rows(self, shard: TrainShard) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        lengths = shard.sequences.response_lengths
        return list(zip(
            shard.sequences.prompts(), shard.sequences.responses(),
            unflatten(shard.old, lengths), unflatten(shard.target, lengths), strict=True,
        ))  # fmt: skip

    def _train_batches(self, data, rows: np.ndarray) -> Iterator[tuple[tuple, tuple]]:
        """((input_ids, prompt_lengths, response_lengths), (old, target, mask)) of each microbatch."""
        device = self.engine.device
        for start in range(0, len(rows), self.microbatch_size):
            picked = [data[row] for row in rows[start : start + self.microbatch_size]]
            prompts, responses, old, target = zip(*picked, strict=True)
            inputs = pad_rows(prompts, responses, pad_token_id=0, device=device)
            yield inputs, (pad_tokens(old, device), pad_tokens(target, device), action_mask(inputs[2]))

    name: str


class PolicyTrainer(Trainer):
    """The policy: old log-probs, clipped update, weights for the generators."""

    name = "policy"

    def __init__(self, engine: DeepSpeedEngine, *, microbatch_size: int, clip_range: float):
        super().__init__(engine, microbatch_size=microbatch_size)
        self.clip_range = clip_range

    def logprobs(self, rollout: RolloutBatch) -> TokenValues:
        """old_logprobs of a unit's responses, and the mean entropy a token."""
        rows, entropy = [], 0.0
        for (logprobs, entropies), lengths in self._forward(rollout, with_entropy=True):
            rows += _cut(logprobs, lengths)
            entropy += float(entropies.sum())
        values = flatten(rows, np.float32)
        return TokenValues(values=values, entropy=entropy / len(values))

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the Hugging Face model, full tensor), one at a time; all ranks iterate together."""
        return ((name.removeprefix("model."), tensor) for name, tensor in self.engine.weights())

    def _loss(self, output, old, target, mask, num_tokens):
        return policy_loss(output, old, target, mask, clip_range=self.clip_range, num_tokens=num_tokens)


class CriticTrainer(Trainer):
    """The critic: old values, clipped regression to the returns."""

    name = "value"

    def __init__(self, engine: DeepSpeedEngine, *, microbatch_size: int, value_clip_range: float, vf_coef: float):
        super().__init__(engine, microbatch_size=microbatch_size)
        self.value_clip_range, self.vf_coef = value_clip_range, vf_coef

    def values(self, rollout: RolloutBatch) -> TokenValues:
        """old_values: of the state before each response token."""
        rows = [row for values, lengths in self._forward(rollout) for row in _cut(values, lengths)]
        return TokenValues(values=flatten(rows, np.float32))

    def _loss(self, output, old, target, mask, num_tokens):
        loss, stats = value_loss(
            output, old, target, mask, value_clip_range=self.value_clip_range, num_tokens=num_tokens
        )
        return self.vf_coef * loss, stats


def _cut(padded: torch.Tensor, lengths: list[int]) -> list[np.ndarray]:
    return [row[:length] for row, length in zip(padded.float().cpu().numpy(), lengths, strict=True)]

"""The two trained roles: policy and critic, each one rank of its DeepSpeed group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, NotRequired, TypedDict, TypeVar, Unpack

import numpy as np
import torch

from rlhf_ray.algorithms.losses import (
    Stats,
    entropy_bonus,
    kl_loss,
    policy_loss,
    token_weights,
    value_loss,
)
from rlhf_ray.algorithms.schedule import cut_microbatches
from rlhf_ray.errors import NotFinite
from rlhf_ray.messages import (
    CriticShard,
    OptimiserStep,
    PolicyShard,
    RolloutBatch,
    Sequences,
    Support,
    TokenValues,
    TrainShard,
    flatten,
    unflatten,
)
from rlhf_ray.models.trained_part import adapter_off, plain_name
from rlhf_ray.roles.configs import PolicyLossConfig
from rlhf_ray.training.deepspeed_engine import DeepSpeedEngine, Forwarded
from rlhf_ray.training.forward import TokenBatch, token_batch
from rlhf_ray.training.padding import action_mask, pad_tokens

UPDATE_REMEDY = "lower ppo.learning_rate and ppo.critic_learning_rate, set ppo.score_clip, or ppo.precision to float32"
Shard = TypeVar("Shard", bound=TrainShard)


class Forwards(TypedDict):
    """How `Trainer` cuts and keeps forward passes."""

    microbatch_size: int
    microbatch_tokens: NotRequired[int | None]
    reuse_forward: NotRequired[bool]


class Trainer(Generic[Shard]):
    """What policy and critic share: forward over a chunk, and one update over a shard."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        *,
        microbatch_size: int,
        microbatch_tokens: int | None = None,
        reuse_forward: bool = False,
    ):
        """A forward pass takes microbatch_size rows or, if given, as many as microbatch_tokens holds.

        reuse_forward: the passes that give the old log-probs or values keep their graphs. The update's first optimiser
        step starts from them, because the weights are still the same. For one rank and one minibatch per epoch.
        """
        self.engine, self.microbatch_size, self.microbatch_tokens = engine, microbatch_size, microbatch_tokens
        self.reuse_forward = reuse_forward
        self._kept: dict[int, list[tuple[list[int], Any]]] = {}  # chunk -> its rows and outputs
        self._kept_step = -1

    def forget(self) -> None:
        """The weights are others from now on: outputs of the old ones are of no use."""
        self._kept, self._kept_step = {}, -1

    def _loss(self, output, floats: Sequence[torch.Tensor], mask, step: OptimiserStep) -> tuple[torch.Tensor, Stats]:
        """floats: the arrays of `_floats`, each padded to [b, T]."""
        raise NotImplementedError

    def _floats(self, shard: Shard) -> list[np.ndarray]:
        """What the loss needs of the shard, each float32 [N]."""
        raise NotImplementedError

    def _is_enough(self, stats: dict[str, float]) -> bool:
        """Whether to skip the update's remaining steps; the same answer on every rank."""
        return False

    def _forward(self, rollout: RolloutBatch, **options: bool) -> Iterator[tuple[list[int], Any]]:
        """Each microbatch's rows and the module's output."""
        sequences = rollout.sequences
        prompts, responses, supports = sequences.prompts(), sequences.responses(), self._supports(sequences)
        for rows in self._microbatches(sequences.lengths):
            batch = self._batch([prompts[row] for row in rows], [responses[row] for row in rows], [supports[row] for row in rows])
            yield rows, self.engine.forward(batch, **options)

    def _first_forward(self, rollout: RolloutBatch, **options: bool) -> Iterator[tuple[list[int], Any]]:
        """As `_forward`; with reuse_forward, the outputs are kept for the update's first step."""
        if not self.reuse_forward or rollout.chunk.evaluation:  # nothing trains on held-out rows
            yield from self._forward(rollout, **options)
            return
        if rollout.chunk.step != self._kept_step:
            self._kept, self._kept_step = {}, rollout.chunk.step
        kept = self._kept[rollout.chunk.index] = []
        for rows, output in self._forward(rollout, keep_graph=True, **options):
            several = isinstance(output, tuple)
            kept.append((rows, output[0] if several and not self._extra_inputs else output))
            yield rows, tuple(each.detach() for each in output) if several else output.detach()

    def _take_kept(self, shard: Shard) -> list[tuple[np.ndarray, torch.Tensor]]:
        """What `_first_forward` kept of the shard's rows (those of the chunks, in order); [] if it did not keep all."""
        kept, self._kept = self._kept if self._kept_step == shard.step else {}, {}
        found, first = [], 0
        for chunk in sorted(kept):
            found += [(first + np.array(rows), output) for rows, output in kept[chunk]]
            first += sum(len(rows) for rows, _ in kept[chunk])
        return found if first == len(shard.schedule[0].rows) == len(shard.sequences) else []

    def _microbatches(self, lengths: np.ndarray) -> list[list[int]]:
        """Rows of each forward pass. All ranks make the same number of passes: ZeRO-3 gathers weights in each, and
        gradients are reduced after the last."""
        cut = partial(cut_microbatches, lengths.tolist(), size=self.microbatch_size, tokens=self.microbatch_tokens)
        groups = cut()
        if self.microbatch_tokens is None:
            return groups  # by rows: the recipe's sizes divide evenly
        return cut(at_least=self.engine.most_over_ranks(len(groups)))

    def _supports(self, sequences: Sequences) -> Sequence[Support | None]:
        """What each row's tokens were drawn among; None: all, or this role does not ask."""
        return (self.reads_support and sequences.supports()) or [None] * len(sequences)

    def _batch(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], supports: Sequence[Support | None]
    ) -> TokenBatch:
        given = [support for support in supports if support is not None] or None
        return token_batch(prompts, responses, given, packed=bool(self.engine.module.packed), device=self.engine.device)

    def update(self, shard: Shard, learning_rate: float) -> dict[str, float]:
        """All optimiser steps of the shard's schedule. Statistics are this rank's share: summing over ranks gives the
        mean over tokens, except for the gradient norm (`.../grad_norm`), which is the same on every rank.

        `first_` statistics are those of the first minibatch, where the ratio must still be 1; the others are means over
        the optimiser steps that were taken.
        """
        data, lengths, kept = self._device_rows(shard), shard.sequences.lengths, self._take_kept(shard)
        totals: list[dict[str, float]] = []
        norms = []
        for step in shard.schedule:
            stats: list[Stats] = []

            def loss_of(output: Any, rest: Any, step: OptimiserStep = step, stats: list[Stats] = stats) -> torch.Tensor:
                floats, mask = rest
                loss, part = self._loss(output, floats, mask, step)
                stats.append(part)
                return loss

            if kept:
                batches, kept = self._kept_batches(data, kept), []
            else:
                parts = [step.rows[rows] for rows in self._microbatches(lengths[step.rows])]
                batches = self._train_batches(data, parts)
            try:
                norms.append(self.engine.step(batches, loss_of, learning_rate=learning_rate))
            except NotFinite as error:
                raise NotFinite(
                    f"{self.name} update of step {shard.step}, optimiser step {len(norms) + 1} of {len(shard.schedule)}: "
                    f"{error}, so it is not taken; {UPDATE_REMEDY}"
                ) from error
            totals.append({name: float(sum(part[name] for part in stats)) for name in stats[0]})
            if self._is_enough(totals[-1]):
                break
        mean = {name: float(np.mean([total[name] for total in totals])) for name in totals[0]}
        first = {f"first_{name}": value for name, value in totals[0].items()}
        steps = {f"{self.name}/grad_norm": float(np.mean(norms)), f"{self.name}/optimiser_steps": float(len(norms))}
        return mean | first | steps

    def _device_rows(self, shard: Shard) -> list[tuple[np.ndarray, ...]]:
        lengths = shard.sequences.response_lengths
        floats = [unflatten(flat, lengths) for flat in self._floats(shard)]
        sequences = shard.sequences
        return list(zip(sequences.prompts(), sequences.responses(), self._supports(sequences), *floats, strict=True))

    def _train_batches(self, data, parts: list[np.ndarray]) -> Iterator[tuple[tuple, tuple]]:
        """(the module's inputs, (floats, mask)) of each microbatch."""
        device = self.engine.device
        for rows in parts:
            prompts, responses, supports, *floats = zip(*(data[row] for row in rows), strict=True)
            batch = self._batch(prompts, responses, supports)
            yield (batch, *self._extra_inputs), ([pad_tokens(each, device) for each in floats], batch.action_mask)

    def _kept_batches(self, data, kept: list[tuple[np.ndarray, torch.Tensor]]) -> Iterator[tuple[Forwarded, tuple]]:
        """The same for kept outputs; each graph is freed by its backward pass."""
        device = self.engine.device
        while kept:
            rows, output = kept.pop(0)
            _, responses, _, *floats = zip(*(data[row] for row in rows), strict=True)
            lengths = torch.tensor([len(response) for response in responses], device=device)
            yield Forwarded(output), ([pad_tokens(each, device) for each in floats], action_mask(lengths))

    #: what the module's forward takes beside the batch when training
    _extra_inputs: tuple = ()
    reads_support = False  # whether the outputs depend on what the tokens were drawn among

    name: str


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
            engine.module.entropy_gradient = True

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
        values = _in_order(parts, rollout.sequences)
        return TokenValues(values=values, entropy=entropy / len(values))

    def reference_logprobs(self, rollout: RolloutBatch) -> TokenValues:
        """ref_logprobs of a chunk's responses: those of the policy with its adapter off, as `Reference` computes them."""
        with adapter_off(self.engine.module):
            return TokenValues(values=_in_order(self._forward(rollout), rollout.sequences))

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
        return TokenValues(values=_in_order(self._first_forward(rollout), rollout.sequences))

    def _floats(self, shard):
        return [shard.old_values, shard.returns]

    def _loss(self, output, floats, mask, step):
        old_values, returns = floats
        loss, stats = value_loss(
            output, old_values, returns, mask, value_clip_range=self.value_clip_range, num_tokens=step.num_tokens
        )
        return self.vf_coef * loss, stats


def _in_order(parts: Iterable[tuple[list[int], torch.Tensor]], sequences: Sequences) -> np.ndarray:
    """The [b, T] of each microbatch as one flat array in order of rows."""
    found: dict[int, np.ndarray] = {}
    for rows, padded in parts:
        found |= dict(zip(rows, padded.float().cpu().numpy(), strict=True))
    lengths = sequences.response_lengths
    return flatten((found[row][: lengths[row]] for row in range(len(sequences))), np.float32)

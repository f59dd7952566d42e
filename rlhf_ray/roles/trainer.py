"""What the two trained roles share: forward passes over a chunk, and one update over a shard. `policy_trainer` and
`critic_trainer` add their losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, NotRequired, TypedDict, TypeVar

import numpy as np
import torch

from rlhf_ray.algorithms.losses import Stats
from rlhf_ray.algorithms.schedule import cut_microbatches
from rlhf_ray.errors import NotFinite
from rlhf_ray.messages import OptimiserStep, RolloutBatch, Sequences, Support, TrainShard, flatten, unflatten
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


class Trainer(ABC, Generic[Shard]):
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

    @abstractmethod
    def _loss(self, output, floats: Sequence[torch.Tensor], mask, step: OptimiserStep) -> tuple[torch.Tensor, Stats]:
        """floats: the arrays of `_floats`, each padded to [b, T]."""

    @abstractmethod
    def _floats(self, shard: Shard) -> list[np.ndarray]:
        """What the loss needs of the shard, each float32 [N]."""

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


def in_order(parts: Iterable[tuple[list[int], torch.Tensor]], sequences: Sequences) -> np.ndarray:
    """The [b, T] of each microbatch as one flat array in order of rows."""
    found: dict[int, np.ndarray] = {}
    for rows, padded in parts:
        found |= dict(zip(rows, padded.float().cpu().numpy(), strict=True))
    lengths = sequences.response_lengths
    return flatten((found[row][: lengths[row]] for row in range(len(sequences))), np.float32)

"""What processes send each other: frozen, slotted, keyword-only, checked once. Arrays are numpy, flat and unpadded.

B rollouts of a chunk; N action tokens of them all together. Row b's tokens stand in the flat arrays after those of
the rows before it (`np.split(flat, np.cumsum(lengths)[:-1])`). Read only: what came from the object store is shared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


def flatten(rows: Iterable[np.ndarray], dtype) -> np.ndarray:
    """Rows of different lengths, one after the other."""
    rows = list(rows)
    return np.concatenate(rows).astype(dtype, copy=False) if rows else np.empty(0, dtype)


def unflatten(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The inverse of `flatten`, as views."""
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A fixed batch of responses to draw. The result depends on it, the weights and the seed, and on nothing else."""

    step: int
    index: int  # among the step's chunks
    prompt_indices: tuple[int, ...]  # rows of the prompt set
    sample_indices: tuple[int, ...]  # which sample of its prompt each row is
    evaluation: bool = False  # rows of the held-out prompts instead

    def __post_init__(self):
        assert len(self.prompt_indices) == len(self.sample_indices) > 0

    def where(self, row: int) -> str:
        """One of its rows in words."""
        if self.step < 0:
            return f"a sample for the normalisation, number {self.prompt_indices[row]}"
        kind = "evaluation, held-out prompt" if self.evaluation else f"step {self.step}, prompt"
        return f"{kind} {self.prompt_indices[row]}, sample {self.sample_indices[row]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What each of N response tokens was drawn among, where sampling drops unlikely tokens (top_k, top_p, min_p)."""

    ids: np.ndarray  # int32, flat
    counts: np.ndarray  # int32 [N]
    log_mass: np.ndarray  # float32 [N]: log of their probability before the others were dropped

    def __post_init__(self):
        assert len(self.counts) == len(self.log_mass) and self.counts.sum() == len(self.ids)

    @classmethod
    def of(cls, tokens: Iterable[np.ndarray], log_mass: np.ndarray) -> Support:
        """tokens: an array of ids for each response token."""
        tokens = list(tokens)
        counts = np.array([len(ids) for ids in tokens], np.int32)
        return cls(ids=flatten(tokens, np.int32), counts=counts, log_mass=log_mass)

    @classmethod
    def join(cls, parts: Iterable[Support]) -> Support:
        parts = list(parts)
        each = [np.concatenate(arrays) for arrays in zip(*((one.ids, one.counts, one.log_mass) for one in parts), strict=True)]
        return cls(ids=each[0], counts=each[1], log_mass=each[2])

    def split(self, lengths: np.ndarray) -> list[Support]:
        """One for each row of this many response tokens."""
        counts, log_mass = unflatten(self.counts, lengths), unflatten(self.log_mass, lengths)
        ids = unflatten(self.ids, np.array([part.sum() for part in counts], np.int64))
        return [Support(ids=i, counts=c, log_mass=m) for i, c, m in zip(ids, counts, log_mass, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Prompts and responses as token ids."""

    prompt_ids: np.ndarray  # int32, flat
    prompt_lengths: np.ndarray  # int64 [B]
    response_ids: np.ndarray  # int32 [N], EOS included where the policy chose it
    response_lengths: np.ndarray  # int64 [B]
    support: Support | None = None  # None: every token was drawn among all

    def __post_init__(self):
        assert self.support is None or len(self.support.counts) == len(self.response_ids)
        assert self.prompt_lengths.sum() == len(self.prompt_ids)
        assert self.response_lengths.sum() == len(self.response_ids)
        assert len(self.prompt_lengths) == len(self.response_lengths)
        assert (self.response_lengths > 0).all(), "a response has at least one token"

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> np.ndarray:
        """[B] tokens of prompt and response together."""
        return self.prompt_lengths + self.response_lengths

    def prompts(self) -> list[np.ndarray]:
        return unflatten(self.prompt_ids, self.prompt_lengths)

    def responses(self) -> list[np.ndarray]:
        return unflatten(self.response_ids, self.response_lengths)

    def supports(self) -> list[Support] | None:
        """Of each row."""
        return None if self.support is None else self.support.split(self.response_lengths)

    @classmethod
    def of(
        cls, prompts: Iterable[np.ndarray], responses: Iterable[np.ndarray], supports: Iterable[Support] | None = None
    ) -> Sequences:
        prompts, responses = list(prompts), list(responses)
        return cls(
            prompt_ids=flatten(prompts, np.int32),
            prompt_lengths=np.array([len(p) for p in prompts], np.int64),
            response_ids=flatten(responses, np.int32),
            response_lengths=np.array([len(r) for r in responses], np.int64),
            support=None if supports is None else Support.join(supports),
        )

    @classmethod
    def join(cls, parts: Iterable[Sequences]) -> Sequences:
        """The rows of several, one after the other."""
        parts = list(parts)
        supports = [one.support for one in parts if one.support is not None]
        assert len(supports) in (0, len(parts)), "all were drawn in the same way"
        return cls.of(
            [ids for one in parts for ids in one.prompts()], [ids for one in parts for ids in one.responses()], supports or None
        )

    def rows(self, index: Iterable[int]) -> Sequences:
        prompts, responses, supports = self.prompts(), self.responses(), self.supports()
        index = list(index)
        return Sequences.of(
            [prompts[i] for i in index], [responses[i] for i in index],
            None if supports is None else [supports[i] for i in index],
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """One chunk, answered."""

    chunk: Chunk
    policy_version: int
    sequences: Sequences
    rollout_logprobs: np.ndarray  # float32 [N], as the generator drew them
    ended: np.ndarray  # bool [B], the policy chose EOS (or a stop string came)

    def __post_init__(self):
        assert len(self.rollout_logprobs) == len(self.sequences.response_ids)
        assert len(self.ended) == len(self.sequences) == len(self.chunk.prompt_indices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The scores of B responses, and what they are made of."""

    total: np.ndarray  # float32 [B]: PPO's reward, before the missing-EOS penalty and the KL penalty
    terms: dict[str, np.ndarray] = field(default_factory=dict)  # with several rewards: name -> float32 [B], unweighted
    disagreement: np.ndarray | None = None  # float32 [B]: deviation over the members of an ensemble of reward models
    late: np.ndarray | None = None  # bool [B]: over the time limit, for a function that has one

    def __len__(self) -> int:
        return len(self.total)

    @classmethod
    def join(cls, parts: Iterable[Scores]) -> Scores:
        """The scores of several chunks, one after the other."""
        parts = list(parts)
        first = parts[0]
        return cls(
            total=np.concatenate([part.total for part in parts]),
            terms={name: np.concatenate([part.terms[name] for part in parts]) for name in first.terms},
            disagreement=None
            if first.disagreement is None
            else np.concatenate([part.disagreement for part in parts if part.disagreement is not None]),
            late=None if first.late is None else np.concatenate([part.late for part in parts if part.late is not None]),
        )

    def rows(self, index: list[int]) -> Scores:
        return Scores(
            total=self.total[index],
            terms={name: values[index] for name, values in self.terms.items()},
            disagreement=None if self.disagreement is None else self.disagreement[index],
            late=None if self.late is None else self.late[index],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenValues:
    """One float per response token, e.g. log-probs or values of a chunk."""

    values: np.ndarray  # float32 [N]
    entropy: float = 0.0  # mean nats per token, where the role knows it


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserStep:
    """The rows of a shard that one optimiser step of this rank trains on."""

    rows: np.ndarray  # int64
    num_tokens: int  # action tokens of the minibatch over all ranks: what the loss divides by
    num_sequences: int  # rollouts of the minibatch over all ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainShard:
    """What one rank needs for one update, and nothing else."""

    step: int
    sequences: Sequences
    schedule: tuple[OptimiserStep, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyShard(TrainShard):
    """A policy rank's part of the experience."""

    old_logprobs: np.ndarray  # float32 [N]
    advantages: np.ndarray  # float32 [N]
    ref_logprobs: np.ndarray | None = None  # float32 [N], where the KL is part of the policy's loss

    def __post_init__(self):
        assert len(self.old_logprobs) == len(self.advantages) == len(self.sequences.response_ids)
        assert self.ref_logprobs is None or len(self.ref_logprobs) == len(self.old_logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticShard(TrainShard):
    """A critic rank's part of the experience."""

    old_values: np.ndarray  # float32 [N]
    returns: np.ndarray  # float32 [N]

    def __post_init__(self):
        assert len(self.old_values) == len(self.returns) == len(self.sequences.response_ids)

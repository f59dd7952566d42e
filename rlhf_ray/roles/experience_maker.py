"""Makes the experience from the other roles' results for a rollout, and cuts it into one training shard per rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from rlhf_ray.algorithms.experience import AdvantageConfig, WrongEstimate, assemble, penalise
from rlhf_ray.algorithms.finite_values import BadNumber, check_finite
from rlhf_ray.algorithms.off_policy import mismatch, off_policy_stats, truncated_importance
from rlhf_ray.algorithms.schedule import deal_rows, draw_seed, minibatch_rows
from rlhf_ray.algorithms.scores import zero_variance_groups
from rlhf_ray.errors import NotFinite, UserError
from rlhf_ray.messages import (
    Chunk,
    CriticShard,
    OptimiserStep,
    PolicyShard,
    RolloutBatch,
    Scores,
    Sequences,
    TokenValues,
    flatten,
    unflatten,
)
from rlhf_ray.training.padding import action_mask, pad_tokens

EXPERIENCE_REMEDY = "look at that sample's score, lower ppo.learning_rate, or set ppo.precision to float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperienceConfig:
    """What this role takes from the recipe."""

    advantages: AdvantageConfig
    minibatch_size: int
    ppo_epochs: int
    policy_ranks: int
    critic_ranks: int  # 0: no critic
    seed: int
    importance_cap: float | None = None  # for tokens that an older policy drew; None: there are none


class ExperienceMaker:
    """Works on [B, T] floats of the whole rollout batch; token ids only pass through, as arrays."""

    def __init__(self, config: ExperienceConfig):
        self.config = config

    def assemble(
        self,
        rollouts: list[RolloutBatch],
        scores: list[Scores],
        ref_logprobs: list[TokenValues],
        old_logprobs: list[TokenValues],
        old_values: list[TokenValues],
        kl_coef: float,
    ) -> tuple[dict[str, float], list[PolicyShard], list[CriticShard]]:
        """(statistics, one shard per policy rank, one shard per critic rank). Lists have one entry per chunk, in order;
        old_values is empty where there is no critic."""
        config, step = self.config, rollouts[0].chunk.step
        sequences = Sequences.join(rollout.sequences for rollout in rollouts)
        lengths = sequences.response_lengths
        mask = action_mask(torch.from_numpy(lengths))

        def padded(flats: list[np.ndarray]) -> torch.Tensor:
            return pad_tokens(unflatten(np.concatenate(flats), lengths))

        logprobs = padded([part.values for part in old_logprobs])
        reference = padded([part.values for part in ref_logprobs])
        values = padded([part.values for part in old_values]) if old_values else None
        drawn = padded([rollout.rollout_logprobs for rollout in rollouts])
        together = Scores.join(scores)
        ended = torch.from_numpy(np.concatenate([rollout.ended for rollout in rollouts]))
        try:
            result = assemble(
                torch.from_numpy(together.total), ended, drawn, logprobs, reference, values, mask, config.advantages,
                kl_coef=kl_coef,
            )  # fmt: skip
        except WrongEstimate as error:
            raise UserError(str(error)) from error
        except BadNumber as error:
            raise NotFinite(f"{error} ({where(rollouts, error.row)}); {EXPERIENCE_REMEDY}") from error
        tokens = np.array([len(part.values) for part in old_logprobs])
        entropies = np.array([part.entropy for part in old_logprobs])
        stats = result.stats | score_stats(together, "objective") | support_stats(sequences) | {
            "policy/entropy": float((entropies * tokens).sum() / tokens.sum()),
            "rollout/tokens": float(tokens.sum()),
            "rollout/policy_version_min": float(min(rollout.policy_version for rollout in rollouts)),
        }  # fmt: skip
        advantages = result.advantages
        if config.importance_cap is not None:
            # The factor is not negative, so it may multiply the advantages inside the loss's max and min, not the loss.
            cap = config.importance_cap
            importance = truncated_importance(logprobs, drawn, mask, cap=cap)
            advantages = advantages * importance
            try:
                check_finite("an advantage, weighted for its age,", advantages, mask)
            except BadNumber as error:
                raise NotFinite(f"{error} ({where(rollouts, error.row)}); {EXPERIENCE_REMEDY}") from error
            stats = {name: value for name, value in stats.items() if not name.startswith("policy/mismatch_")}
            stats |= off_policy_stats(importance, logprobs, drawn, ages_of(rollouts), mask, cap=cap)
        # One permutation for policy and critic: they see the same minibatches, as one network with two heads would.
        schedule = minibatch_rows(
            len(sequences), config.minibatch_size, config.ppo_epochs, draw_seed(config.seed, "minibatches", step)
        )
        policy = policy_shards(
            step, rank_parts(sequences, schedule, config.policy_ranks), logprobs, advantages,
            None if config.advantages.kl_in_reward else reference,
        )  # fmt: skip
        critic: list[CriticShard] = []
        if values is not None and result.returns is not None:
            critic = critic_shards(
                step, rank_parts(sequences, schedule, config.critic_ranks), values, result.returns
            )
        return stats, policy, critic

    def own_mismatch(self, rollouts: list[RolloutBatch], logprobs: list[TokenValues]) -> dict[str, float]:
        """The mismatch of generator and policy on rollouts for which both have the same weights."""
        flats = [rollout.rollout_logprobs for rollout in rollouts], [part.values for part in logprobs]
        drawn, own = (torch.from_numpy(np.concatenate(each)) for each in flats)
        return mismatch(own, drawn, torch.ones_like(own, dtype=torch.bool))

    def zero_variance(self, rollouts: list[RolloutBatch], scores: list[Scores]) -> list[bool]:
        """For each prompt of the chunks, in order, whether its samples all score the same: as the advantages see the scores,
        clipped and less the penalties."""
        config = self.config.advantages
        ended = torch.from_numpy(np.concatenate([rollout.ended for rollout in rollouts]))
        lengths = np.concatenate([rollout.sequences.response_lengths for rollout in rollouts])
        together = torch.from_numpy(Scores.join(scores).total)
        penalised = penalise(together, ended, action_mask(torch.from_numpy(lengths)), config)
        return zero_variance_groups(penalised, group_size=config.group_size).tolist()

    def pack(
        self, rollouts: list[RolloutBatch], scores: list[Scores], prompts: int, chunk_size: int
    ) -> tuple[list[RolloutBatch], list[Scores]]:
        """Chunks of chunk_size rows with `prompts` prompts in all, in the order drawn: prompts whose samples score
        differently and, if these are too few, zero-variance groups."""
        size = self.config.advantages.group_size
        zero_variance = np.array(self.zero_variance(rollouts, scores))
        best = np.argsort(zero_variance, kind="stable")[:prompts]  # False before True
        rows = [row for group in sorted(best) for row in range(group * size, (group + 1) * size)]
        parts = [rows[start : start + chunk_size] for start in range(0, len(rows), chunk_size)]
        together = Scores.join(scores)
        packed = [gather(rollouts, part, chunk) for chunk, part in enumerate(parts)]
        return packed, [together.rows(part) for part in parts]

    def evaluate(
        self,
        rollouts: list[RolloutBatch],
        scores: list[Scores],
        ref_logprobs: list[TokenValues],
        judged: list[Scores],
    ) -> dict[str, float]:
        """Figures of held-out rollouts; `judged` is empty where no judge was asked. The policy's log-probs are the
        generator's: no trainer is needed."""
        flat = np.concatenate([rollout.rollout_logprobs for rollout in rollouts])
        kl = flat - np.concatenate([part.values for part in ref_logprobs])
        rows = sum(len(rollout.sequences) for rollout in rollouts)
        together = Scores.join(scores)
        judge = {"eval/judge": float(Scores.join(judged).total.mean())} if judged else {}
        return judge | score_stats(together, "eval") | {
            "eval/score": float(together.total.mean()),
            "eval/kl": float(kl.sum() / rows),
            "eval/response_length": len(flat) / rows,
            "eval/eos_rate": float(np.concatenate([rollout.ended for rollout in rollouts]).mean()),
        }  # fmt: skip


def where(rollouts: list[RolloutBatch], row: int) -> str:
    """A row of the batch in words."""
    for rollout in rollouts:
        if row < len(rollout.sequences):
            return rollout.chunk.where(row)
        row -= len(rollout.sequences)
    raise IndexError(row)


def ages_of(rollouts: list[RolloutBatch]) -> torch.Tensor:
    """[B] policy versions from the weights that drew a row to those that train on it, whose version is the step."""
    ages = torch.tensor([rollout.chunk.step - rollout.policy_version for rollout in rollouts])
    assert (ages >= 0).all(), "drawn by weights that are not there yet"
    return ages.repeat_interleave(torch.tensor([len(rollout.sequences) for rollout in rollouts]))


def score_stats(scores: Scores, prefix: str) -> dict[str, float]:
    """Statistics of scores beside their total: mean of each term, mean disagreement, number of time-outs."""
    stats = {f"{prefix}/score/{name}": float(values.mean()) for name, values in scores.terms.items()}
    if scores.disagreement is not None:
        stats[f"{prefix}/disagreement"] = float(scores.disagreement.mean())
    if scores.late is not None:
        stats[f"{prefix}/timeouts"] = float(scores.late.sum())
    return stats


def support_stats(sequences: Sequences) -> dict[str, float]:
    """How much probability sampling keeps, where it drops tokens: mean log of a token's kept mass; 0 would be all of it."""
    support = sequences.support
    return {} if support is None else {"rollout/log_kept_mass": float(support.log_mass.mean(dtype=np.float64))}


def gather(rollouts: list[RolloutBatch], rows: list[int], chunk: int) -> RolloutBatch:
    """One chunk with these rows of several rollouts; rows are numbered through all of them."""
    logprobs = [
        row for rollout in rollouts for row in unflatten(rollout.rollout_logprobs, rollout.sequences.response_lengths)
    ]
    places = [place for rollout in rollouts for place in zip(
        rollout.chunk.prompt_indices, rollout.chunk.sample_indices, strict=True
    )]  # fmt: skip
    ended = np.concatenate([rollout.ended for rollout in rollouts])
    return RolloutBatch(
        chunk=Chunk(
            step=rollouts[0].chunk.step, index=chunk, prompt_indices=tuple(places[row][0] for row in rows),
            sample_indices=tuple(places[row][1] for row in rows),
        ),
        policy_version=min(rollout.policy_version for rollout in rollouts),
        sequences=Sequences.join(rollout.sequences for rollout in rollouts).rows(rows),
        rollout_logprobs=flatten((logprobs[row] for row in rows), np.float32),
        ended=ended[rows],
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPart:
    """The rows of the experience that one rank needs, each once, and its part of each minibatch."""

    rows: list[int]
    sequences: Sequences
    schedule: tuple[OptimiserStep, ...]

    def of(self, padded: torch.Tensor) -> np.ndarray:
        """The part's rows of a [B, T] tensor, flat and unpadded: float32 [N]."""
        lengths = self.sequences.response_lengths
        return flatten((padded[row, :length].numpy() for row, length in zip(self.rows, lengths, strict=True)), np.float32)


def rank_parts(sequences: Sequences, schedule: list[list[int]], ranks: int) -> list[RankPart]:
    """Each rank takes its rows of each minibatch."""
    lengths = sequences.response_lengths
    dealt = [deal_rows(rows, sequences.lengths.tolist(), ranks) for rows in schedule]
    parts = []
    for rank in range(ranks):
        rank_rows = [minibatch[rank] for minibatch in dealt]
        needed = sorted({row for rows in rank_rows for row in rows})
        place = {row: i for i, row in enumerate(needed)}
        steps = tuple(
            OptimiserStep(
                rows=np.array([place[row] for row in mine]),
                num_tokens=int(lengths[rows].sum()),
                num_sequences=len(rows),
            )
            for rows, mine in zip(schedule, rank_rows, strict=True)
        )
        parts.append(RankPart(rows=needed, sequences=sequences.rows(needed), schedule=steps))
    return parts


def policy_shards(
    step: int,
    parts: list[RankPart],
    old_logprobs: torch.Tensor,  # [B, T]
    advantages: torch.Tensor,  # [B, T]
    ref_logprobs: torch.Tensor | None,  # [B, T]
) -> list[PolicyShard]:
    return [
        PolicyShard(
            step=step, sequences=part.sequences, schedule=part.schedule, old_logprobs=part.of(old_logprobs),
            advantages=part.of(advantages), ref_logprobs=None if ref_logprobs is None else part.of(ref_logprobs),
        )
        for part in parts
    ]  # fmt: skip


def critic_shards(
    step: int,
    parts: list[RankPart],
    old_values: torch.Tensor,  # [B, T]
    returns: torch.Tensor,  # [B, T]
) -> list[CriticShard]:
    return [
        CriticShard(
            step=step, sequences=replace(part.sequences, support=None), schedule=part.schedule, old_values=part.of(old_values),
            returns=part.of(returns),
        )
        for part in parts
    ]  # fmt: skip

"""Scores chunks."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config.columns import Columns
from rlhf_ray.data.store import PromptColumns
from rlhf_ray.messages import Chunk, RolloutBatch, Scores
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.rewards.finite import ModelScore, UserScore, check_scores
from rlhf_ray.rewards.scorer import Scorer
from rlhf_ray.roles.text import decode_sequences


class Reward:
    """Scores the policy's token ids: they are decoded to text, and the scorer encodes it with its own tokenizer."""

    def __init__(
        self,
        scorer: Scorer,
        policy_folder: str | Path,
        *,
        judge: Scorer | None = None,
        stop: tuple[str, ...] = (),
        trust_remote_code: bool = False,
        columns: tuple[PromptColumns, PromptColumns] | None = None,
    ):
        """columns: the other columns of the prompts and of the held-out prompts, for scorers that ask for them."""
        self.columns = columns
        self.scorer, self.judge_scorer, self.stop = scorer, judge, stop
        self.tokenizer = load_tokenizer(policy_folder, trust_remote_code)

    def score(self, rollout: RolloutBatch) -> Scores:
        """The scores before the missing-EOS penalty and the KL penalty; all finite."""
        return self._score(self.scorer, rollout, "reward")

    def judge(self, rollout: RolloutBatch) -> Scores:
        """The same by the independent judge."""
        assert self.judge_scorer is not None, "only ppo.judge_evaluations asks the judge"
        return self._score(self.judge_scorer, rollout, "judge")

    def _score(self, scorer: Scorer, rollout: RolloutBatch, name: str) -> Scores:
        prompts, responses = decode_sequences(self.tokenizer, rollout.sequences, self.stop)
        try:
            scores = scorer.score(prompts, responses, rollout.ended.tolist(), self._columns_of(rollout.chunk))
            return check_scores(scores, f"the {name}'s score ({type(scorer).__name__}) is", prompts, responses)
        except (UserScore, ModelScore) as error:
            raise type(error)(f"{error} ({rollout.chunk.where(error.place)})") from error

    def _columns_of(self, chunk: Chunk) -> Columns:
        return {} if self.columns is None else self.columns[chunk.evaluation].of(chunk.prompt_indices)

    def texts(self, rollout: RolloutBatch, count: int) -> list[tuple[str, str]]:
        """The first `count` (prompt, response) pairs, to show."""
        prompts, responses = decode_sequences(self.tokenizer, rollout.sequences, self.stop)
        return list(zip(prompts, responses, strict=True))[:count]

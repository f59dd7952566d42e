"""Scores units of work."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.roles.scorer import Scorer
from rlhf_ray.roles.text import decode_sequences
from rlhf_ray.types import RolloutBatch


class Reward:
    """A scorer that reads the policy's token ids: they become text, and the scorer's own tokenizer reads that."""

    def __init__(
        self,
        scorer: Scorer,
        policy_folder: str | Path,
        *,
        stop: tuple[str, ...] = (),
        trust_remote_code: bool = False,
    ):
        self.scorer, self.stop = scorer, stop
        self.tokenizer = load_tokenizer(policy_folder, trust_remote_code)

    def score(self, rollout: RolloutBatch) -> np.ndarray:
        """float32 [B], before the missing-EOS penalty and KL."""
        prompts, responses = decode_sequences(self.tokenizer, rollout.sequences, self.stop)
        return self.scorer.score(prompts, responses, rollout.ended.tolist())

    def texts(self, rollout: RolloutBatch, count: int) -> list[tuple[str, str]]:
        """The first `count` (prompt, response) pairs, to show."""
        prompts, responses = decode_sequences(self.tokenizer, rollout.sequences, self.stop)
        return list(zip(prompts, responses, strict=True))[:count]

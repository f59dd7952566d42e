"""Fake roles as real Ray actors: they answer at once, with arrays of the right shapes and numbers that pass the gates.

One process stands for many actors: its calls run in threads, and the controller gets the same process under many numbers.
What the controller does for each of them (calls, references, receipts, waits) is what it does for real ones.
"""

from __future__ import annotations

import numpy as np
import ray

from rlhf_ray.actors.receipt import with_receipt
from rlhf_ray.messages import Chunk, RolloutBatch, Scores, Sequences, TokenValues, flatten


@ray.remote
class Fakes:
    """All roles but the experience. Every row has `prompt` and `response` tokens."""

    shares_gpu = False

    def __init__(self, prompt: int, response: int, weight_bytes: int):
        self.prompt, self.response, self.weight_bytes = prompt, response, weight_bytes

    def nothing(self, *args):
        """What one call costs."""
        return None

    @with_receipt
    def generate(self, chunk: Chunk) -> RolloutBatch:
        rows = len(chunk.prompt_indices)
        return RolloutBatch(
            chunk=chunk, policy_version=chunk.step,
            sequences=Sequences.of([np.arange(self.prompt)] * rows, [np.arange(self.response)] * rows),
            rollout_logprobs=np.full(rows * self.response, -8.0, np.float32), ended=np.ones(rows, bool),
        )  # fmt: skip

    def load_weights(self, policy_version: int, *parts) -> int:
        return policy_version

    @with_receipt
    def score(self, rollout: RolloutBatch) -> Scores:
        return Scores(total=np.array(rollout.chunk.prompt_indices, np.float32))

    def texts(self, rollout: RolloutBatch, count: int) -> list[tuple[str, str]]:
        return [("a prompt", "a response")] * count

    @with_receipt
    def logprobs(self, rollout: RolloutBatch) -> TokenValues:
        return TokenValues(values=rollout.rollout_logprobs.copy())

    @with_receipt
    def values(self, rollout: RolloutBatch) -> TokenValues:
        responses = rollout.sequences.responses()
        return TokenValues(values=flatten((np.linspace(0, 1, len(row)) for row in responses), np.float32))

    @with_receipt
    def update(self, shard, *rates: float) -> dict[str, float]:
        return {"first_policy/approx_kl": 0.0, "tokens": float(len(shard.sequences.response_ids))}

    @with_receipt
    def weights(self, parts: int) -> list[dict[str, np.ndarray]]:
        return [{"weight": np.zeros(self.weight_bytes // parts, np.uint8)} for _ in range(parts)]

"""The frozen policy that PPO stays close to."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_ray.messages import RolloutBatch, TokenValues, flatten
from rlhf_ray.models.load import disable_dropout, fast_attention, load_causal_lm, to_device
from rlhf_ray.training.forward import response_logprobs


class Reference:
    """Log-probs of a chunk's responses under the SFT model, computed just as the policy computes its own."""

    def __init__(
        self,
        folder: str | Path,
        *,
        temperature: float,
        compute_dtype: torch.dtype,
        device: torch.device | str = "cpu",
        microbatch_size: int = 32,
        microbatch_tokens: int | None = None,
        trust_remote_code: bool = False,
    ):
        self.model = to_device(load_causal_lm(folder, None, trust_remote_code), device)
        disable_dropout(self.model)
        fast_attention(self.model, device)
        self.temperature, self.compute_dtype = temperature, compute_dtype
        self.microbatch_size, self.microbatch_tokens = microbatch_size, microbatch_tokens

    def logprobs(self, rollout: RolloutBatch) -> TokenValues:
        sequences = rollout.sequences
        rows = response_logprobs(
            self.model, sequences.prompts(), sequences.responses(), sequences.supports(), temperature=self.temperature,
            compute_dtype=self.compute_dtype, microbatch_size=self.microbatch_size, microbatch_tokens=self.microbatch_tokens,
        )  # fmt: skip
        return TokenValues(values=flatten(rows, "float32"))

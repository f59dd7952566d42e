"""The frozen policy that PPO stays close to."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_ray.messages import RolloutBatch, TokenValues, flatten
from rlhf_ray.models.float_head import logits_in_float32
from rlhf_ray.models.frozen import hold_frozen
from rlhf_ray.models.load import disable_dropout, fast_attention, load_causal_lm, to_device
from rlhf_ray.training.forward import LogprobModel, module_logprobs


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
        float32_head: bool = False,
    ):
        model = fast_attention(load_causal_lm(folder, None, trust_remote_code), device)
        if float32_head:
            logits_in_float32(model, compute_dtype)
        disable_dropout(model)
        model.requires_grad_(False)
        self.module = LogprobModel(model, temperature=temperature, compute_dtype=compute_dtype)
        hold_frozen(self.module, compute_dtype)
        self.model = to_device(model, device)
        self.microbatch_size, self.microbatch_tokens = microbatch_size, microbatch_tokens

    def logprobs(self, rollout: RolloutBatch) -> TokenValues:
        sequences = rollout.sequences
        rows = module_logprobs(
            self.module, sequences.prompts(), sequences.responses(), sequences.supports(),
            microbatch_size=self.microbatch_size, microbatch_tokens=self.microbatch_tokens,
        )  # fmt: skip
        return TokenValues(values=flatten(rows, "float32"))

"""Logits of one row, changed as a served request asks.   V vocabulary entries.

The order is vLLM's: bias and forbidden tokens, then the repetition penalty, then those of frequency and presence.
"""

from __future__ import annotations

# torch annotates unique in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
import torch


def ruled_logits(
    logits: torch.Tensor,  # [V]
    prompt_ids: torch.Tensor,  # [P]
    response_ids: torch.Tensor,  # [T], so far
    *,
    bias_ids: torch.Tensor,  # [B], each id once
    bias: torch.Tensor,  # [B] float32
    forbidden_ids: torch.Tensor,  # [F]
    repetition_penalty: float,  # 1: none
    frequency_penalty: float,  # 0: none
    presence_penalty: float,  # 0: none
) -> torch.Tensor:
    """-> [V] float32, a copy.

    repetition_penalty: of the tokens in prompt and response, positive logits are divided by it, negative ones multiplied.
    frequency_penalty is taken off once per time a token is in the response, presence_penalty once if it is.
    """
    out = logits.float().clone()
    out[bias_ids] += bias
    out[forbidden_ids] = -torch.inf
    if repetition_penalty != 1.0:
        seen = torch.cat((prompt_ids, response_ids)).unique()
        before = out[seen]
        out[seen] = torch.where(before > 0, before / repetition_penalty, before * repetition_penalty)
    if frequency_penalty or presence_penalty:
        drawn, counts = response_ids.unique(return_counts=True)
        out[drawn] -= frequency_penalty * counts + presence_penalty
    return out

"""Layer normalisation in front of linear layers, under autocast on a CPU: from float32 to bfloat16 in one pass.   C channels.

Torch's writes float32, which autocast then copies for the linear layer, and so on the way back. The numbers are the same to
float32's last digits: those that train and those that are compared with them (a policy's reference) are to have it both or neither.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2LMHeadModel

from rlhf_ray import kernels


def norms_in_c(model: nn.Module) -> None:
    """Let those of GPT-2 work so, in place, where there is a compiler; weights and their names stay."""
    if kernels.library() is None:
        return
    for child in model.modules():
        if type(child) is GPT2Block:
            norms = [child.ln_1, child.ln_2]
        elif type(child) is GPT2LMHeadModel:  # a body's last one may stand in front of a head in float32
            norms = [child.transformer.ln_f]
        else:
            continue
        for norm in norms:
            if type(norm) is nn.LayerNorm:
                norm.forward = partial(_normalise, norm)


def autocasts() -> bool:
    """Whether linear layers on the CPU compute in bfloat16."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _normalise(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    in_c = x.dtype == torch.float32 and kernels.kernel("layer_norm_forward", x, norm.weight) is not None
    if not (in_c and autocasts() and norm.weight.dtype == torch.float32):
        return nn.LayerNorm.forward(norm, x)
    return _LayerNorm.apply(x, norm.weight, norm.bias, norm.eps)


class _LayerNorm(torch.autograd.Function):
    """[..., C] float32 -> [..., C] bfloat16, computed in float32"""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        lines, result = x.numel() // x.shape[-1], torch.empty_like(x, dtype=torch.bfloat16)
        means, scales = torch.empty(2, lines)
        kernels.kernel("layer_norm_forward")(x, weight, bias, result, means, scales, lines, x.shape[-1], eps)
        ctx.save_for_backward(x, weight, means, scales)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight, means, scales = ctx.saved_tensors
        by_x, (by_weight, by_bias) = torch.empty_like(x), torch.zeros(2, len(weight))
        tensors = gradient.contiguous(), x, weight, means, scales, by_x, by_weight, by_bias
        kernels.kernel("layer_norm_backward")(*tensors, len(means), x.shape[-1])
        return by_x, by_weight, by_bias, None

"""GPT-2's activation on CPUs: 0.5 x (1 + tanh(u / 2)) = x sigmoid(u), with u = 2 sqrt(2 / pi) (x + 0.044715 x^3).

Torch's kernel for it spends its time in tanh: forward and backward of 1.3 M bfloat16 numbers take 1.6 times as long
(rlhf_ray/bench/trials.py).
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation

SLOPE = 2 * math.sqrt(2 / math.pi)
CUBE = SLOPE * 0.044715
PIECE = 2**17  # numbers per piece, in float32: they stay in a core's cache


class SigmoidGELU(nn.Module):
    """`torch.nn.functional.gelu(x, approximate="tanh")`, which other devices and small tensors use."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or x.numel() < PIECE or not x.is_contiguous():
            return gelu(x, approximate="tanh")
        return _SigmoidGELU.apply(x)


class _SigmoidGELU(torch.autograd.Function):
    """Keeps the derivative, in the dtype of x, instead of x: the same memory, and the backward pass is one product."""

    @staticmethod
    def forward(ctx, x):
        flat, result = x.view(-1), torch.empty_like(x)
        derivative = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(derivative)
        slope = torch.tensor(SLOPE, dtype=torch.promote_types(x.dtype, torch.float32))
        buffers = torch.empty(4, min(PIECE, len(flat)), dtype=slope.dtype)
        for start in range(0, len(flat), PIECE):
            piece = slice(start, start + PIECE)
            value, square, share, inner = buffers[:, : len(flat[piece])]
            value.copy_(flat[piece])
            torch.mul(value, value, out=square)
            torch.add(slope, square, alpha=CUBE, out=share).mul_(value).sigmoid_()
            result.view(-1)[piece] = value.mul_(share)
            if derivative is not None:  # share + x share (1 - share) du/dx
                torch.add(slope, square, alpha=3 * CUBE, out=inner)
                value.addcmul_(value, share, value=-1)
                derivative.view(-1)[piece] = torch.addcmul(share, value, inner, out=inner)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (derivative,) = ctx.saved_tensors
        return gradient * derivative


def fast_activation(model: PreTrainedModel) -> PreTrainedModel:
    """Replace GPT-2's activation in place. The config stays, and so does what is saved of the model."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (NewGELUActivation, GELUTanh)):
                setattr(parent, name, SigmoidGELU())
    return model

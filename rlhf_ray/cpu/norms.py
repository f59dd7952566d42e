"""Layer normalisation in front of linear layers, under autocast on a CPU: from float32 to bfloat16 in one pass.   C channels.

Torch's writes float32, which autocast then copies for the linear layer, and so on the way back; the sum in front of it is one more
pass over the widest numbers, and a copy of what is added. The numbers are the same to float32's last digits: those that train and
those that are compared with them (a policy's reference) are to have it both or neither.
"""

from __future__ import annotations

# Layers of transformers are changed in place, which their annotations do not know.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportReturnType=false
from functools import partial

import torch
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2LMHeadModel, GPT2Model

from rlhf_ray.cpu import kernels


def norms_in_c(model: nn.Module) -> None:
    """Let those of GPT-2 work so, in place, where there is a compiler; weights and their names stay."""
    if kernels.library() is None or "norms" in kernels.OFF:
        return
    for child in model.modules():
        if type(child) is GPT2Block:
            norms = [child.ln_1, child.ln_2]
        elif type(child) is GPT2LMHeadModel:  # a body's last one may stand in front of a head in float32
            norms = [child.transformer.ln_f]
        else:
            continue
        for norm in norms:
            if type(norm) is nn.LayerNorm and not isinstance(norm.forward, _Norm):
                norm.forward = _Norm(norm)


def sums_in_norms(model: nn.Module) -> None:
    """After `norms_in_c`: let GPT-2's blocks add each layer's output in the pass of the norm behind, in place.

    That reads a norm's weights ahead of its own call, so they must be there: not under ZeRO-3. Blocks that are recomputed in the
    backward pass stay as they are.
    """
    for body in [
        child for child in model.modules() if type(child) is GPT2Model and not child.is_gradient_checkpointing
    ]:
        for block, behind in zip(body.h, [*(block.ln_1 for block in body.h[1:]), body.ln_f], strict=True):
            if (
                type(block) is GPT2Block
                and isinstance(block.ln_2.forward, _Norm)
                and "crossattention" not in dict(block.named_children())
            ):
                block.forward = partial(_block, block, behind)


def autocasts() -> bool:
    """Whether linear layers on the CPU compute in bfloat16."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


class _Norm:
    """A norm's forward. `sum` gives the sum in front of it too; who is asked next for the norm of that sum has it."""

    def __init__(self, norm: nn.LayerNorm):
        self.norm = norm
        self._ready: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] is x:
            return ready[1]
        if not self._fits(x):
            return nn.LayerNorm.forward(self.norm, x)
        return _LayerNorm.apply(x, None, self.norm.weight, self.norm.bias, self.norm.eps)[1]

    def sum(self, x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        if not (self._fits(x) and change.dtype == torch.bfloat16 and change.is_contiguous()):
            return x + change
        self._ready = _LayerNorm.apply(x, change, self.norm.weight, self.norm.bias, self.norm.eps)
        return self._ready[0]

    def _fits(self, x: torch.Tensor) -> bool:
        in_float32 = x.dtype == self.norm.weight.dtype == torch.float32
        return in_float32 and autocasts() and kernels.kernel("layer_norm_forward", x, self.norm.weight) is not None


def _block(
    block, behind, hidden, *others, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs
) -> torch.Tensor:
    """GPT2Block.forward without attention to an encoder, which it does not have."""
    mixed, _ = block.attn(block.ln_1(hidden), *others, **kwargs)
    hidden = block.ln_2.forward.sum(hidden, mixed)
    change = block.mlp(block.ln_2(hidden))
    return behind.forward.sum(hidden, change) if isinstance(behind.forward, _Norm) else hidden + change


class _LayerNorm(torch.autograd.Function):
    """x [..., C] float32, change [..., C] bfloat16 or None -> their sum, float32, and its norm, bfloat16, computed in float32"""

    @staticmethod
    def forward(ctx, x, change, weight, bias, eps):
        lines, result = x.numel() // x.shape[-1], torch.empty_like(x, dtype=torch.bfloat16)
        hidden, (means, scales) = x if change is None else torch.empty_like(x), torch.empty(2, lines)
        tensors = x, change, weight, bias, hidden, result, means, scales
        kernels.kernel("layer_norm_forward")(*tensors, lines, x.shape[-1], eps)
        ctx.save_for_backward(hidden, weight, means, scales)
        ctx.set_materialize_grads(False)
        ctx.has_change = change is not None
        return (hidden if ctx.has_change else None), result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_hidden, gradient):
        hidden, weight, means, scales = ctx.saved_tensors
        if gradient is None:  # nobody read the norm
            return by_hidden, by_hidden.bfloat16() if ctx.has_change else None, None, None, None
        by_x, (by_weight, by_bias) = torch.empty_like(hidden), torch.zeros(2, len(weight))
        by_change = torch.empty_like(hidden, dtype=torch.bfloat16) if ctx.has_change else None
        by_hidden = None if by_hidden is None else by_hidden.contiguous()
        tensors = gradient.contiguous(), by_hidden, hidden, weight, means, scales, by_x, by_change, by_weight, by_bias
        kernels.kernel("layer_norm_backward")(*tensors, len(means), hidden.shape[-1])
        return by_x, by_change, by_weight, by_bias, None

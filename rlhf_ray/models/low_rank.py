"""Linear layers with low-rank adapters, their products done together.   N tokens, r the adapter's rank.

What peft computes, `x W^T + s (x A^T) B^T`, in its own layers; but peft works on [N, out] four times (two products, the scaling,
the sum) and casts [N, in] for each product again. Here one product is added into the other one, the scaling is on [out, r], and the
frozen weight is cast to the compute dtype once, not in every pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

# peft's layers have no annotations that strict could read
# pyright: basic
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import Linear
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_ray.errors import UserError
from rlhf_ray.models.finite_weights import first_bad
from rlhf_ray.models.load import load_causal_lm


class LowRankLinear(Linear):
    """peft's layer, faster. Whatever it can't do (dropout, several adapters, ZeRO-3's shards) is done by peft's own forward."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any):
        super().__init__(base_layer, adapter_name, is_target_conv_1d_layer=isinstance(base_layer, Conv1D), **options)
        self._cast_weight: tuple[tuple[Any, ...], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        base = cast(nn.Linear | Conv1D, self.get_base_layer())
        if args or options or not self._is_plain(base):
            return super().forward(x, *args, **options)
        dtype = _compute_dtype(x)
        weight, bias = self._weight(base, dtype), None if base.bias is None else base.bias.to(dtype)
        line = x.to(dtype).flatten(0, -2)
        if self.disable_adapters:
            result = nn.functional.linear(line, weight, bias)
        else:
            (name,) = self.active_adapters
            down, up = self.lora_A[name].weight, self.lora_B[name].weight * self.scaling[name]
            result = _LowRank.apply(line, weight, bias, down.to(dtype), up.to(dtype))
        return result.view(*x.shape[:-1], result.shape[-1])

    def _is_plain(self, base: nn.Linear | Conv1D) -> bool:
        active = self.active_adapters
        return (
            not self.merged and not self.lora_variant and len(active) == 1 and active[0] in self.lora_A
            and isinstance(self.lora_dropout[active[0]], nn.Identity) and self.lora_B[active[0]].bias is None
            and not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
            # ZeRO-3 gathers a weight when its own module runs.
            and not hasattr(base.weight, "ds_id")
        )  # fmt: skip

    def _weight(self, base: nn.Linear | Conv1D, dtype: torch.dtype) -> torch.Tensor:
        """The frozen weight [out, in] in the compute dtype, cast again only after it has changed."""
        weight = base.weight
        key = dtype, weight.device, weight.data_ptr(), weight._version
        if self._cast_weight is None or self._cast_weight[0] != key:
            whole = weight.detach().to(dtype)
            self._cast_weight = key, whole.t() if isinstance(base, Conv1D) else whole
        return self._cast_weight[1]


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class _LowRank(torch.autograd.Function):
    """x W^T + bias + (x A^T) B^T for a frozen W.   x [N, in], W [out, in], A [r, in], B [out, r] -> [N, out]"""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, down, up):
        low = x @ down.t()
        ctx.save_for_backward(x, weight, down, up, low)
        return nn.functional.linear(x, weight, bias).addmm_(low, up.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient):
        x, weight, down, up, low = ctx.saved_tensors
        by_low = gradient @ up
        by_x = (gradient @ weight).addmm_(by_low, down) if ctx.needs_input_grad[0] else None
        return by_x, None, None, by_low.t() @ x, gradient.t() @ low


def load_merged(path: str, adapter: str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal LM with an adapter in peft's format merged into it. UserError where the adapter is another model's."""
    # Merged in float32: in 16 bits most of a small change would be rounded away.
    model = load_causal_lm(path, torch.float32, trust_remote_code)
    try:
        adapted = PeftModel.from_pretrained(model, adapter)
        with cast(Any, safe_open)(Path(adapter) / "adapter_model.safetensors", "pt") as file:
            stored = set(file.keys())
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        # Its layers are not the model's, or of another size, or its files are damaged.
        raise UserError(
            f"the adapter {adapter} does not fit the model {path}, or is damaged ({str(error).splitlines()[0]}); give the model "
            "that it was trained on, or write the adapter again"
        ) from error
    # peft loads what it finds a place for, and is silent about the rest.
    odd = sorted(stored ^ set(get_peft_model_state_dict(adapted)))
    if odd:
        raise UserError(
            f"the adapter {adapter} does not fit the model {path}: {len(odd)} of its weights are on one side only "
            f"({', '.join(odd[:3])}); give the model that it was trained on"
        )
    merged = cast(Any, adapted).merge_and_unload()
    bad = first_bad(merged.named_parameters())
    if bad is not None:
        raise UserError(f"the adapter {adapter} makes {bad} of the model {path} not finite; write the adapter again")
    return merged.to(dtype)

"""Which dtype a role computes in. Weights and optimizer state stay float32; matrix products run under autocast."""

from __future__ import annotations

from typing import Literal

import torch

from rlhf_ray.errors import UserError


def resolve_precision(setting: Literal["auto", "float32", "bfloat16"], device: torch.device | str) -> torch.dtype:
    """The compute dtype on `device`; "auto" is bfloat16 where the hardware multiplies in it, else float32.

    On a CPU without bfloat16 instructions the products are emulated and slower than float32, so asking for them there
    is refused with a UserError.
    """
    if setting == "float32":
        return torch.float32
    kind = torch.device(device).type
    if has_bfloat16(kind):
        return torch.bfloat16
    if setting == "auto":
        return torch.float32
    lacks = (
        "this CPU has neither AVX512-BF16 nor AMX" if kind == "cpu"
        else f"{torch.cuda.get_device_name()} computes in bfloat16 only by emulation" if torch.cuda.is_available()
        else "there is no GPU here"
    )  # fmt: skip
    raise UserError(f"precision is 'bfloat16', but {lacks}; set precision to 'auto' or 'float32'")


def has_bfloat16(kind: str) -> bool:
    """Whether devices of this kind ("cpu", "cuda") multiply in bfloat16 in hardware."""
    if kind == "cpu":
        features = torch.backends.cpu.get_cpu_capability(), _cpu_flags()
        return features[0].startswith("AVX512") and bool(features[1] & {"avx512_bf16", "amx_bf16"})
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_flags() -> frozenset[str]:
    """Instruction sets that this processor names (Linux on x86); none where the system does not list them."""
    try:
        with open("/proc/cpuinfo") as file:
            line = next((line for line in file if line.startswith("flags")), "")
    except FileNotFoundError:  # macOS and Windows: no list, so float32
        return frozenset()
    return frozenset(line.partition(":")[2].split())

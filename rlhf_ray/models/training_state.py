"""Weights, gradients, moments and buffers of one rank under DeepSpeed's ZeRO stages, on its GPU and on the host.   Bytes.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054): stage 1 divides the optimiser's state over the ranks, 2 the gradients too, 3 the
weights too. The buffers are those of DeepSpeed 0.19's own defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormat:
    """Bytes per weight."""

    weight: float = 4
    gradient: float = 4
    moments: float = 8
    masters: float = 0  # a float32 copy of 16-bit weights
    #: a copy of the rank's share that stages 1 and 2 make of float32 weights too
    own_share: float = 4


#: Here weights are float32 and products run under autocast; the paper's are 16-bit weights and gradients with float32 masters.
FLOAT32 = NumberFormat()
MIXED = NumberFormat(weight=2, gradient=2, moments=8, masters=4, own_share=0)

BUCKET = 500_000_000  # numbers: `reduce_bucket_size`, and the buffer of stage 0's all-reduce
LIVE = 1_000_000_000  # weights that stage 3 gathers at most: `stage3_max_live_parameters`
SUB_GROUP = 1_000_000_000  # weights of a rank that stage 3 steps at a time: `sub_group_size`
GLOO_COPIES = 4.5  # times that gathered weights take their size on a CPU: gloo's and DeepSpeed's buffers. Measured


@dataclass(frozen=True, slots=True)
class State:
    """Of one rank: where it computes (its GPU, or the host's memory), and offloaded to the host."""

    parts: Mapping[str, float]
    host: Mapping[str, float]


def model_state(
    trained: int, *, frozen: float = 0.0, zero_stage: int, ranks: int, numbers: NumberFormat = FLOAT32,
    offload_optimizer: bool = False, offload_param: bool = False,
) -> State:  # fmt: skip
    """trained: how many weights train. frozen: bytes of those that don't."""
    shares = [ranks if zero_stage >= stage else 1 for stage in (1, 2, 3)]
    masters = numbers.masters + (
        numbers.own_share if zero_stage in (1, 2) or (zero_stage == 3 and offload_optimizer) else 0
    )
    held = {
        "weights": (numbers.weight * trained + frozen) / shares[2],
        "gradients": numbers.gradient * trained / shares[1],
        "optimiser": (numbers.moments + masters) * trained / shares[0],
    }
    away = set[str]()
    if offload_optimizer:
        away |= {"optimiser"} | ({"gradients"} if zero_stage >= 2 else set())
    if offload_param:
        away.add("weights")
    parts = {name: value for name, value in held.items() if name not in away}
    return State(parts, {name: value for name, value in held.items() if name in away})


def buffer_bytes(
    trained: int, *, weights: int, held: float, zero_stage: int, ranks: int, on_gpu: bool, low_sums: bool = False
) -> dict[str, float]:
    """What DeepSpeed holds beside the state during a backward pass. weights, held: all weights of the model, and their bytes.

    A GPU's buckets have their whole size, and there are two of them at stages 1 and 2, where one is filled while the other is
    reduced (`overlap_comm`); of a CPU's only what is written takes memory. low_sums: there are some for 16-bit sums beside those
    in float32 (DeepSpeed's own autocast). Gathered weights stay up to `LIVE`.
    """
    if zero_stage == 0:
        return {"buckets": 0.0 if ranks == 1 else 4.0 * min(trained, BUCKET)}
    if zero_stage == 3:
        buckets, low = 1, 2.0
    else:
        buckets, low = 2, 4.0  # DeepSpeed makes both kinds in float32 there
    bucket = BUCKET * buckets * (4.0 + (low if low_sums else 0.0)) if on_gpu else 4.0 * min(trained, BUCKET)
    own = 4.0 * trained / ranks  # the rank's share of the gradient once more, where it is put together
    if zero_stage == 3:
        own = min(own, 4.0 * SUB_GROUP)
    if zero_stage < 3 or ranks == 1:
        return {"buckets": bucket + own}
    gathered = held * min(1.0, LIVE / weights) if weights else 0.0
    return {"buckets": bucket + own, "gathered": gathered * (1.0 if on_gpu else GLOO_COPIES)}

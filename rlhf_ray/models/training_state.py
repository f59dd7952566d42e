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
    weights: int, trained: int, *, zero_stage: int, ranks: int, numbers: NumberFormat = FLOAT32,
    offload_optimizer: bool = False, offload_param: bool = False,
) -> State:  # fmt: skip
    """trained: how many of the weights train."""
    shares = [ranks if zero_stage >= stage else 1 for stage in (1, 2, 3)]
    masters = numbers.masters + (numbers.own_share if zero_stage in (1, 2) or (zero_stage == 3 and offload_optimizer) else 0)
    held = {
        "weights": numbers.weight * weights / shares[2],
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


def buffer_bytes(weights: int, trained: int, *, zero_stage: int, ranks: int, on_gpu: bool) -> dict[str, float]:
    """What DeepSpeed holds beside the state during a backward pass.

    A GPU's buckets have their whole size; of a CPU's only what is written takes memory. Gathered weights stay up to `LIVE`.
    """
    if zero_stage == 0:
        return {"buckets": 0.0 if ranks == 1 else 4.0 * min(trained, BUCKET)}
    bucket = 4.0 * (BUCKET if on_gpu else min(trained, BUCKET))
    own = 4.0 * trained / ranks  # the rank's share of the gradient once more, where it is put together
    if zero_stage == 3:
        own = min(own, 4.0 * SUB_GROUP)
    return {"buckets": bucket + own} | (
        {"gathered": 4.0 * min(weights, LIVE) * (1.0 if on_gpu else GLOO_COPIES)} if zero_stage == 3 and ranks > 1 else {}
    )


def loading_bytes(weights: int, *, mapped: bool) -> tuple[float, float]:
    """While a rank starts, on the (device, host): it has the whole model in float32, also where ZeRO-3 cuts it then.

    mapped: it comes from a float32 file, which the system maps: all ranks of a node read the same pages, which it may drop. Weights
    of another dtype, and random ones, are each rank's own.
    """
    return 4.0 * weights, 0.0 if mapped else 4.0 * weights

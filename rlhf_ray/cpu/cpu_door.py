"""All that the rest of the package uses of `cpu`; `generation.acceleration` alone imports it."""

from __future__ import annotations

import os
import sys

import torch

from rlhf_ray.cpu.compiled import library
from rlhf_ray.cpu.operations import OperationsInC
from rlhf_ray.cpu.packed_linear import pack_linears
from rlhf_ray.cpu.protocols import Step
from rlhf_ray.cpu.recorded_step import RecordedStep

PARTS = ("packed", "operations", "recorded")


def accelerate(step: Step) -> Step | RecordedStep:
    """A decode step that computes the same up to rounding, as fast as this machine can.

    RLHF_RAY_CPU names what is left out: some of PARTS, with commas between them, or all of them: off.
    """
    off = _left_out()
    if step.model.device.type != "cpu":
        return step
    if "packed" not in off:
        pack_linears(step.model)
    if "operations" in off or library() is None:
        return step
    step.operations = OperationsInC(step.operations)
    # In bfloat16 linear layers and norms are torch's, which can't be recorded.
    return step if "recorded" in off or step.model.dtype != torch.float32 else RecordedStep(step)


def hindrance() -> str | None:
    """Why steps on this machine are slower than they could be, in words for its user."""
    if sys.platform != "linux" or not ("operations" in _left_out() or library() is None):
        return None
    return "without the functions in C (no compiler here, or they are switched off) CPUs are slower: apt-get install gcc"


def _left_out() -> set[str]:
    named = set(filter(None, os.environ.get("RLHF_RAY_CPU", "").split(",")))
    if not named <= {"on", "off", *PARTS}:
        raise ValueError(f"RLHF_RAY_CPU={','.join(sorted(named))} is none of on, off, or some of {','.join(PARTS)}")
    return set(PARTS) if "off" in named else named

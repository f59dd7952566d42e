"""Decode steps as they are: by torch's operations. `cpu`, which the last line imports, makes faster ones of them.
Without that line, and `cpu`, all else stays.
"""

from __future__ import annotations

from rlhf_ray.generation.decode_step import DecodeStep


def accelerate(step: DecodeStep) -> DecodeStep:
    """A step that computes the same, but for rounding, as fast as this machine can."""
    return step


def hindrance() -> str | None:
    """Why steps on this machine are slower than they could be, in words for its user."""
    return None


from rlhf_ray.cpu.door import accelerate, hindrance  # noqa: E402, F401, F811 - without it all above holds

"""What a training holds goes when the training ends: weights, gradients, moments, DeepSpeed's buffers."""

from __future__ import annotations

from typing import Any

from rlhf_ray.supervised.stage_trainer import StageTrainer


def release(trainer: StageTrainer) -> None:
    """Take DeepSpeed's hooks off the model. The trainer is not to be used again.

    Hooks on gradients are held by autograd, where Python's collector of cycles does not look; through them whoever still has the
    model would have the engine, too, and with it the moments.
    """
    engine: Any = trainer.deepspeed
    if engine is not None:
        engine.destroy()

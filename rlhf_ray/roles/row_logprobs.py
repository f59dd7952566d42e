"""Log-probs of whole rows of tokens under a policy in training, for a server to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from rlhf_ray.roles.policy_trainer import PolicyTrainer
from rlhf_ray.training.forward import LogprobModel, token_batch


def row_logprobs(policy: PolicyTrainer, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of each row's tokens but the first, by the model's own distribution: at temperature 1, among all tokens. All ranks
    take part."""
    engine = policy.engine
    module = cast(LogprobModel, engine.module)
    batch = token_batch(
        [row[:1] for row in rows], [row[1:] for row in rows], packed=bool(module.packed), device=engine.device
    )
    temperature, module.temperature = module.temperature, 1.0
    try:
        logprobs = engine.forward(batch).float().cpu().numpy()
    finally:
        module.temperature = temperature
    return [line[: len(row) - 1] for line, row in zip(logprobs, rows, strict=True)]

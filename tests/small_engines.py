"""A DeepSpeed engine around a small module at any ZeRO stage, and its rows, for several test files."""

import torch
from torch import nn

from rlhf_ray.training.deepspeed_engine import DeepSpeedEngine, OptimiserConfig

STAGES = (0, 1, 2, 3)
ROWS, CLIP = 8, 0.1
RATES = [0.01, 0.02, 0.005, 0.01, 0.003]
CPU = torch.device("cpu")


def make_module():
    """Odd sizes: no tensor divides by the ranks, so ZeRO has to pad."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))


INPUTS = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.rand(ROWS, generator=torch.Generator().manual_seed(2))


def loss_of(output, weights):
    """A share of a weighted mean, already divided by the global count."""
    return (output.squeeze(-1) ** 2 * weights).sum() / ROWS


def microbatches(rank, world):
    """This rank's rows in two unequal microbatches."""
    sizes = {(0, 1): [6, 2], (0, 2): [3, 1], (1, 2): [1, 3]}[rank, world]
    rows = torch.arange(ROWS).chunk(world)[rank].split(sizes)
    return [((INPUTS[part],), WEIGHTS[part]) for part in rows]


def make_engine(stage, clip=CLIP, **settings):
    settings = {"adam_eps": 1e-5, "max_grad_norm": clip, "zero_stage": stage} | settings
    return DeepSpeedEngine(make_module(), OptimiserConfig(**settings), device=CPU)

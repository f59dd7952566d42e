"""A module of somebody else's that adds an advantage, a kind of reward and a generation engine, all called "toy"."""

import os
from pathlib import Path

import numpy as np

from rlhf_ray import Advantage, Engine, RewardKind, register_advantage, register_engine, register_reward
from rlhf_ray.generation.engine import torch_engine
from rlhf_ray.messages import Scores


class Ones:
    """One for every response."""

    def score(self, prompts, responses, ended, columns):
        return Scores(total=np.ones(len(responses), np.float32))


def made(setting):
    """torch's engine. The process that makes one leaves a file with its number beside the model."""
    Path(setting.folder, f"toy_engine_{os.getpid()}").touch()
    return torch_engine(setting)


register_advantage(
    Advantage(name="toy", estimate="rlhf_ray.algorithms.advantage_estimators:grpo", words="GRPO's", compares_samples=True)
)
register_reward(RewardKind(name="toy", make=lambda setting: Ones(), words="one"))
register_engine(Engine(name="toy", make="toy_additions:made", words="torch's", tells_support=True, copies=(1, 0)))

"""Mean and deviation of a reward model's raw logits on samples of the SFT model, into its config.json.

PPO's scorer computes (logit - reward_mean) / reward_std, so a KL coefficient means the same for every reward model. The
samples are drawn and scored by the same roles as in PPO.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from rlhf_ray.config import Recipe
from rlhf_ray.data.role_files import read_prompt_columns
from rlhf_ray.errors import UserError
from rlhf_ray.messages import Chunk
from rlhf_ray.rewards.scorer import RewardScorer
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.reward import Reward
from rlhf_ray.runs.run_folder import RunFolder, start_model
from rlhf_ray.runs.storage import write_atomically

STEP = -1  # not the number of a rollout step: these samples are not PPO's


def sample_scores(
    recipe: Recipe, folder: RunFolder, reward_model: Path, *, samples: int, dtype: torch.dtype, device: torch.device
) -> np.ndarray:
    """Raw logits [samples] of the SFT model's responses to PPO's prompts, each used once before any is used twice."""
    generation, trust = recipe.generation, recipe.model.trust_remote_code
    policy = start_model(recipe, folder)
    prompts = read_prompt_columns(folder)
    order = np.random.default_rng(recipe.seed).permutation(len(prompts))
    chosen = prompts.take([order[place % len(prompts)] for place in range(samples)])
    generator = Generator(
        policy, chosen.prompts(range(samples)), [], seed=recipe.seed, dtype=dtype, device=device,
        sampling=generation.sampling,
        trust_remote_code=trust,
    )  # fmt: skip
    scorer = RewardScorer(reward_model, compute_dtype=dtype, device=device, trust_remote_code=trust)
    scorer.mean, scorer.std = 0.0, 1.0  # raw
    reward = Reward(scorer, policy, stop=generation.stop, trust_remote_code=trust, columns=(chosen, chosen))
    scores = []
    for start in range(0, samples, generation.chunk_size):
        rows = tuple(range(start, min(start + generation.chunk_size, samples)))
        chunk = Chunk(step=STEP, index=start, prompt_indices=rows, sample_indices=(0,) * len(rows))
        scores.append(reward.score(generator.generate(chunk)).total)
    return np.concatenate(scores)


def write_normalisation(reward_model: Path, scores: np.ndarray) -> dict:
    """Put reward_mean and reward_std into the folder's config.json -> both."""
    mean, deviation = float(np.mean(scores, dtype=np.float64)), float(np.std(scores, dtype=np.float64))
    if not (np.isfinite(mean) and np.isfinite(deviation) and deviation > 0):
        raise UserError(
            f"the reward model scores {len(scores)} different samples of the SFT model with mean {mean} and deviation "
            f"{deviation}, so it does not tell them apart; train it longer or at a lower learning rate"
        )
    path = reward_model / "config.json"
    figures = {"reward_mean": mean, "reward_std": deviation}
    write_atomically(path, json.dumps(json.loads(path.read_text()) | figures, indent=2) + "\n")
    return figures

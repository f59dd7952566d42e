"""Whether PPO's critic can start from the reward model."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config import Recipe
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder, start_model


def check_critic_tokens(recipe: Recipe, folder: RunFolder) -> None:
    """A critic reads the policy's token ids, so it can start from the reward model only if that reads them too."""
    start, reward = start_model(recipe, folder), folder.stage("reward").model
    if _same_files(Path(start), reward, "tokenizer.json", "tokenizer_config.json"):
        return
    from rlhf_ray.models.tokenizer import load_tokenizer, same_tokens  # seconds of imports

    trust = recipe.model.trust_remote_code
    if not same_tokens(load_tokenizer(start, trust), load_tokenizer(reward, trust)):
        raise UserError(
            f"the reward model {reward} has another tokenizer than the policy, so ppo.critic_init can't be "
            "'reward'; set ppo.critic_init: sft"
        )


def _same_files(one: Path, other: Path, *names: str) -> bool:
    pairs = [(one / name, other / name) for name in names]
    return all(a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes() for a, b in pairs)

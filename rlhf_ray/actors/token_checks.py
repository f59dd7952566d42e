"""Whether PPO's other models read the token ids of its policy."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config import Recipe
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder, start_model


def check_tokens(recipe: Recipe, folder: RunFolder) -> None:
    """Critic and reference read the policy's token ids. UserError where the model that one of them starts from reads others."""
    reward, reference = folder.stage("reward").model, recipe.ppo.reference
    if recipe.ppo.has_critic and recipe.ppo.critic_init == "reward" and not _reads_tokens_of_policy(recipe, folder, reward):
        raise UserError(
            f"the reward model {reward} has another tokenizer than the policy, so ppo.critic_init can't be "
            "'reward'; set ppo.critic_init: sft"
        )
    if reference is not None and not _reads_tokens_of_policy(recipe, folder, Path(reference)):
        raise UserError(
            f"the model of ppo.reference, {reference}, has another tokenizer than the policy: it can't say how likely the policy's "
            "tokens are; name a model of the same family, or set it to null"
        )


def _reads_tokens_of_policy(recipe: Recipe, folder: RunFolder, model: Path) -> bool:
    start = start_model(recipe, folder)
    if _same_files(Path(start), model, "tokenizer.json", "tokenizer_config.json"):
        return True
    from rlhf_ray.models.tokenizer import load_tokenizer, same_tokens  # seconds of imports

    trust = recipe.model.trust_remote_code
    return same_tokens(load_tokenizer(start, trust), load_tokenizer(str(model), trust))


def _same_files(one: Path, other: Path, *names: str) -> bool:
    pairs = [(one / name, other / name) for name in names]
    return all(a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes() for a, b in pairs)

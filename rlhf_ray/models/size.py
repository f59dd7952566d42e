"""How large a recipe's model is, before it exists."""

from __future__ import annotations

from rlhf_ray.config import Recipe
from rlhf_ray.errors import UserError


def parameters(recipe: Recipe) -> int:
    """Weights of the policy, about; 0 where its config can't be read."""
    if recipe.model.is_from_scratch:
        shape = recipe.model.from_scratch
        return 12 * shape.layers * shape.width**2 + (shape.vocab_size + shape.positions) * shape.width
    from rlhf_ray.models.load import load_config

    try:
        config = load_config(recipe.model.name_or_path, recipe.model.trust_remote_code).get_text_config()
    except UserError:
        return 0
    return 12 * config.num_hidden_layers * config.hidden_size**2 + config.vocab_size * config.hidden_size

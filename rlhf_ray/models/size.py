"""How large a recipe's model is, before it exists."""

from __future__ import annotations

from rlhf_ray.config import LoraConfig, Recipe
from rlhf_ray.errors import UserError


def parameters(recipe: Recipe) -> int:
    """Weights of the policy, about; 0 where its config can't be read."""
    layers, width, embeddings = _shape(recipe)
    return 12 * layers * width**2 + embeddings


def trained_parameters(recipe: Recipe, lora: LoraConfig | None, freeze_layers: int) -> int:
    """How many of them train, about, or how many stand in the adapters that train in their place."""
    layers, width, embeddings = _shape(recipe)
    if lora is None:
        return 12 * (layers - freeze_layers) * width**2 + (0 if freeze_layers > 0 else embeddings)
    # Inputs and outputs of a block's matrices: four of width x width, two of width x 4 width.
    return lora.rank * 18 * layers * width


def _shape(recipe: Recipe) -> tuple[int, int, int]:
    """(blocks, width, weights of the embeddings)."""
    if recipe.model.is_from_scratch:
        shape = recipe.model.from_scratch
        return shape.layers, shape.width, (shape.vocab_size + shape.positions) * shape.width
    from rlhf_ray.models.load import load_config

    try:
        config = load_config(recipe.model.name_or_path, recipe.model.trust_remote_code).get_text_config()
    except UserError:
        return 0, 0, 0
    return config.num_hidden_layers, config.hidden_size, config.vocab_size * config.hidden_size

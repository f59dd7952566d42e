"""How large a recipe's model is, before it exists."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.config import LoraConfig, Recipe
from rlhf_ray.errors import UserError
from rlhf_ray.tables.families import is_gated


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    layers: int
    width: int
    vocabulary: int
    embeddings: int  # the number of their weights
    key_value_width: int
    gated: bool  # the feed-forward layer has three matrices


def parameters(recipe: Recipe) -> int:
    """The approximate number of the policy's weights; 0 where its config can't be read."""
    shape = shape_of_model(recipe)
    return 12 * shape.layers * shape.width**2 + shape.embeddings


def trained_parameters(recipe: Recipe, lora: LoraConfig | None, freeze_layers: int) -> int:
    """The approximate number of the policy's weights that train, or of the weights in its adapters."""
    shape = shape_of_model(recipe)
    if lora is None:
        return 12 * (shape.layers - freeze_layers) * shape.width**2 + (0 if freeze_layers > 0 else shape.embeddings)
    # Inputs and outputs of a block's matrices: four of width x width, two of width x 4 width.
    return lora.rank * 18 * shape.layers * shape.width


def shape_of_model(recipe: Recipe) -> ModelShape:
    """All zeros where the model's config can't be read."""
    if recipe.model.is_from_scratch:
        shape = recipe.model.from_scratch
        return ModelShape(
            layers=shape.layers, width=shape.width, vocabulary=shape.vocab_size, key_value_width=shape.width,
            embeddings=(shape.vocab_size + shape.positions) * shape.width, gated=is_gated(shape.architecture),
        )  # fmt: skip
    from rlhf_ray.models.load import load_config

    try:
        config = load_config(recipe.model.name_or_path, recipe.model.trust_remote_code).get_text_config()
    except UserError:
        return ModelShape(layers=0, width=0, vocabulary=0, embeddings=0, key_value_width=0, gated=False)
    options, heads = config.to_dict(), config.num_attention_heads  # GPT-2 and others have neither of the two below
    head_width = options.get("head_dim") or config.hidden_size // heads
    return ModelShape(
        layers=config.num_hidden_layers, width=config.hidden_size, vocabulary=config.vocab_size,
        embeddings=config.vocab_size * config.hidden_size, gated=is_gated(config.model_type),
        key_value_width=head_width * (options.get("num_key_value_heads") or heads),
    )  # fmt: skip

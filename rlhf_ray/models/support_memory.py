"""What it takes to say which tokens each token of a response was drawn among, where sampling drops others.   Bytes."""

from __future__ import annotations

import math

from rlhf_ray.config import Recipe
from rlhf_ray.models.size import shape_of_model

SUPPORT_ID, SUPPORT_TOKEN = 4, 8  # of `messages.Support`: a kept token's id; a response token's count and log mass
SUPPORT_PLACE = 16  # place and id of a kept token, in int64, as a forward pass takes them


def support_tokens(recipe: Recipe) -> int:
    """Tokens that a response's token is drawn among, at most, where sampling drops others; 0: all, and nobody notes them.

    Assumed is a model that finds all V tokens as good as equally likely: top_k keeps k of them, top_p that share of what top_k
    left, and min_p drops none. Trained models keep far fewer under top_p and min_p. Tokens that tie with the last one kept
    are kept, too; those are not counted.
    """
    generation, vocabulary = recipe.generation, shape_of_model(recipe).vocabulary
    if not generation.sampling.truncates:
        return 0
    return math.ceil(generation.top_p * min(generation.top_k or vocabulary, vocabulary))


def support_bytes(tokens: int, support: int) -> float:
    """What `messages.Support` takes for this many response tokens, each drawn among `support` others; 0 where that is 0."""
    return float(tokens) * (SUPPORT_ID * support + SUPPORT_TOKEN) if support else 0.0


def longest_of(recipe: Recipe) -> int:
    """Tokens of the longest sequence that PPO can meet."""
    return recipe.data.max_prompt_tokens + recipe.generation.max_new_tokens


def response_share(recipe: Recipe) -> float:
    """Of the tokens of the longest sequence; logits are computed of these only."""
    return recipe.generation.max_new_tokens / longest_of(recipe)


def support_mask_bytes(recipe: Recipe, support: int, *, tokens: int) -> float:
    """Places and ids of what was kept, and the mask that a forward pass over `tokens` makes of them."""
    return (
        response_share(recipe) * tokens * (SUPPORT_PLACE * support + shape_of_model(recipe).vocabulary)
        if support
        else 0.0
    )


def support_store_bytes(recipe: Recipe, support: int) -> float:
    """Of a step's supports in the object store, all responses as long as the recipe allows.

    They stand in the rollouts (those of steps ahead, too, and once more where dynamic sampling packs others in their place) and
    in the shards: a rank has a row once, however many epochs train on it.
    """
    ppo = recipe.ppo
    shards = min(recipe.resources.policy.actors, ppo.ppo_epochs)
    packed = ppo.dynamic_sampling_rounds + 1 if ppo.dynamic_sampling_rounds else 0
    a_step = support_bytes(ppo.rollouts_per_step * recipe.generation.max_new_tokens, support)
    return a_step * (1 + ppo.steps_ahead + packed + shards)

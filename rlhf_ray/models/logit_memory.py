"""What logits take, where a policy or reference tells log-probs and where a policy learns.   Bytes."""

from __future__ import annotations

from rlhf_ray.config import Recipe
from rlhf_ray.models.size import ModelShape, shape_of_model
from rlhf_ray.models.support_memory import response_share

GPU_PIECE = 2.0 * 4 * 2**27  # float32 logits that a GPU works on at a time, twice (`algorithms.logprobs.PIECE`)
#: Numbers that are worked on at a time where the head is read in pieces (`algorithms.logprobs.PIECE`), but at least so many rows.
PIECE, PIECE_ROWS = {False: 2**18, True: 2**27}, 1024
PIECE_BYTES = 8  # of float32 tensors of a piece, beside its logits and their gradient


def trained_logits(recipe: Recipe, *, tokens: int, itemsize: int, on_gpu: bool = False) -> float:
    """Logits of the responses' tokens, and their gradient."""
    itemsize = logit_itemsize(recipe, itemsize)
    logits = response_share(recipe) * tokens * shape_of_model(recipe).vocabulary
    return 2 * logits * itemsize + (min(GPU_PIECE, 8.0 * logits) if on_gpu else 0.0)


def scored_logits(recipe: Recipe, *, tokens: int, itemsize: int, on_gpu: bool) -> float:
    """Of a pass that only tells log-probs."""
    itemsize = logit_itemsize(recipe, itemsize)
    logits = response_share(recipe) * tokens * shape_of_model(recipe).vocabulary
    return logits * itemsize + (min(GPU_PIECE, 8.0 * logits) if on_gpu else 0.0)


def logit_itemsize(recipe: Recipe, itemsize: int) -> int:
    """Bytes of a logit where the rest is computed in itemsize bytes."""
    return 4 if recipe.ppo.float32_head else itemsize


def head_copy(recipe: Recipe, shape: ModelShape, itemsize: int) -> float:
    """Of the output layer of a model in 16 bits, in float32 for a product (`models.float_head`)."""
    return 4.0 * shape.head if recipe.ppo.float32_head and itemsize == 2 else 0.0


def head_pieces(recipe: Recipe, *, tokens: int, itemsize: int, on_gpu: bool) -> float:
    """Of the head read in pieces (`algorithms.chunked_head`): a piece's logits and what is made of them, and the gradient of its
    weight, once for a piece and once for all."""
    shape, itemsize = shape_of_model(recipe), logit_itemsize(recipe, itemsize)
    rows = max(PIECE[on_gpu] // max(shape.vocabulary, 1), min(shape.width, PIECE_ROWS))
    piece = min(rows, response_share(recipe) * tokens) * shape.vocabulary
    return piece * (2 * itemsize + PIECE_BYTES) + float(itemsize) * shape.head

"""What a generator holds beside its model, and the share of a GPU that vLLM has to be given.   Bytes."""

from __future__ import annotations

from rlhf_ray.config import Recipe
from rlhf_ray.models.activations import PLAIN_ATTENTION, passing_bytes
from rlhf_ray.models.size import ModelShape, shape_of_model
from rlhf_ray.models.support_memory import longest_of

BLOCK = 128  # tokens of a block of vLLM's cache, at most
STEP_LOGITS = (
    3 * 4
)  # per row and vocabulary entry: a step's logits, their probabilities, and what sampling makes of them
#: of vLLM on a GPU beside weights and cache, assumed, never measured here: what its profiling pass needs, graphs, CUDA's context
VLLM_ELSE = 3e9
#: Tokens of prompts per forward pass: enough to fill a device; what a pass needs beside the cache stays below a few GB.
PREFILL_TOKENS = 2**14
MOST_OF_A_GPU = 0.95


def cache_of(shape: ModelShape, *, rows: int, longest: int, itemsize: int) -> float:
    """Keys and values of `rows` sequences of `longest` tokens."""
    return 2.0 * shape.layers * shape.key_value_width * rows * longest * itemsize


def generation_bytes(recipe: Recipe, *, itemsize: int) -> dict[str, float]:
    """Of all GPUs of a generator together: the cache of the longest sequences, and a step's logits."""
    shape, rows, longest = shape_of_model(recipe), recipe.generation.rows, longest_of(recipe)
    if recipe.generation.engine == "vllm":  # whole blocks, and one row more
        rows, longest = rows + 1, -(-longest // BLOCK) * BLOCK
    return {
        "cache": cache_of(shape, rows=rows, longest=longest, itemsize=itemsize),
        "logits": float(STEP_LOGITS) * recipe.generation.rows * shape.vocabulary,
    }


def prefill_bytes(shape: ModelShape, *, rows: int, longest: int, itemsize: int, on_gpu: bool) -> float:
    """Of the pass that reads a part of all prompts (`generation.ragged_decoder`), without the cache. longest: of a prompt."""
    part = min(max(PREFILL_TOKENS // rows, 1), longest)
    passing = passing_bytes(shape, tokens=rows * part, itemsize=itemsize)
    if on_gpu or part > PLAIN_ATTENTION:
        return passing
    scores = 2.0 * itemsize * rows * shape.heads * part * longest  # of plain products, and their softmax
    return max(passing, scores)


def copy_on_host(tensor_parallel: int, *, shares_gpu: bool) -> bool:
    """Whether the plain copy of the model that an actor keeps beside vLLM's is in the host's memory and not on its GPU."""
    return tensor_parallel > 1 or shares_gpu


def gpu_memory_utilization(*, weights: float, cache: float, tensor_parallel: int, gpu: float) -> float:
    """vLLM's argument of that name: the share of a GPU of `gpu` bytes that has to be free for it when it starts.

    weights, cache: bytes of the whole model and of all its rows, which tensor_parallel GPUs hold together. vLLM's own default, 92 %
    of the GPU, is refused at its start wherever another role has its memory on the same GPU.
    """
    needed = (weights + cache) / tensor_parallel + VLLM_ELSE
    return min(MOST_OF_A_GPU, needed / gpu)

"""What vLLM's own copy of a model takes: weights by name, packed embeddings, bytes of the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from rlhf_ray.models.generation_memory import copy_on_host

CACHE_BLOCK = 128  # tokens; vLLM's on CPUs, and a multiple of what it takes on GPUs


def cache_bytes(model: PreTrainedModel, longest: int, rows: int) -> int:
    """What the keys and values of `rows` sequences of `longest` tokens take, in whole blocks, and one row more."""
    config = model.config.get_text_config()
    options = config.to_dict()  # GPT-2 and others have neither of these two
    heads = options.get("num_key_value_heads") or config.num_attention_heads
    width = options.get("head_dim") or config.hidden_size // config.num_attention_heads
    slots = (rows + 1) * -(-longest // CACHE_BLOCK) * CACHE_BLOCK
    return 2 * config.num_hidden_layers * heads * width * slots * model.dtype.itemsize


def copy_device(device: torch.device | str, tensor_parallel: int, *, shares_gpu: bool) -> torch.device:
    """Where the copy stands: on the engine's device, but in the host's memory where one GPU would not hold it, since the model is
    split over several, and where others have memory on that GPU, too."""
    own = torch.device(device)
    return torch.device("cpu") if own.type == "cuda" and copy_on_host(tensor_parallel, shares_gpu=shares_gpu) else own


def untied(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's weights by name, a tied one once, as a saved checkpoint has them."""
    seen = set()
    for name, weight in model.state_dict().items():
        if weight.data_ptr() not in seen:
            seen.add(weight.data_ptr())
            yield name, weight


def pack_embeddings_again(model: torch.nn.Module) -> None:
    """On CPUs a linear layer multiplies with a packed copy of its weight. The output layer's is left out by reload_weights
    where it is tied to the embeddings, which come under their own name: it would go on with the old ones."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            cast(Any, module.quant_method).process_weights_after_loading(module)

"""How large a model is, before it exists: counted on its config, without weights."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.config import FromScratch, LoraConfig, ModelConfig, Recipe
from rlhf_ray.errors import UserError
from rlhf_ray.tables.families import is_gated

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    parameters: int  # weights, those that two layers share counted once
    blocks: tuple[int, ...]  # weights of each transformer block
    embeddings: int  # weights of the embeddings, those of positions too
    layers: int
    width: int
    vocabulary: int
    key_value_width: int
    heads: int  # of the queries
    feed_forward: int  # channels within a feed-forward layer
    family: str  # the config's model_type
    gated: bool  # the feed-forward layer has three matrices
    output: int = 0  # weights of an output layer of its own; 0: the embeddings serve as one

    @property
    def body(self) -> int:
        """Weights without an output layer: of a reward model or a critic, except its head of width 1."""
        return self.parameters - self.output

    @property
    def head(self) -> int:
        """Weights of the product that gives logits."""
        return self.vocabulary * self.width


UNKNOWN = ModelShape(
    parameters=0, blocks=(), embeddings=0, layers=0, width=0, vocabulary=0, key_value_width=0, heads=0, feed_forward=0, family="",
    gated=False,
)  # fmt: skip


def _gpt2_weights(shape: FromScratch) -> tuple[int, int, int]:
    """(of a block, of the embeddings, of the rest): matrices 3, 1, 4 and 4 times the square, their biases, norms of two vectors."""
    width = shape.width
    return 12 * width**2 + 13 * width, (shape.vocab_size + shape.positions) * width, 2 * width


def _inner_width(shape: FromScratch) -> int:
    return math.ceil(shape.width * 8 / 3 / 32) * 32 if is_gated(shape.architecture) else 4 * shape.width


def _llama_weights(shape: FromScratch) -> tuple[int, int, int]:
    width, inner = shape.width, _inner_width(shape)
    attention = 2 * width**2 + 2 * width * shape.key_value_width
    return attention + 3 * width * inner + 2 * width, shape.vocab_size * width, width


def _qwen2_weights(shape: FromScratch) -> tuple[int, int, int]:
    block, embeddings, rest = _llama_weights(shape)
    return block + shape.width + 2 * shape.key_value_width, embeddings, rest  # biases of queries, keys and values


#: of the families that start from random weights: what a run asks for before its start need not import transformers. Others are
#: counted on their config, as these are in tests.
SCRATCH_WEIGHTS: dict[str, Callable[[FromScratch], tuple[int, int, int]]] = {
    "gpt2": _gpt2_weights, "llama": _llama_weights, "qwen2": _qwen2_weights,
}  # fmt: skip


def parameters(recipe: Recipe) -> int:
    """The number of the policy's weights; 0 where its config can't be read."""
    return shape_of_model(recipe).parameters


def adapter_parameters(model: ModelConfig, lora: LoraConfig) -> int:
    """An adapter of a layer has `rank` weights per input and per output. 0 where the model's config can't be read."""
    from rlhf_ray.models.load import empty_causal_lm
    from rlhf_ray.models.trained_part import adapted_layers

    try:
        layers = adapted_layers(empty_causal_lm(model), lora)
    except UserError:  # another check reports it
        return 0
    return sum(lora.rank * sum(layer.weight.shape) for layer in layers.values())


def shape_of_model(recipe: Recipe) -> ModelShape:
    """All zeros where the model's config can't be read."""
    model = recipe.model
    if model.is_from_scratch and model.from_scratch.architecture in SCRATCH_WEIGHTS:
        shape = model.from_scratch
        block, embeddings, rest = SCRATCH_WEIGHTS[shape.architecture](shape)
        return ModelShape(
            parameters=shape.layers * block + embeddings + rest, blocks=(block,) * shape.layers, embeddings=embeddings,
            layers=shape.layers, width=shape.width, vocabulary=shape.vocab_size, key_value_width=shape.key_value_width,
            heads=shape.heads, feed_forward=_inner_width(shape), family=shape.architecture, gated=is_gated(shape.architecture),
        )  # fmt: skip
    return _counted(model.model_dump_json())


def shape_of_other(recipe: Recipe, name_or_path: str) -> ModelShape:
    """Of another model than the policy, a reward model from elsewhere, say."""
    model = ModelConfig(name_or_path=name_or_path, trust_remote_code=recipe.model.trust_remote_code)
    return _counted(model.model_dump_json())


@lru_cache(maxsize=16)
def _counted(model_json: str) -> ModelShape:
    """On a model without weights that is built from the config; where it can't be built, the weights that a folder holds."""
    from torch import nn

    from rlhf_ray.models.load import empty_causal_lm
    from rlhf_ray.models.trained_part import blocks_of

    model = ModelConfig.model_validate_json(model_json)
    try:
        built = empty_causal_lm(model)
    except UserError:
        # No config, an architecture that this transformers lacks, or code of the model's own that fails: loading it will say so.
        return _unbuilt(model.name_or_path)
    config = built.config.get_text_config()
    options = config.to_dict()  # GPT-2 and others have neither of the two below
    heads = options.get("num_attention_heads") or options.get("n_head")
    if not heads:  # a model without attention, whose activations are not planned
        return replace(UNKNOWN, parameters=sum(weight.numel() for weight in built.parameters()))
    head_width = options.get("head_dim") or config.hidden_size // heads
    try:
        parent, blocks = blocks_of(built)
    except UserError:  # it has no list of blocks
        parent, blocks = built, nn.ModuleList()
    embeddings = {id(weight): weight for module in parent.children() if isinstance(module, nn.Embedding)
                  for weight in module.parameters()}  # fmt: skip
    return ModelShape(
        parameters=sum(weight.numel() for weight in built.parameters()),
        blocks=tuple(sum(weight.numel() for weight in block.parameters()) for block in blocks),
        embeddings=sum(weight.numel() for weight in embeddings.values()), layers=config.num_hidden_layers,
        width=config.hidden_size, vocabulary=config.vocab_size, family=config.model_type,
        gated=is_gated(config.model_type), heads=heads,
        feed_forward=options.get("intermediate_size") or options.get("n_inner") or 4 * config.hidden_size,
        key_value_width=head_width * (options.get("num_key_value_heads") or heads), output=_output_weights(built, embeddings),
    )  # fmt: skip


def _output_weights(model: PreTrainedModel, embeddings: Collection[int]) -> int:
    """embeddings: the ids of their weights."""
    layer = model.get_output_embeddings()
    weight = None if layer is None else vars(layer)["_parameters"].get("weight")
    return 0 if weight is None or id(weight) in embeddings else weight.numel()


def _unbuilt(name_or_path: str) -> ModelShape:
    """What the headers of a folder's safetensors files say: the number of weights and no more."""
    try:
        count = sum(math.prod(shape) for file in _weight_files(Path(name_or_path)) for shape in tensor_shapes(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):  # damaged; loading it will say so
        return UNKNOWN
    return replace(UNKNOWN, parameters=count)


def _weight_files(folder: Path) -> list[Path]:
    """Those that a model is loaded from: some folders hold its weights in another form too."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [whole] if whole.is_file() else []


def tensor_shapes(file: Path) -> list[list[int]]:
    """Of the tensors in a safetensors file, by its header alone: eight bytes say how long it is."""
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > file.stat().st_size:
            raise ValueError(f"the header of {file} would have {length} bytes")
        header = json.loads(opened.read(length))
    return [each["shape"] for name, each in header.items() if name != "__metadata__"]

"""Which of a model's weights train, which are frozen, and what each kind takes: `models.frozen` and autocast in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.config import LoraConfig, ModelConfig
from rlhf_ray.models.size import ModelShape, adapter_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldWeights:
    """Of a model that trains, as a whole or in part."""

    trained: int  # weights, those of adapters among them
    frozen: float  # bytes of the others
    cast: int  # weights in float32 that autocast copies when it multiplies with them
    cast_at_once: int  # the same with gradient checkpointing, which keeps the copies of one block at a time

    @property
    def bytes(self) -> float:
        return 4.0 * self.trained + self.frozen


def frozen_bytes(shape: ModelShape, frozen: int, *, itemsize: int) -> float:
    """Of frozen weights, embeddings among them, under products of `itemsize` bytes: linear layers are held in those, embeddings in
    float32. Norms and biases are float32, too, and too few to count."""
    return 4.0 * shape.embeddings + float(itemsize) * (frozen - shape.embeddings)


def held_weights(
    shape: ModelShape, model: ModelConfig, *, lora: LoraConfig | None, freeze_layers: int, language: bool, itemsize: int
) -> HeldWeights:
    """shape: of `model` as a language model. language: it is trained as one; else it has a head of width 1 (too small to count)."""
    whole = shape.parameters if language else shape.body
    tied = shape.head if language and not shape.output else 0  # embeddings that are multiplied with, too
    block = max(shape.blocks, default=0)
    if lora is not None:
        adapters = adapter_parameters(model, lora)
        frozen = frozen_bytes(shape, whole, itemsize=itemsize)
        return HeldWeights(trained=adapters, frozen=frozen, cast=tied + adapters, cast_at_once=tied + adapters)
    stay = shape.embeddings + sum(shape.blocks[:freeze_layers]) if freeze_layers > 0 else 0
    multiplied = whole - (stay or shape.embeddings) + tied
    return HeldWeights(
        trained=whole - stay, frozen=frozen_bytes(shape, stay, itemsize=itemsize) if stay else 0.0, cast=multiplied,
        cast_at_once=(shape.head if language else 0) + block,
    )  # fmt: skip

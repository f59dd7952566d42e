"""Which weights of a model train: all of them, low-rank adapters beside them (LoRA), or all but the first layers.

LoRA (Hu et al. 2021, arXiv 2106.09685): a linear layer W x becomes W x + alpha / rank * B (A x). W stays as it is, A
[rank, in] and B [out, rank] train. A starts random and B at zero, so the model starts unchanged.

Only what trains moves: weight sync, checkpoints and saved models take it from the trainer, and the rest from the model
that training started from.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import UserError
from rlhf_ray.models.finite_weights import refuse_bad
from rlhf_ray.models.wire import Weight, as_tensor, load_named


def train_only_part(
    model: PreTrainedModel, *, lora: LoraConfig | None, freeze_layers: int, gradient_checkpointing: bool, seed: int
) -> PreTrainedModel:
    """Make `model` train what the recipe says, in place; returns it. The adapters' A follow from `seed` alone.

    In a body (a critic's, a reward model's) only its own weights are frozen: the head on it always trains.
    """
    if lora is not None:
        _add_adapters(model, lora, seed)
    if freeze_layers > 0:
        for parameter in _frozen_parameters(model, freeze_layers):
            parameter.requires_grad_(False)
    if gradient_checkpointing:
        _compute_activations_again(model)
    return model


# -- frozen layers ----------------------------------------------------------------------------------------------------


def frozen_names(model: PreTrainedModel, freeze_layers: int) -> set[str]:
    """Names of the weights that don't train: those of the embeddings and of the first blocks."""
    frozen = {id(parameter) for parameter in _frozen_parameters(model, freeze_layers)} if freeze_layers > 0 else set()
    return {name for name, parameter in model.named_parameters() if id(parameter) in frozen}


def check_freeze(freeze_layers: int, blocks: int, key: str) -> None:
    """UserError where no block would be left to train."""
    if freeze_layers >= blocks:
        raise UserError(
            f"{key} = {freeze_layers}, but the model has {blocks} blocks, so none would train; "
            f"set it to {blocks - 1} or less"
        )


def _frozen_parameters(model: PreTrainedModel, freeze_layers: int) -> Iterator[nn.Parameter]:
    """An output layer that is tied to the embeddings is among them."""
    parent, blocks = blocks_of(model)
    check_freeze(freeze_layers, len(blocks), "freeze_layers")
    for module in parent.children():
        if isinstance(module, nn.Embedding):
            yield from module.parameters()
    yield from blocks[:freeze_layers].parameters()


def blocks_of(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The transformer blocks, and the module that they and the embeddings are parts of."""
    count = model.config.get_text_config().num_hidden_layers
    for parent in model.base_model.modules():
        for child in parent.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return parent, child
    raise UserError(
        f"{type(model).__name__} has no list of {count} blocks, so freeze_layers can't tell which come first; set it to 0"
    )


# -- gradient checkpointing -------------------------------------------------------------------------------------------


def _compute_activations_again(model: PreTrainedModel) -> None:
    """Keep each block's input only, while training; the backward pass runs the block once more (arXiv 1604.06174).

    Not the reentrant form: it gives no gradient where a block's input needs none, as after frozen embeddings. For that
    form transformers gives the embeddings' output a gradient. Here that is undone, so the backward pass ends at what
    trains.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} has no gradient checkpointing; set gradient_checkpointing to false")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


# -- low-rank adapters ------------------------------------------------------------------------------------------------


def adapted_layers(model: PreTrainedModel, lora: LoraConfig) -> dict[str, nn.Linear | Conv1D]:
    """Name -> linear layer of the body, for those that get an adapter."""
    body = {id(module) for module in model.base_model.modules()}
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) in body
    }
    if lora.target_modules is None:
        return linear
    for end in lora.target_modules:
        if not any(_ends_with(name, end) for name in linear):
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"target_modules names '{end}', but no linear layer in the body of {type(model).__name__} has a "
                f"name that ends with it; there are {', '.join(kinds)}"
            )
    return {name: layer for name, layer in linear.items() if any(_ends_with(name, end) for end in lora.target_modules)}


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _add_adapters(model: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    from peft import inject_adapter_in_model

    from rlhf_ray.models.low_rank import LowRankLinear

    # With a random state of its own: every rank draws the same A, and no other draws change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = _peft_config(model, lora)
        # peft's way for layers of one's own ("Custom models" in its developer guides)
        config._register_custom_module({nn.Linear: LowRankLinear, Conv1D: LowRankLinear})
        inject_adapter_in_model(config, model)


def _peft_config(model: PreTrainedModel, lora: LoraConfig, **extra):
    from peft import LoraConfig as PeftLoraConfig

    layers = adapted_layers(model, lora)
    return PeftLoraConfig(
        r=lora.rank, lora_alpha=cast(int, lora.alpha),  # peft divides it by the rank, so a float is as good
        lora_dropout=0.0,  # PPO's ratio is 1 before the first update only without it
        target_modules=sorted(layers), bias="none",
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()), **extra,
    )  # fmt: skip


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


@contextmanager
def adapter_off(module: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that training started from. For forward passes without gradient."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    assert layers, "a model without adapters"
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def plain_name(name: str) -> str:
    """A trained weight's name in the trainer -> in the Hugging Face model; an adapter's is <layer>.lora_A or .lora_B."""
    return name.removeprefix("model.").removesuffix(".default.weight")


class MergedLayers:
    """The layers of a plain model (no adapters in it) that an adapter changes, each with its weight before the change.

    Every `load` computes start + alpha / rank * B A from the start, so that no rounding adds up over many loads.
    """

    def __init__(
        self, model: PreTrainedModel, lora: LoraConfig, start: PreTrainedModel | None = None, *, again: bool = True
    ):
        """start: the same model in float32, where `model` is in a dtype that may have lost digits of it. again=False: for one
        `load`, which needs no copies."""
        self.scaling = lora.scaling
        self.layers = adapted_layers(model, lora)
        before = self.layers if start is None else adapted_layers(start, lora)
        self.start = {
            name: _no_larger_than_needed(before[name].weight, self.layers[name].weight) if again else before[name].weight.detach()
            for name in self.layers
        }

    @torch.no_grad()
    def load(self, adapter: Mapping[str, Weight]) -> None:
        """Put the merged weights into the model. `adapter` holds <layer>.lora_A and .lora_B of every layer, no more."""
        expected = {f"{name}.lora_{part}" for name in self.layers for part in "AB"}
        if expected != adapter.keys():
            missing, unknown = sorted(expected - adapter.keys()), sorted(adapter.keys() - expected)
            raise ValueError(f"the adapter does not fit the model: missing {missing[:5]}, unknown {unknown[:5]}")
        for name, layer in self.layers.items():
            a, b = (as_tensor(adapter[f"{name}.lora_{part}"]).to(layer.weight.device) for part in "AB")
            layer.weight.copy_(merged_weight(self.start[name], a, b, self.scaling, isinstance(layer, Conv1D)))


def merged_weight(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, transposed: bool
) -> torch.Tensor:
    """W + scaling * B A in float32; GPT-2's Conv1D keeps its weight [in, out], transposed."""
    change = (b.float() @ a.float()) * scaling
    return (weight.float() + (change.T if transposed else change)).contiguous()


def _no_larger_than_needed(weight: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    """A copy of `weight`, in the dtype of `merged` where that holds every digit of it (most models come in bfloat16)."""
    weight = weight.detach().to(merged.device)
    short = weight.to(merged.dtype)
    return short.clone() if torch.equal(short.to(weight.dtype), weight) else weight.clone()


def load_trained(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], *, lora: LoraConfig | None, freeze_layers: int
) -> None:
    """Put what was trained, by its `plain_name`, into a plain copy of the model that training started from."""
    kept = frozen_names(model, freeze_layers)
    if lora is not None:
        adapter = {name: weight for name, weight in weights.items() if name.endswith((".lora_A", ".lora_B"))}
        MergedLayers(model, lora, again=False).load(adapter)
        weights = {name: weight for name, weight in weights.items() if name not in adapter}  # a head's, if any
        kept = {name for name, _ in model.named_parameters()} - weights.keys()
    load_named(model, weights, kept=kept)


def save_adapter(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], lora: LoraConfig, folder: Path, start: str
) -> None:
    """Write the adapter alone in peft's format, whole or not at all. start: path of the model that it belongs to."""
    refuse_bad(weights.items(), f"the adapter {folder} is not written")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    config = _peft_config(model, lora, base_model_name_or_path=start, task_type="CAUSAL_LM", inference_mode=True)
    config.save_pretrained(str(temporary))
    named = {f"base_model.model.{name}.weight": tensor.contiguous() for name, tensor in weights.items()}
    save_file(named, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)

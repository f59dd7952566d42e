"""The adapter that makes one model of another: what training changed, for those who have the model that it started from.

A run trains adapters one after the other (SFT's, then PPO's) and saves whole models. The sum of their changes is of low rank too,
and its best approximation of a given rank are its first singular vectors (Eckart and Young 1936).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import UserError
from rlhf_ray.models.trained_part import adapted_layers, save_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    lora: LoraConfig
    weights: dict[str, torch.Tensor]  # <layer>.lora_A [rank, in] and .lora_B [out, rank], float32
    lost: float  # share of the change's norm that the rank leaves out


def adapter_between(start: PreTrainedModel, tuned: PreTrainedModel, rank: int) -> Difference:
    """The adapter of `rank` that comes closest to tuned - start. UserError where other weights than linear layers' differ.

    A layer with fewer singular values than `rank` gets rows of 0. Rows that a run has added to the embeddings (a PAD token's, which
    nothing draws) are left out.
    """
    if rank < 1:
        raise UserError(f"an adapter of rank {rank} changes nothing; give at least 1")
    lora = LoraConfig(rank=rank, alpha=float(rank))
    layers, changed = adapted_layers(start, lora), adapted_layers(tuned, lora)
    ours, theirs = dict(start.named_parameters()), dict(tuned.named_parameters())
    if ours.keys() != theirs.keys():
        raise UserError("the two models have other layers; give the model that training started from")
    for name, weight in ours.items():
        inside, found = name.removesuffix(".weight") in layers, theirs[name]
        if not inside and found.dim() == 2:
            found = found[: len(weight)]
        if weight.shape != found.shape or not (inside or torch.equal(weight, found)):
            raise UserError(f"{name} differs, which an adapter can't change; save the whole model")
    weights: dict[str, torch.Tensor] = {}
    total = left_out = 0.0
    for name, layer in layers.items():
        change = changed[name].weight.detach().double() - layer.weight.detach().double()
        if isinstance(layer, Conv1D):  # GPT-2 keeps it [in, out]
            change = change.t()
        left, sizes, right = torch.linalg.svd(change, full_matrices=False)
        root = sizes[:rank].sqrt()
        missing = rank - len(root)
        weights[f"{name}.lora_A"] = _pad(root[:, None] * right[:rank], (0, 0, 0, max(missing, 0)))
        weights[f"{name}.lora_B"] = _pad(left[:, :rank] * root, (0, max(missing, 0)))
        total += float(sizes.square().sum())
        left_out += float(sizes[rank:].square().sum())
    return Difference(lora=lora, weights=weights, lost=(left_out / total) ** 0.5 if total else 0.0)


def _pad(part: torch.Tensor, by: tuple[int, ...]) -> torch.Tensor:
    return torch.nn.functional.pad(part, by).float().contiguous()


def save_difference(start: PreTrainedModel, tuned: PreTrainedModel, rank: int, folder: Path, name: str) -> float:
    """Write the adapter in peft's format, in bfloat16. name: of the model that it is for. -> the share lost by the rank."""
    found = adapter_between(start, tuned, rank)
    save_adapter(start, {key: weight.bfloat16() for key, weight in found.weights.items()}, found.lora, folder, name)
    return found.lost

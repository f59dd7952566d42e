"""What `cpu` is given: the parts that it uses. The givers import this package; it imports nothing of theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel


class Where(Protocol):
    """Where a decode step puts keys and values, the same in every layer."""

    rows: int  # there is room for
    slots: int
    targets: torch.Tensor | None  # [n] slot of each row's new token


class Layer(Protocol):
    """keys and values [rows, H, slots, D], and centres [rows, H, 1, D], which are subtracted from the keys if it is centred."""

    keys: torch.Tensor
    values: torch.Tensor
    centres: torch.Tensor
    centred: bool
    is_initialized: bool
    write: Where

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...


class Cache(Protocol):
    layers: list[Layer]
    write: Where
    centred: bool

    def begin_decode(self, positions: torch.Tensor, length: int) -> None: ...


class DecodeOperations(Protocol):
    """What a decode step does beside the modules that have weights (`generation.decode_step.Operations` says what)."""

    def embed(self, tokens, positions, words: nn.Module, places: nn.Module | None = None) -> torch.Tensor: ...
    def add_and_normalise(self, hidden: torch.Tensor, change: torch.Tensor | None, norm: nn.Module) -> torch.Tensor: ...
    def turn(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor: ...
    def attention(self, cache, dtype: torch.dtype, groups: int, channels: int) -> Callable[..., torch.Tensor]: ...


class Step(Protocol):
    """A decode step. written_out: (model, cache, tokens [n], positions [n], operations) -> logits [n, V]."""

    model: PreTrainedModel
    written_out: Callable[..., torch.Tensor]
    operations: Any  # `DecodeOperations`: a class of the giver's, which another one may replace

    def __call__(self, cache: Any, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor: ...
    def forget(self) -> None: ...

"""A key-value cache of rows with different lengths, and the attention that reads it.

R rows, C slots a row, H key-value heads, D channels a head. Row b's tokens occupy slots [0, len_b): no left padding.
What lies beyond len_b is left over from padding or from rows that have gone; it is finite and always masked, so it
changes no bit of a result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SLOT_MULTIPLE = 8  # lengths seen by attention are rounded up to this: GPU kernels want aligned masks


def round_up(length: int) -> int:
    return -(-length // SLOT_MULTIPLE) * SLOT_MULTIPLE


@dataclass(slots=True)
class _Write:
    """Where the forward pass under way puts its keys and values, the same in every layer."""

    rows: int = 0  # R, capacity
    slots: int = 0  # C, capacity
    first_row: int = 0  # prefill: rows [first_row, first_row + n) are written from slot 0
    targets: torch.Tensor | None = None  # decode: [n] index b * C + len_b of each row's new token; None: prefill
    length: int = 0  # decode: slots of each row that attention sees


class RaggedLayer(CacheLayerMixin):
    """One layer's keys and values, [R, C, H, D] each, so that one token of one row is one contiguous block."""

    is_sliding = False

    def __init__(self, write: _Write):
        super().__init__()
        self.write = write

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, not empty: masked slots are multiplied by a weight of 0, and 0 * NaN is NaN.
        rows, slots = self.write.rows, self.write.slots
        self.keys, self.values = (
            torch.zeros(rows, slots, states.shape[1], states.shape[3], dtype=states.dtype, device=states.device)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store the new keys and values [n, H, q, D]; return those that attention reads, [n, H, length, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n, write = len(key_states), self.write
        if write.targets is None:
            rows = slice(write.first_row, write.first_row + n)
            self.keys[rows, : key_states.shape[2]] = key_states.transpose(1, 2)
            self.values[rows, : key_states.shape[2]] = value_states.transpose(1, 2)
            return key_states, value_states
        for stored, states in ((self.keys, key_states), (self.values, value_states)):
            stored.view(-1, *stored.shape[2:]).index_copy_(0, write.targets, states.squeeze(2))
        return self.keys[:n, : write.length].transpose(1, 2), self.values[:n, : write.length].transpose(1, 2)

    def grow(self) -> None:
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = torch.zeros(self.write.rows, self.write.slots, *old.shape[2:], dtype=old.dtype, device=old.device)
            new[: old.shape[0], : old.shape[1]] = old
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.write.targets is None else self.write.length), 0

    def get_seq_length(self) -> int:
        return 0  # rows differ: masks and position_ids are always given, nothing is to be derived from this

    def get_max_length(self) -> int:
        return self.write.slots


class RaggedCache(Cache):
    """Preallocated for (rows, slots); `reserve` makes it larger, keeping what it holds."""

    def __init__(self, num_layers: int):
        self.write = _Write()
        super().__init__(layers=[RaggedLayer(self.write) for _ in range(num_layers)])

    def reserve(self, rows: int, slots: int) -> None:
        """Make room for that many rows and slots; what is too small at least doubles, so growing stays cheap."""
        write = self.write
        if rows <= write.rows and slots <= write.slots:
            return
        if rows > write.rows:
            write.rows = max(rows, 2 * write.rows)
        if slots > write.slots:
            write.slots = round_up(max(slots, 2 * write.slots))
        for layer in self.layers:
            layer.grow()

    def begin_prefill(self, first_row: int) -> None:
        """The next forward pass writes its rows from slot 0, starting at row first_row."""
        self.write.first_row, self.write.targets = first_row, None

    def begin_decode(self, positions: torch.Tensor, length: int) -> None:
        """The next forward pass writes one token a row at positions [n]; attention sees slots [0, length)."""
        first_slots = torch.arange(len(positions), device=positions.device) * self.write.slots
        self.write.targets, self.write.length = first_slots + positions, length

    def move_rows(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        """Copy the first length slots of rows source [m] over rows target [m] (no row in both)."""
        for layer in self.layers:
            layer.keys[target, :length] = layer.keys[source, :length]
            layer.values[target, :length] = layer.values[source, :length]


def ragged_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Transformers' sdpa attention, except for a single query token a row: the decode step.

    There the query heads of a key-value head become its rows of queries, so grouped-query attention copies no keys; for CPUs in
    bfloat16 see `_block_attention`. Other callers may give no mask (nothing is hidden from one token), or numbers to be added.
    query [n, heads, q, D], key and value [n, H, length, D], the engine's mask [n, 1, q, length] bool -> [n, q, heads, D].
    """
    if query.shape[2] != 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    n, heads, _, channels = query.shape
    masked = attention_mask is not None and attention_mask.dtype == torch.bool
    if masked and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return _block_attention(query, key, value, attention_mask, scaling), None
    query = query.reshape(n, key.shape[1], heads // key.shape[1], channels)
    output = scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    return output.reshape(n, 1, heads, value.shape[-1]), None


def _block_attention(query, key, value, mask, scaling: float | None) -> torch.Tensor:
    """The decode step's attention as two matrix products a row, for CPUs in bfloat16.

    Each query head becomes a line of H * D channels, zero outside its key-value head's, so a row's keys are read as they
    lie, all heads at once. H times the arithmetic, and several times as fast as many products of one line (measured:
    results/bench/trials.py).
    query [n, heads, 1, D], key and value [n, H, length, D], mask [n, 1, 1, length] bool -> [n, 1, heads, D]
    """
    n, heads, _, channels = query.shape
    groups, length = key.shape[1], key.shape[2]
    own = torch.arange(heads).div(heads // groups, rounding_mode="floor")  # the key-value head of each query head
    lines = query.new_zeros(n, heads, groups, channels)
    lines[:, torch.arange(heads), own] = query[:, :, 0]
    keys, values = (states.transpose(1, 2).reshape(n, length, -1) for states in (key, value))
    lines, scaling = lines.flatten(2), channels**-0.5 if scaling is None else scaling
    # The product adds its first argument before it rounds. Keys with a bias give all scores of a row a common part, which the
    # softmax ignores and bfloat16 would spend its digits on: taken off with the mean of every eighth key that is seen.
    seen = mask[:, 0, :, ::8].transpose(1, 2)
    mean = keys[:, ::8].masked_fill(~seen, 0.0).sum(1, dtype=torch.float32) / seen.sum(1)
    common = scaling * torch.bmm(lines.float(), mean[:, :, None])  # [n, heads, 1]
    offsets = torch.where(mask[:, 0], -common, -torch.inf).to(query.dtype)
    scores = torch.baddbmm(offsets, lines, keys.transpose(1, 2), alpha=scaling)
    mixed = torch.bmm(scores.softmax(-1), values).view(n, heads, groups, value.shape[-1])
    return mixed[:, torch.arange(heads), own][:, None]


RAGGED = "rlhf_ray_ragged"
AttentionInterface.register(RAGGED, ragged_attention)
# With sdpa's own masks the model stays right for anyone who calls it without this cache.
AttentionMaskInterface.register(RAGGED, sdpa_mask)

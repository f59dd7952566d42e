"""A key-value cache of rows with different lengths, and the attention that reads it.

R rows, C slots per row, H key-value heads, D channels per head. Row b's tokens occupy slots [0, len_b): no left padding.
What lies beyond len_b is left over from padding or from rows that have gone; it is finite and always masked, so it
changes no bit of a result.
"""

from __future__ import annotations

# Layers of transformers are changed in place, which their annotations do not know.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportReturnType=false
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PLAIN_LENGTH = 256  # of a prompt: the fused kernel's memory does not grow with the square, which counts beyond
MORE_SLOTS = 32  # at least, once there are some: a cache that has moved costs a step's new recording too
SLOT_MULTIPLE = 16  # of capacities, and of the lengths seen by attention: GPU kernels want aligned masks


def round_up(length: int) -> int:
    return -(-length // SLOT_MULTIPLE) * SLOT_MULTIPLE


def slot_bytes(model: PreTrainedModel) -> int:
    """What keys and values of one token take in all layers."""
    config = model.config.get_text_config(decoder=True)
    options = config.to_dict()  # GPT-2 and others have neither of these two
    heads = options.get("num_key_value_heads") or config.num_attention_heads
    channels = options.get("head_dim") or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * channels * model.dtype.itemsize


@dataclass(slots=True)
class _Write:
    """Where the forward pass under way puts its keys and values, the same in every layer."""

    rows: int = 0  # R, capacity
    slots: int = 0  # C, capacity
    first_row: int = 0  # prefill: rows [first_row, first_row + n) are written
    first_slot: int = 0  # prefill: from this slot on; attention sees the slots before it, too
    lengths: torch.Tensor | None = None  # prefill: [n] each row's own tokens, at least 1; the rest is padding
    targets: torch.Tensor | None = None  # decode: [n] slot len_b of each row's new token; None: prefill
    length: int = 0  # decode: slots of each row that attention sees


class RaggedLayer(CacheLayerMixin):
    """One layer's keys and values, [R, H, C, D] each, so that one head of one row is one contiguous block.

    centred: keys are stored less the mean of those of the row's prompt. That changes all scores of a row by the same, which the
    softmax ignores; but where keys have much in common (e.g. a bias), 16-bit keys and scores would spend their digits on that.
    """

    is_sliding = False

    def __init__(self, write: _Write, centred: bool):
        super().__init__()
        self.write, self.centred = write, centred

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, not empty: masked slots are multiplied by a weight of 0, and 0 * NaN is NaN.
        rows, slots = self.write.rows, self.write.slots
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], slots, states.shape[3]) for states in (key_states, value_states)
        )
        self.centres = key_states.new_zeros(rows, key_states.shape[1], 1, key_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store the new keys and values [n, H, q, D]; return those that attention reads, [n, H, length, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n, write = len(key_states), self.write
        if write.targets is None:
            rows, start, length = slice(write.first_row, write.first_row + n), write.first_slot, key_states.shape[2]
            if self.centred and start == 0:
                own = (torch.arange(length, device=key_states.device) < write.lengths[:, None])[:, None, :, None]
                self.centres[rows] = (key_states * own).sum(2, keepdim=True) / write.lengths[:, None, None, None]
            self.keys[rows, :, start : start + length] = key_states - self.centres[rows]
            self.values[rows, :, start : start + length] = value_states
            if start == 0:
                return key_states, value_states
            return self.keys[rows, :, : start + length], self.values[rows, :, : start + length]
        if self.centred:
            key_states = key_states - self.centres[:n]
        rows = torch.arange(n, device=key_states.device)
        self.keys[rows, :, write.targets] = key_states.squeeze(2)
        self.values[rows, :, write.targets] = value_states.squeeze(2)
        return self.keys[:n, :, : write.length], self.values[:n, :, : write.length]

    def resize(self) -> None:
        if not self.is_initialized:
            return
        rows = self.write.rows
        for name, slots in (("keys", self.write.slots), ("values", self.write.slots), ("centres", 1)):
            old = vars(self)[name]
            new = old.new_zeros(rows, old.shape[1], slots, old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old[:rows, :, :slots]
            setattr(self, name, new)

    def move_rows(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        for states in (self.keys[:, :, :length], self.values[:, :, :length], self.centres):
            states[target] = states[source]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.write.first_slot + query_length if self.write.targets is None else self.write.length), 0

    def get_seq_length(self) -> int:
        return 0  # rows differ: masks and position_ids are always given, nothing is to be derived from this

    def get_max_length(self) -> int:
        return self.write.slots


class RaggedCache(Cache):
    """Preallocated for (rows, slots); `reserve` makes it larger, keeping what it holds.

    most: rows times slots. Where there would be more, it has no room to spare.
    """

    def __init__(self, num_layers: int, *, centred: bool = False, most: int | None = None):
        self.write, self.most = _Write(), most
        super().__init__(layers=[RaggedLayer(self.write, centred) for _ in range(num_layers)])
        self.centred = centred

    def reserve(self, rows: int, slots: int, used: int = 0) -> None:
        """Make room for that many rows and slots; used: slots that rows in it use now. Too few rows at least double, too few slots
        grow by an eighth at least, and a few: growing stays cheap, and torch's attention reads all slots of a row."""
        write = self.write
        if rows <= write.rows and slots <= write.slots:
            return
        if rows > write.rows:
            write.rows = max(rows, 2 * write.rows)
        if slots > write.slots:
            write.slots = round_up(max(slots, write.slots + max(write.slots // 8, MORE_SLOTS)))
        if self.most is not None and write.rows * write.slots > self.most:
            write.rows, write.slots = rows, round_up(max(slots, used))
        self._resize()

    def shrink(self, slots: int) -> None:
        """Keep room for that many slots, if there is much more than twice as much: long rows have left."""
        if self.write.slots > 2 * round_up(slots) + MORE_SLOTS:
            self.write.slots = round_up(slots)
            self._resize()

    def _resize(self) -> None:
        for layer in self.layers:
            layer.resize()

    def begin_prefill(self, first_row: int, lengths: torch.Tensor, first_slot: int = 0) -> None:
        """The next forward pass writes rows of these lengths [n], and padding, from first_slot on, starting at row first_row."""
        write = self.write
        write.first_row, write.first_slot, write.lengths, write.targets = first_row, first_slot, lengths, None

    def begin_decode(self, positions: torch.Tensor, length: int) -> None:
        """The next forward pass writes one token per row at positions [n]; attention sees slots [0, length)."""
        self.write.targets, self.write.length = positions, length

    def move_rows(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        """Copy the first length slots of rows source [m] over rows target [m] (no row in both)."""
        for layer in self.layers:
            layer.move_rows(source, target, length)


def ragged_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Transformers' sdpa attention, except for short prompts on CPUs and a single query token per row, the decode step.

    There the query heads of a key-value head become its lines of queries, so grouped-query attention copies no keys. Other
    callers may give no mask (nothing is hidden from one token), or numbers to be added.
    query [n, heads, q, D], key and value [n, H, length, D], the engine's mask [n or 1, 1, q, length] bool, or `causal_mask` for
    the triangle where q is the length -> [n, q, heads, D].
    """
    n, heads, tokens, channels = query.shape
    if attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:  # `causal_mask`
        output = scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=heads != key.shape[1]
        )
        return output.transpose(1, 2).contiguous(), None
    masked = attention_mask is not None and attention_mask.dtype == torch.bool
    plain = masked and query.device.type == "cpu" and tokens <= PLAIN_LENGTH and dropout == 0.0
    if tokens != 1 and not plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query = query.reshape(n, key.shape[1], heads // key.shape[1] * tokens, channels)
    if plain:
        mask = attention_mask.expand(n, -1, -1, -1)
        offsets = score_offsets(mask, key.shape[1], key.dtype, lines=query.shape[2] // tokens)
        output = plain_products(query, key, value, offsets, channels**-0.5 if scaling is None else scaling)
    else:
        output = scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    return output.reshape(n, heads, tokens, value.shape[-1]).transpose(1, 2), None


def causal_mask(device: torch.device) -> torch.Tensor:
    """A mask of one place: transformers passes on what has four dimensions, and attention needs no numbers for its triangle."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def score_offsets(mask: torch.Tensor, groups: int, dtype: torch.dtype, lines: int = 1) -> torch.Tensor:
    """For `plain_products`: 0 where a slot is seen, else so low that it gets no weight (a token that sees nothing stays finite).

    mask [n, 1, q, length] bool, for H groups of that many lines -> [n * H, lines * q, length]
    """
    offsets = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    return offsets[:, :, None].expand(-1, groups, lines, -1, -1).flatten(2, 3).flatten(0, 1)


def plain_products(query, key, value, offsets, scaling: float) -> torch.Tensor:
    """Softmax attention as two batches of matrix products, for CPUs: several times as fast as the fused kernel where a row has
    one query and its keys lie together, and faster for short prompts (measured: rlhf_ray/bench/trials.py).

    query [n, H, g, D], key and value [n, H, length, D], offsets [n * H, 1 or g, length] -> [n * H, g, D]
    """
    query, key, value = (states.flatten(0, 1) for states in (query, key, value))
    scores = torch.baddbmm(offsets, query, key.transpose(1, 2), alpha=scaling)
    return torch.bmm(scores.softmax(-1), value)


RAGGED = "rlhf_ray_ragged"
AttentionInterface.register(RAGGED, ragged_attention)
# With sdpa's own masks the model stays right for anyone who calls it without this cache.
AttentionMaskInterface.register(RAGGED, sdpa_mask)

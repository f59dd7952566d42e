"""What a forward pass keeps for its backward pass, and what one alone takes: counted per block.   Bytes.

The counts are those of the tensors that autograd holds on to, in GPT-2's blocks and in gated ones (Llama, Qwen2) without dropout,
on packed lines (tests/test_memory.py). For 16 bits and dropout's masks Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1)
count 34 per token and channel and 5 per attention weight.
"""

from __future__ import annotations

from rlhf_ray.models.held_weights import HeldWeights
from rlhf_ray.models.size import ModelShape

PLAIN_ATTENTION = 256  # tokens of the longest sequence up to which a CPU keeps attention weights; GPUs keep none
AT_CHECKPOINTS = 4  # the float32 input of each block
AT_THE_END = 10  # the last norm's, whatever the blocks keep
#: Of a block, by (16 bits, gated): bytes per token and channel of (norms, queries and attention's output; keys and values, per
#: channel of theirs; the feed-forward, per channel of its own).
BLOCK = {(False, False): (24, 4, 8), (False, True): (32, 4, 16), (True, False): (16, 2, 4), (True, True): (30, 2, 8)}


def block_bytes(shape: ModelShape, *, tokens: int, longest: int, itemsize: int, on_gpu: bool) -> float:
    """What one block keeps of `tokens` tokens in rows of `longest`."""
    norms, keys, inner = BLOCK[itemsize == 2, shape.gated]
    kept = norms * shape.width + 2 * keys * shape.key_value_width + inner * shape.feed_forward
    if not on_gpu and longest <= PLAIN_ATTENTION:
        kept += itemsize * shape.heads * longest
    return float(tokens) * kept


def kept_bytes(
    shape: ModelShape, *, tokens: int, longest: int, itemsize: int, checkpointing: bool, on_gpu: bool = False
) -> float:
    """What a forward pass over `tokens` keeps, without logits and autocast's copies of weights."""
    block = block_bytes(shape, tokens=tokens, longest=longest, itemsize=itemsize, on_gpu=on_gpu)
    kept = tokens * shape.width * shape.layers * AT_CHECKPOINTS + block if checkpointing else block * shape.layers
    return kept + tokens * shape.width * AT_THE_END


def cast_bytes(held: HeldWeights, *, itemsize: int, checkpointing: bool) -> float:
    """Autocast's 16-bit copies of float32 weights; with checkpoints those of a block last as long as its activations."""
    return 2.0 * (held.cast_at_once if checkpointing else held.cast) if itemsize == 2 else 0.0


def passing_bytes(shape: ModelShape, *, tokens: int, itemsize: int) -> float:
    """The most that a pass without a backward pass holds at any one time, without logits: a block's feed-forward layer."""
    return float(tokens) * itemsize * ((3 if shape.gated else 2) * shape.feed_forward + 4 * shape.width)

"""The arithmetic that a PPO iteration cannot do without, counted from its shape.   Floating-point operations, no timing.

A product of [m, k] and [k, n] is 2 m k n operations. Counted are the matrices of the blocks, attention's two products over
the tokens that a token sees (itself and those before it), and the head of the language model, where a token is drawn or its
log-prob is asked for. Left out, because they are below a hundredth: norms, activations, softmax, optimiser, heads of width 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder's shape. None: as in GPT-2."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    feed_forward: int | None = None  # None: 4 x width
    gated: bool = False  # the feed-forward layer has three matrices, not two
    key_value_heads: int | None = None  # None: as many as heads

    @property
    def key_value_width(self) -> int:
        return self.width // self.heads * (self.key_value_heads or self.heads)

    @property
    def block_weights(self) -> int:
        """Weights of one block's matrices: query and output, key and value, feed-forward."""
        return 2 * self.width**2 + 2 * self.width * self.key_value_width + self.feed_forward_weights

    @property
    def feed_forward_weights(self) -> int:
        return (3 if self.gated else 2) * self.width * (self.feed_forward or 4 * self.width)

    def adapter_weights(self, rank: int) -> int:
        """Of low-rank adapters at all matrices of a block: `rank` per input and per output."""
        width, inner, cached = self.width, self.feed_forward or 4 * self.width, self.key_value_width
        if self.gated:  # queries, keys, values, output and the feed-forward's three, each a layer of its own
            return rank * (2 * width + 2 * (width + cached) + 2 * width + 3 * (width + inner))
        return rank * (width + width + 2 * cached + 2 * width + 2 * (width + inner))  # GPT-2 has queries, keys, values in one

    @property
    def weights(self) -> int:
        """Of all blocks and of the embeddings, which the head shares."""
        return self.layers * self.block_weights + self.vocabulary * self.width


def llama_from_scratch(*, layers: int, width: int, heads: int, vocabulary: int, key_value_heads: int | None = None) -> Shape:
    """As `model.from_scratch` builds a Llama: three matrices of 8/3 of the width."""
    return Shape(
        key_value_heads=key_value_heads,
        layers=layers,
        width=width,
        heads=heads,
        vocabulary=vocabulary,
        gated=True,
        feed_forward=-(-width * 8 // 96) * 32,
    )


#: name -> shape, for `--size`. 124m is GPT-2's, smollm2 that of SmolLM2-135M.
SIZES = {
    "4m": Shape(layers=4, width=256, heads=4, vocabulary=4096),
    "14m": Shape(layers=6, width=384, heads=6, vocabulary=8192),
    "124m": Shape(layers=12, width=768, heads=12, vocabulary=50257),
    "smollm2": llama_from_scratch(layers=30, width=576, heads=9, key_value_heads=3, vocabulary=49152),
    "1b": llama_from_scratch(layers=18, width=2048, heads=16, vocabulary=32000),
}


def shape_of(size: str, *, layers: int | None, width: int | None, heads: int | None, vocabulary: int | None) -> Shape:
    """A named size, with the given values in place of its own."""
    if size not in SIZES:
        raise UserError(f"--size {size!r} is none of {', '.join(SIZES)}")
    base = SIZES[size]
    build = llama_from_scratch if base.gated else Shape
    return build(
        layers=layers or base.layers, width=width or base.width, heads=heads or base.heads,
        vocabulary=vocabulary or base.vocabulary, key_value_heads=base.key_value_heads if heads is None else None,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One iteration: rows responses of `response` tokens to prompts of `prompt` tokens."""

    rows: int
    prompt: int
    response: int
    epochs: int
    lora_rank: int | None = None  # of adapters at policy and critic, which alone train; None: all weights do


def blocks(shape: Shape, tokens: int) -> int:
    """One row of `tokens` tokens through all blocks; token t attends over t keys."""
    seen = tokens * (tokens + 1) // 2
    return shape.layers * (2 * shape.block_weights * tokens + 4 * shape.width * seen)


def head(shape: Shape, tokens: int) -> int:
    """Logits at `tokens` places."""
    return 2 * shape.width * shape.vocabulary * tokens


def generation(shape: Shape, work: Work) -> int:
    """The last token drawn is never fed."""
    return work.rows * (blocks(shape, work.prompt + work.response - 1) + head(shape, work.response))


def language_forward(shape: Shape, work: Work) -> int:
    """Log-probs of the responses: reference or policy."""
    return work.rows * (blocks(shape, work.prompt + work.response) + head(shape, work.response))


def value_forward(shape: Shape, work: Work) -> int:
    """A body with a head of width 1: reward model or critic."""
    return work.rows * blocks(shape, work.prompt + work.response)


def adapters(shape: Shape, work: Work) -> int:
    """A forward pass of policy and critic through their adapters, beside that through the matrices."""
    if work.lora_rank is None:
        return 0
    return 2 * 2 * work.rows * (work.prompt + work.response) * shape.layers * shape.adapter_weights(work.lora_rank)


def backward(shape: Shape, work: Work, forward: int) -> int:
    """Of policy and critic, whose forward pass through the matrices is `forward`: one gradient for inputs, one for what trains."""
    return 2 * forward if work.lora_rank is None else forward + 2 * adapters(shape, work)


def phases(shape: Shape, work: Work) -> dict[str, int]:
    """Operations of each phase of an iteration."""
    language, value = language_forward(shape, work), value_forward(shape, work)
    trained = language + value
    return {
        "generate": generation(shape, work),
        "score": 2 * language + 2 * value + adapters(shape, work),  # reference and policy, reward model and critic
        "assemble": 0,
        "update": work.epochs * (trained + adapters(shape, work) + backward(shape, work, trained)),
        "sync": 0,
    }


def computed(shape: Shape, work: Work) -> dict[str, int]:
    """What is still needed of `phases` here, with ppo.reuse_forward: the first epoch starts from the forward passes of the old
    log-probs and values, and the last block's feed-forward works where its output is read (`models.last_block`)."""
    feed_forward = 2 * shape.feed_forward_weights * work.rows
    unread = feed_forward * work.prompt  # of the states before the response's tokens
    language, value = language_forward(shape, work) - unread, value_forward(shape, work) - unread
    reward = value_forward(shape, work) - feed_forward * (work.prompt + work.response - 1)  # one state a row
    trained, beside = language + value, adapters(shape, work)
    score = 2 * language + value + reward + beside
    update = work.epochs * backward(shape, work, trained) + (work.epochs - 1) * (trained + beside)
    return phases(shape, work) | {"score": score, "update": update}


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """One line of the table."""

    phase: str
    seconds: float
    flop: float
    peak_share: float  # of the seconds, how many the arithmetic takes at the rate measured


def peak_shares(seconds: dict[str, float], flop: dict[str, int], flop_per_s: float) -> list[PhaseRow]:
    """One row per phase, and "iteration" for all of them together."""
    rows = {name: (seconds[name], flop[name]) for name in seconds}
    rows["iteration"] = (sum(seconds.values()), sum(flop[name] for name in seconds))
    return [PhaseRow(name, took, work, work / (took * flop_per_s) if took > 0 else 0.0)
            for name, (took, work) in rows.items()]  # fmt: skip

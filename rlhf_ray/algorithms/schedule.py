"""Who trains on what, when, and at which rate: pure functions of the seed and the step."""

from __future__ import annotations

# torch annotates tolist in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import hashlib
from collections.abc import Sequence
from typing import cast

import torch


def draw_seed(*keys: int | str) -> int:
    """A 63-bit seed from a hash of the keys, e.g. (seed, rollout step, prompt index, sample index)."""
    digest = hashlib.blake2b("/".join(str(key) for key in keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def linear_anneal(peak: float, step: int, total: int) -> float:
    """The rate of step 0..total-1 of a line from peak to zero at step `total`."""
    return peak * (1.0 - step / total)


def epoch_permutation(rows: int, seed: int) -> list[int]:
    """A permutation of range(rows) that depends on the seed alone."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return cast(list[int], order.tolist())


def minibatch_rows(rows: int, minibatch_size: int, ppo_epochs: int, seed: int) -> list[list[int]]:
    """Rows of each optimiser step of one update: a fresh permutation every epoch, cut into minibatches, rows ascending.

    A minibatch's loss is a sum over its rows, so their order inside it carries no meaning; ascending order makes the
    arithmetic the same whatever was drawn.
    """
    steps: list[list[int]] = []
    for epoch in range(ppo_epochs):
        order = epoch_permutation(rows, draw_seed(seed, "epoch", epoch))
        steps += [sorted(order[i : i + minibatch_size]) for i in range(0, rows, minibatch_size)]
    return steps


def cut_microbatches(
    lengths: Sequence[int], *, size: int, tokens: int | None = None, at_least: int = 1
) -> list[list[int]]:
    """Which rows share a forward pass: `size` of them in order, or as many of like length as `tokens` holds.

    lengths: tokens of each row, prompt included. at_least: groups wanted, at most as many as rows (ranks that work together
    need equally many); the first of the largest is halved until there are that many. A row longer than `tokens` stands alone.
    """
    groups: list[list[int]] = []
    if tokens is None:
        groups = [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]
    else:
        left = 0  # tokens of the last group
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            if lengths[row] > left:
                groups.append([])
                left = tokens
            groups[-1].append(row)
            left -= lengths[row]
    while len(groups) < at_least:
        largest = max(range(len(groups)), key=lambda number: len(groups[number]))
        half = len(groups[largest]) // 2
        groups[largest : largest + 1] = [groups[largest][:half], groups[largest][half:]]
    return groups


def deal_rows(rows: Sequence[int], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Rows of a minibatch over ranks: equally many each, and about as many tokens; ascending within a rank.

    The longest first, in rounds that go there and back (0, 1, 1, 0, 0, 1, ...): each round evens out the one before it.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for place, row in enumerate(sorted(rows, key=lambda row: -lengths[row])):
        turn, rank = divmod(place, ranks)
        dealt[rank if turn % 2 == 0 else ranks - 1 - rank].append(row)
    return [sorted(part) for part in dealt]

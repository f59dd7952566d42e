"""Who trains on what, when, and at which rate: pure functions of the seed and the step."""

from __future__ import annotations

import hashlib

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
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()


def minibatch_rows(rows: int, minibatch_size: int, ppo_epochs: int, seed: int) -> list[list[int]]:
    """Rows of each optimiser step of one update: a fresh permutation every epoch, cut into minibatches, rows ascending.

    A minibatch's loss is a sum over its rows, so their order inside it carries no meaning; ascending order makes the
    arithmetic the same whatever was drawn.
    """
    steps = []
    for epoch in range(ppo_epochs):
        order = epoch_permutation(rows, draw_seed(seed, "epoch", epoch))
        steps += [sorted(order[i : i + minibatch_size]) for i in range(0, rows, minibatch_size)]
    return steps

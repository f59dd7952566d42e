"""How a trial is made: two ways of the same work in turns, and what both work on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ray.models.load import disable_dropout
from rlhf_ray.training.forward import LogprobModel, TokenBatch, token_batch
from rlhf_ray.training.precision import resolve_precision

ROWS, PROMPT, RESPONSE, VOCABULARY, WIDTH = 16, 32, 48, 4096, 256
DTYPE = resolve_precision("auto", "cpu")
NARROW = torch.finfo(DTYPE).bits == 16


def trial(name: str, verdict: str, before: Callable[[], object], after: Callable[[], object], *, repeats: int = 15) -> None:
    times: dict = {before: [], after: []}
    for repeat in range(repeats + 2):
        for run in (before, after):
            started = time.perf_counter()
            run()
            if repeat > 1:
                times[run].append(1000 * (time.perf_counter() - started))
    old, new = (statistics.median(times[run]) for run in (before, after))
    say(name, verdict, old, new)


def say(name: str, verdict: str, old: float, new: float) -> None:
    """old, new: ms"""
    print(f"{name:58} {old:8.2f} ms -> {new:8.2f} ms   {old / new:5.2f} times as fast   {verdict}", flush=True)


def module() -> LogprobModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_head=WIDTH // 64, n_embd=WIDTH, vocab_size=VOCABULARY, n_positions=512,
                        activation_function="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    disable_dropout(model)
    return LogprobModel(model.train(), temperature=1.0, compute_dtype=DTYPE)


def line(rows: int = ROWS) -> TokenBatch:
    """That many rows of PROMPT + RESPONSE tokens, packed."""
    generator = np.random.default_rng(0)
    prompts, responses = ([generator.integers(0, VOCABULARY, length) for _ in range(rows)] for length in (PROMPT, RESPONSE))
    return token_batch(prompts, responses, packed=True)


def both_ways(function, *inputs):
    """Forward and backward, as one call."""

    def run():
        function(*inputs).sum().backward()

    return run

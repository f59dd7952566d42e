"""Trials of decode steps and draws (`bench.trials`)."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from rlhf_ray.algorithms.sampling import inverse_cdf
from rlhf_ray.bench.trial import DTYPE, VOCABULARY, module, say, trial
from rlhf_ray.config.threads import ALONE_ENVIRONMENT
from rlhf_ray.generation import kv_cache
from rlhf_ray.generation.ragged_decoder import RaggedDecoder


def decode_attention() -> None:
    """64 rows at 80 tokens, the caches of four layers in turn: as in a model, one does not stay near the core."""
    torch.set_num_threads(2)
    mask = (torch.arange(80) < torch.randint(40, 81, (64, 1)))[:, None, None]
    query = torch.randn(64, 4, 1, 64).to(DTYPE)
    caches = [[torch.randn(64, 4, 80, 64).to(DTYPE) for _ in range(2)] for _ in range(4)]
    by_token = [[states.transpose(1, 2).contiguous().transpose(1, 2) for states in cache] for cache in caches]
    offsets = kv_cache.score_offsets(mask, 4, DTYPE)

    def fused():
        for keys, values in caches:
            F.scaled_dot_product_attention(query, keys, values, mask, scale=0.125)

    def products(caches):
        for keys, values in caches:
            kv_cache.plain_products(query, keys, values, offsets, 0.125)

    name = "four layers' decode attention by two batches of products"
    trial(f"{name}, for fused", "kept", fused, lambda: products(caches))
    trial(
        "... heads apart in the cache, for tokens apart", "kept", lambda: products(by_token), lambda: products(caches)
    )
    torch.set_num_threads(1)


def decode_step(rows: int, *, written_out: bool = True) -> Callable[[], object]:
    """One of that many rows at 60 tokens, to be called."""
    model = module().to(DTYPE).model
    model.set_attn_implementation("sdpa")
    decoder = RaggedDecoder(model)
    if not written_out:
        decoder.step = None
    cache, ids = decoder.new_cache(), np.random.default_rng(0).integers(0, VOCABULARY, (rows, 61))
    cache.reserve(rows, 61)
    with torch.inference_mode():
        decoder.prefill(cache, 0, list(ids))
    return partial(torch.inference_mode()(decoder.decode), cache, ids[:, -1], np.full(rows, 60))


def generation() -> None:
    """A decode step of 64 rows at 60 tokens, and 64 draws; two threads."""
    torch.set_num_threads(2)
    forward, written_out = decode_step(64, written_out=False), decode_step(64)
    trial("decode step written out, for the model's forward", "kept", forward, written_out)
    logprobs, uniforms = torch.randn(64, 50257).log_softmax(-1), torch.rand(64)

    def scan():
        cumulative = logprobs.exp().cumsum(-1)
        torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)

    trial("64 draws from 50,257 by pieces, for one scan", "kept", scan, lambda: inverse_cdf(logprobs, uniforms))
    torch.set_num_threads(1)


def spinning() -> None:
    """Two threads, in a process for each way: of the decode steps that this prints, medians of three processes."""
    code = """
import statistics, time, torch
from rlhf_ray.bench.generation_trials import decode_step
torch.set_num_threads(2)
for rows in (1, 16, 64):
    step, seconds = decode_step(rows), []
    for _ in range(200):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    print(1000 * statistics.median(seconds))
"""
    times: dict = {False: [], True: []}
    for _ in range(3):
        for spins, taken in times.items():
            environment = os.environ | {"OMP_WAIT_POLICY": "passive"} | (ALONE_ENVIRONMENT if spins else {})
            done = subprocess.run(
                [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env=environment, timeout=300,
            )  # fmt: skip
            taken.append([float(line) for line in done.stdout.split()[-3:]])
    for place, rows in enumerate((1, 16, 64)):
        old, new = (statistics.median(each[place] for each in times[spins]) for spins in (False, True))
        say(f"decode step of {rows} rows, threads that spin 0.2 ms", "kept", old, new)

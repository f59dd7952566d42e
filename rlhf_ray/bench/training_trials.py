"""Trials of forward and backward passes and of optimiser steps (`bench.trials`)."""

from __future__ import annotations

import socket
import time
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rlhf_ray.algorithms.logprobs import add_at, selected_logprobs, selected_logprobs_and_entropy
from rlhf_ray.bench.trial import DTYPE, PROMPT, RESPONSE, ROWS, VOCABULARY, WIDTH, both_ways, line, module, trial
from rlhf_ray.models.activation import SigmoidGELU
from rlhf_ray.models.last_block import only_at
from rlhf_ray.training import packed_attention
from rlhf_ray.training.deepspeed_engine import DeepSpeedEngine, OptimiserConfig
from rlhf_ray.training.distributed import join_group
from rlhf_ray.training.embedding_gradient import add_to_looked_up_rows
from rlhf_ray.training.forward import token_batch


def activation() -> None:
    x = torch.randn(ROWS * (PROMPT + RESPONSE), 4 * WIDTH).to(DTYPE).requires_grad_()
    tanh = both_ways(lambda x: F.gelu(x, approximate="tanh"), x)
    trial("activation by the sigmoid, for tanh", "kept", tanh, both_ways(SigmoidGELU(), x))


def head() -> None:
    logits = torch.randn(ROWS * RESPONSE, VOCABULARY).to(DTYPE).requires_grad_()
    ids = torch.randint(VOCABULARY, (len(logits),))

    def plain(logits):
        logits = logits.float()
        return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)

    def pieces(logits):
        return selected_logprobs(logits, ids, temperature=1.0)

    trial("log-softmax in pieces with its own gradient", "kept", both_ways(plain, logits), both_ways(pieces, logits))


def gradient_at_one_column() -> None:
    """Of the log-probs' gradient by the logits."""
    shares, ids = torch.rand(ROWS * RESPONSE, VOCABULARY).to(DTYPE), torch.randint(VOCABULARY, (ROWS * RESPONSE,))
    gradient = torch.randn(len(ids), 1).to(DTYPE)
    trial(
        "a gradient's one column by its index, for scatter_add_",
        "kept",
        lambda: (shares * -gradient).scatter_add_(1, ids[:, None], gradient),
        lambda: add_at(shares * -gradient, ids, gradient),
    )


def entropy_beside_logprobs() -> None:
    logits, ids = torch.randn(ROWS * RESPONSE, VOCABULARY).to(DTYPE), torch.randint(VOCABULARY, (ROWS * RESPONSE,))

    def apart():
        selected_logprobs(logits, ids, temperature=1.0)
        for some in logits.float().split(max(1, 2**18 // VOCABULARY)):
            _ = some.logsumexp(-1) - (some.softmax(-1) * some).sum(-1)

    trial("entropy in the log-probs' reading of the logits", "kept", apart,
          lambda: selected_logprobs_and_entropy(logits, ids, temperature=1.0))  # fmt: skip


def rows_of_unlike_length() -> None:
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, VOCABULARY, length) for length in generator.integers(8, PROMPT + 1, ROWS)]
    responses = [generator.integers(0, VOCABULARY, length) for length in generator.integers(8, RESPONSE + 1, ROWS)]
    padded, packed = (token_batch(prompts, responses, packed=way) for way in (False, True))
    old = module()
    old.model.set_attn_implementation("eager")
    new = module()
    trial("rows of 16 to 80 tokens on one line, for padding", "kept", both_ways(old, padded), both_ways(new, packed))


def attention() -> None:
    model, batch = module(), line()

    def with_length(longest):
        def run():
            packed_attention.PLAIN_LENGTH = longest
            model(batch).sum().backward()

        return run

    trial("fused attention at 80 tokens, for plain products", "not used", with_length(256), with_length(0))
    packed_attention.PLAIN_LENGTH = 256


def attention_weights() -> None:
    scores = torch.randn(4 * ROWS, PROMPT + RESPONSE, PROMPT + RESPONSE).bfloat16()
    scores += torch.full(scores.shape[1:], -torch.inf).triu(1).bfloat16()
    trial(
        "attention's softmax by way of float32",
        "kept",
        lambda: scores.softmax(-1),
        lambda: packed_attention.softmax(scores),
    )


def weights_in_16_bits() -> None:
    """Four passes of 4 rows: autocast makes the 16-bit weights in each, or once for all."""
    run = both_ways(module(), line(4))

    def each():
        for _ in range(4):
            run()

    def once():
        torch.autocast_increment_nesting()
        each()
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()

    trial("autocast's weights made once for four passes", "not used", each, once)


def last_feed_forward() -> None:
    model, batch = module(), line()
    where_read = model._only_at

    def with_hooks(hooks):
        def run():
            model._only_at = hooks
            model(batch).sum().backward()

        return run

    trial("last feed-forward where it is read", "kept", with_hooks(partial(only_at, None)), with_hooks(where_read))


def adam() -> None:
    steps = []
    for fused in (False, True):
        weights = list(module().parameters())
        optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=fused)
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        steps.append(optimizer.step)
    trial("Adam in one pass over each weight", "kept", *steps)


def gradient_bucket() -> None:
    """An optimiser step of 25 M weights by DeepSpeed on one rank, with and without its reduction over ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join_group(rank=0, world_size=1, address="127.0.0.1", port=port, device_type="cpu", timeout_s=60)
    layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(24)))
    settings = OptimiserConfig(adam_eps=1e-5, max_grad_norm=1.0, zero_stage=0)
    engine, x = DeepSpeedEngine(layers, settings, device=torch.device("cpu")), torch.randn(64, 1024)

    def step(reduces: bool) -> None:
        engine.engine.enable_backward_allreduce = reduces
        engine.step([((x,), None)], lambda output, _: output.square().mean(), learning_rate=1e-6)

    trial("one rank's gradients not through a bucket", "kept", partial(step, True), partial(step, False))


def embedding_gradient() -> None:
    """GPT-2's own embedding, 640 tokens, and the second microbatch of an optimiser step."""
    ids, plain, rows = torch.randint(50257, (1, 640)), nn.Embedding(50257, 768), nn.Embedding(50257, 768)
    add_to_looked_up_rows(rows)
    ways = [both_ways(layer, ids) for layer in (plain, rows)]
    for way in ways:
        way()
    trial("embedding's gradient added to the rows looked up", "kept", *ways)


def compiled() -> None:
    batch, plain, fast = line(), module(), module()
    cast(nn.Module, fast.model.transformer).compile(dynamic=False)
    started = time.perf_counter()
    both_ways(fast, batch)()
    print(f"torch.compile of the body took {time.perf_counter() - started:.0f} s, for one shape", flush=True)
    trial(
        "torch.compile of the body",
        "a wait for every new shape: not used",
        both_ways(plain, batch),
        both_ways(fast, batch),
    )

"""What was tried to make a step faster on CPUs, each against what it would replace: python results/bench/trials.py [--compile]

One thread unless said otherwise, bfloat16, GPT-2 of 4.3 M parameters (4 layers, width 256, vocabulary 4,096), 16 rows of 32 + 48
tokens. Prints one line a trial: milliseconds of both, their ratio, and whether it was kept. Median of 15, taken in turns.
"""

import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ray.engines import packing
from rlhf_ray.engines.forward import LogprobModel, token_batch
from rlhf_ray.models.activation import SigmoidGELU
from rlhf_ray.models.load import disable_dropout

ROWS, PROMPT, RESPONSE, VOCABULARY, WIDTH = 16, 32, 48, 4096, 256


def trial(name: str, verdict: str, before, after) -> None:
    times: dict = {before: [], after: []}
    for repeat in range(17):
        for run in (before, after):
            started = time.perf_counter()
            run()
            if repeat > 1:
                times[run].append(1000 * (time.perf_counter() - started))
    old, new = (statistics.median(times[run]) for run in (before, after))
    print(f"{name:58} {old:8.2f} ms -> {new:8.2f} ms   {old / new:5.2f} times as fast   {verdict}", flush=True)


def module(**options) -> LogprobModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_head=4, n_embd=WIDTH, vocab_size=VOCABULARY, n_positions=512,
                        activation_function="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    disable_dropout(model)
    return LogprobModel(model.train(), temperature=1.0, compute_dtype=torch.bfloat16)


def both_ways(function, *inputs):
    """Forward and backward, as one call."""

    def run():
        function(*inputs).sum().backward()

    return run


def activation() -> None:
    x = torch.randn(ROWS * (PROMPT + RESPONSE), 4 * WIDTH).bfloat16().requires_grad_()
    tanh = both_ways(lambda x: F.gelu(x, approximate="tanh"), x)
    trial("activation by the sigmoid, for tanh", "kept", tanh, both_ways(SigmoidGELU(), x))


def head() -> None:
    logits = torch.randn(ROWS * RESPONSE, VOCABULARY).bfloat16().requires_grad_()
    ids = torch.randint(VOCABULARY, (len(logits),))

    def plain(logits):
        logits = logits.float()
        return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)

    from rlhf_ray.algorithms.logprobs import selected_logprobs

    def pieces(logits):
        return selected_logprobs(logits, ids, temperature=1.0)

    trial("log-softmax in pieces with its own gradient", "kept", both_ways(plain, logits), both_ways(pieces, logits))


def rows_of_unlike_length() -> None:
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, VOCABULARY, length) for length in generator.integers(8, PROMPT + 1, ROWS)]
    responses = [generator.integers(0, VOCABULARY, length) for length in generator.integers(8, RESPONSE + 1, ROWS)]
    model = module()
    padded, packed = (token_batch(prompts, responses, packed=way) for way in (False, True))
    model.model.set_attn_implementation("eager")
    old = module()
    old.model.set_attn_implementation("eager")
    new = module()
    trial("rows of 16 to 80 tokens on one line, for padding", "kept", both_ways(old, padded), both_ways(new, packed))


def attention() -> None:
    generator = np.random.default_rng(0)
    rows = [[generator.integers(0, VOCABULARY, length) for _ in range(ROWS)] for length in (PROMPT, RESPONSE)]
    model, batch = module(), token_batch(*rows, packed=True)

    def with_length(longest):
        def run():
            packing.PLAIN_LENGTH = longest
            model(batch).sum().backward()

        return run

    trial("fused attention at 80 tokens, for plain products", "not used", with_length(256), with_length(0))
    packing.PLAIN_LENGTH = 256


def decode_attention() -> None:
    torch.set_num_threads(2)
    query, key, value = torch.randn(64, 4, 1, 64), *(torch.randn(64, 4, 80, 64) for _ in range(2))
    mask = (torch.arange(80) < torch.randint(40, 81, (64, 1)))[:, None, None]
    bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf).expand(64, 4, 1, 80).flatten(0, 1)
    short = [each.bfloat16() for each in (query, key, value)]

    def converting():
        F.scaled_dot_product_attention(*(each.float() for each in short), mask, scale=0.125).bfloat16()

    def fused():
        F.scaled_dot_product_attention(query, key, value, mask, scale=0.125)

    def products():
        scores = torch.baddbmm(bias, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=0.125)
        torch.bmm(scores.softmax(-1), value.flatten(0, 1))

    trial("a decode step's attention over a float32 cache (2 threads)", "kept", converting, fused)
    trial("... by two products (2 threads)", "whole generation no faster: not used", fused, products)
    torch.set_num_threads(1)


def packed_weights() -> None:
    x, weight, bias = (
        torch.randn(64, WIDTH).bfloat16(),
        torch.randn(4 * WIDTH, WIDTH).bfloat16(),
        torch.randn(4 * WIDTH).bfloat16(),
    )
    ready = torch.ops.mkldnn._reorder_linear_weight(weight, 64)

    def prepacked():
        torch.ops.mkldnn._linear_pointwise(x, ready, bias, "none", [], "")

    trial("weights laid out for the kernel once (64 rows)", "a few per cent of generation: not used",
          lambda: F.linear(x, weight, bias), prepacked)  # fmt: skip


def compiled() -> None:
    generator = np.random.default_rng(0)
    rows = [[generator.integers(0, VOCABULARY, length) for _ in range(ROWS)] for length in (PROMPT, RESPONSE)]
    batch, plain, fast = token_batch(*rows, packed=True), module(), module()
    fast.model.transformer.compile(dynamic=False)
    started = time.perf_counter()
    both_ways(fast, batch)()
    print(f"torch.compile of the body took {time.perf_counter() - started:.0f} s, for one shape", flush=True)
    trial(
        "torch.compile of the body",
        "a wait for every new shape: not used",
        both_ways(plain, batch),
        both_ways(fast, batch),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in (activation, head, rows_of_unlike_length, attention, decode_attention, packed_weights):
        part()
    if "--compile" in sys.argv:
        compiled()

"""What was tried to make a step faster on CPUs, each against what it would replace.

    python -m rlhf_ray.bench.trials [--compile] [NAME ...]

One thread unless said otherwise, bfloat16 (float32 and fewer trials on processors without instructions for that), GPT-2 of 4.3 M
parameters (4 layers, width 256, vocabulary 4,096), 16 rows of 32 + 48 tokens. Prints one line per trial: milliseconds of both,
their ratio, and whether it was kept. Median of 15 (imports: of 5, workers: of 3), in turns. NAME: a function below; without one,
all. All are without `cpu`, whose parts rlhf_ray/bench/ablation.py measures.
"""

import os
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ray.algorithms.logprobs import add_at, entropy, selected_logprobs, selected_logprobs_and_entropy
from rlhf_ray.algorithms.sampling import inverse_cdf
from rlhf_ray.config.threads import ALONE_ENVIRONMENT
from rlhf_ray.generation import kv_cache
from rlhf_ray.generation.ragged_decoder import RaggedDecoder
from rlhf_ray.models.activation import SigmoidGELU
from rlhf_ray.models.last_block import only_at
from rlhf_ray.models.load import disable_dropout
from rlhf_ray.training import packed_attention
from rlhf_ray.training.deepspeed_engine import DeepSpeedEngine, OptimiserConfig
from rlhf_ray.training.distributed import join_group
from rlhf_ray.training.embedding_gradient import add_to_looked_up_rows
from rlhf_ray.training.forward import LogprobModel, token_batch
from rlhf_ray.training.precision import resolve_precision

ROWS, PROMPT, RESPONSE, VOCABULARY, WIDTH = 16, 32, 48, 4096, 256
DTYPE = resolve_precision("auto", "cpu")
NARROW = torch.finfo(DTYPE).bits == 16


def trial(name: str, verdict: str, before, after, *, repeats: int = 15) -> None:
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


def module(width: int = WIDTH) -> LogprobModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_head=width // 64, n_embd=width, vocab_size=VOCABULARY, n_positions=512,
                        activation_function="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    disable_dropout(model)
    return LogprobModel(model.train(), temperature=1.0, compute_dtype=DTYPE)


def both_ways(function, *inputs):
    """Forward and backward, as one call."""

    def run():
        function(*inputs).sum().backward()

    return run


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
    generator = np.random.default_rng(0)
    rows = [[generator.integers(0, VOCABULARY, length) for _ in range(4)] for length in (PROMPT, RESPONSE)]
    run = both_ways(module(), token_batch(*rows, packed=True))

    def each():
        for _ in range(4):
            run()

    def once():
        torch.autocast_increment_nesting()
        each()
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()

    trial("autocast's weights made once for four passes", "not used", each, once)


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
            packed_attention.PLAIN_LENGTH = longest
            model(batch).sum().backward()

        return run

    trial("fused attention at 80 tokens, for plain products", "not used", with_length(256), with_length(0))
    packed_attention.PLAIN_LENGTH = 256


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


def generation() -> None:
    """A decode step of 64 rows at 60 tokens, two threads."""
    torch.set_num_threads(2)
    decoders = {}
    for way in ("forward", "written out"):
        model = module().to(DTYPE).model
        model.set_attn_implementation("sdpa")
        decoder = decoders[way] = RaggedDecoder(model)
        if way == "forward":
            decoder.step = None
    steps = {}
    for way, decoder in decoders.items():
        cache, ids = decoder.new_cache(), np.random.default_rng(0).integers(0, VOCABULARY, (64, 61))
        cache.reserve(64, 61)
        with torch.inference_mode():
            decoder.prefill(cache, 0, list(ids))
        decode = torch.inference_mode()(decoder.decode)
        steps[way] = partial(decode, cache, ids[:, -1], np.full(64, 60))
    trial("decode step written out, for the model's forward", "kept", steps["forward"], steps["written out"])
    logprobs, uniforms = torch.randn(64, 50257).log_softmax(-1), torch.rand(64)

    def scan():
        cumulative = logprobs.exp().cumsum(-1)
        torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)

    trial("64 draws from 50,257 by pieces, for one scan", "kept", scan, lambda: inverse_cdf(logprobs, uniforms))
    torch.set_num_threads(1)


def last_feed_forward() -> None:
    generator = np.random.default_rng(0)
    rows = [[generator.integers(0, VOCABULARY, length) for _ in range(ROWS)] for length in (PROMPT, RESPONSE)]
    model, batch = module(), token_batch(*rows, packed=True)
    where_read = model._only_at

    def with_hooks(hooks):
        def run():
            model._only_at = hooks
            model(batch).sum().backward()

        return run

    trial("last feed-forward where it is read", "kept", with_hooks(partial(only_at, None)), with_hooks(where_read))


def entropy_beside_logprobs() -> None:
    logits, ids = torch.randn(ROWS * RESPONSE, VOCABULARY).to(DTYPE), torch.randint(VOCABULARY, (ROWS * RESPONSE,))

    def apart():
        selected_logprobs(logits, ids, temperature=1.0)
        entropy(logits, temperature=1.0)

    trial("entropy in the log-probs' reading of the logits", "kept", apart,
          lambda: selected_logprobs_and_entropy(logits, ids, temperature=1.0))  # fmt: skip


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


def imports() -> None:
    """What every role imports, in a process of its own."""

    def process(first: str) -> None:
        code = f"{first}; import ray, torch, rlhf_ray.models.load"
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)

    plain, paused = partial(process, "pass"), partial(process, "import gc; gc.disable()")
    trial("imports of a role without garbage collection", "kept", plain, paused, repeats=5)


def workers() -> None:
    """Six actors on a Ray that runs, until each has what PPO's roles import."""
    import ray

    from rlhf_ray.actors.session import ray_session, worker_environment
    from rlhf_ray.actors.worker_start import fork_server

    class Role:
        def ready(self) -> None:
            import rlhf_ray.models.load
            import rlhf_ray.roles.generator  # noqa: F401

    def six(**runtime_env) -> None:
        actors = [ray.remote(Role).options(num_cpus=0, runtime_env=runtime_env).remote() for _ in range(6)]
        ray.get([actor.ready.remote() for actor in actors], timeout=300)
        for actor in actors:
            ray.kill(cast(Any, actor))  # Ray annotates a handle as one or the actor's class

    with fork_server(["ppo"], worker_environment()) as python, ray_session(None, stages=()):
        trial("six workers of Ray as forks of one process", "kept", six, partial(six, py_executable=python), repeats=3)


def decode_step(rows: int):
    """One of that many rows at 60 tokens, to be called."""
    model = module().to(DTYPE).model
    model.set_attn_implementation("sdpa")
    decoder = RaggedDecoder(model)
    cache, ids = decoder.new_cache(), np.random.default_rng(0).integers(0, VOCABULARY, (rows, 61))
    cache.reserve(rows, 61)
    with torch.inference_mode():
        decoder.prefill(cache, 0, list(ids))
    return partial(torch.inference_mode()(decoder.decode), cache, ids[:, -1], np.full(rows, 60))


def spinning() -> None:
    """Two threads, in a process for each way: of the decode steps that this prints, medians of three processes."""
    code = """
import statistics, time, torch, trials
torch.set_num_threads(2)
for rows in (1, 16, 64):
    step, seconds = trials.decode_step(rows), []
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
                env=environment, cwd=Path(__file__).parent, timeout=300,
            )  # fmt: skip
            taken.append([float(line) for line in done.stdout.split()[-3:]])
    for place, rows in enumerate((1, 16, 64)):
        old, new = (statistics.median(each[place] for each in times[spins]) for spins in (False, True))
        say(f"decode step of {rows} rows, threads that spin 0.2 ms", "kept", old, new)


def compiled() -> None:
    generator = np.random.default_rng(0)
    rows = [[generator.integers(0, VOCABULARY, length) for _ in range(ROWS)] for length in (PROMPT, RESPONSE)]
    batch, plain, fast = token_batch(*rows, packed=True), module(), module()
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


if __name__ == "__main__":
    os.environ["RLHF_RAY_CPU"] = "off"
    torch.set_num_threads(1)
    # First those of other processes, before threads of this one spin.
    tried = (spinning, imports, workers, activation, head, gradient_at_one_column, entropy_beside_logprobs,
             rows_of_unlike_length, attention, attention_weights, weights_in_16_bits, last_feed_forward, adam,
             decode_attention, generation, gradient_bucket, embedding_gradient)  # fmt: skip
    of_bfloat16 = attention_weights, weights_in_16_bits
    asked = [name for name in sys.argv[1:] if name != "--compile"]
    for part in tried:
        if part.__name__ in asked or (not asked and (NARROW or part not in of_bfloat16)):
            part()
    if "--compile" in sys.argv:
        compiled()

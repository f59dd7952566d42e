"""Single measurements for the first hour on GPUs (results/gpu/first_hour.sh).   `python -m` with the name of one

Each compares a way that was written without a GPU with the plain one, and ends with one line of figures. With
`--device cpu --small` they run anywhere, which says that they run and nothing else.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_ray.bench.flops import Shape, Work
from rlhf_ray.bench.random_run import bench_recipe, random_prompts, write_random_run
from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.models.load import load_causal_lm, to_device
from rlhf_ray.runs.run_folder import RunFolder

SMALL = Shape(layers=2, width=64, heads=4, vocabulary=1000, gated=True)
LARGE = Shape(layers=16, width=2048, heads=16, vocabulary=152_000, key_value_heads=4, gated=True)


@dataclass
class Bench:
    """A random model's folder, a device, and sizes."""

    device: torch.device
    small: bool
    folder: Path
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def model(self, dtype: torch.dtype | None = None):
        return to_device(load_causal_lm(self.folder, dtype), self.device)

    def tokenizer(self):
        from rlhf_ray.models.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    def sequences(self, rows: int, length: int, seed: int = 0) -> list[np.ndarray]:
        shape = SMALL if self.small else LARGE
        return [np.array(ids) for ids in random_prompts(shape.vocabulary, rows, length, seed)]

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Seconds, and GB at the peak beyond what was there before (on CPUs: of the process, ever)."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.figures[f"{name} s"] = round(time.perf_counter() - started, 3)
        self.figures[f"{name} GB"] = round(peak / 1e9, 3)


def decode(bench: Bench) -> None:
    """Item 6: the engines torch and graphs on the same prompts: tokens per second, and whether they draw the same."""
    from rlhf_ray.generation.engine import GenerationEngine

    rows, prompt, response = (8, 8, 8) if bench.small else (256, 128, 256)
    params = SamplingParams(max_new_tokens=response, min_new_tokens=response)
    drawn = {}
    for name in ("torch", "graphs"):
        engine = GenerationEngine(bench.model(bench.dtype), bench.tokenizer(), graphs=name == "graphs")
        prompts = bench.sequences(rows, prompt)
        engine.generate(prompts, range(rows), params)
        started = time.perf_counter()
        drawn[name] = engine.generate(prompts, range(rows), params)
        bench.figures[f"{name} tokens/s"] = round(rows * response / (time.perf_counter() - started))
        del engine
    pairs = list(zip(drawn["torch"], drawn["graphs"], strict=True))
    bench.figures["rows with the same tokens"] = float(np.mean([np.array_equal(a.response_ids, b.response_ids) for a, b in pairs]))
    bench.figures["first log-prob differs by"] = max(abs(float(a.logprobs[0] - b.logprobs[0])) for a, b in pairs)


def frozen(bench: Bench) -> None:
    """Item 7: a reference with its linear layers in bfloat16: GB, and whether any bit of a log-prob changes."""
    from rlhf_ray.roles.reference_policy import Reference
    from rlhf_ray.training.forward import response_logprobs

    rows = 4 if bench.small else 16
    prompts, responses = bench.sequences(rows, 16), bench.sequences(rows, 64, seed=1)
    with bench.measured("float32"):
        model = bench.model()
        wanted = response_logprobs(model, prompts, responses, compute_dtype=bench.dtype)
    del model
    with bench.measured("held"):
        reference = Reference(bench.folder, temperature=1.0, compute_dtype=bench.dtype, device=bench.device)
        from rlhf_ray.training.forward import module_logprobs

        found = module_logprobs(reference.module, prompts, responses, microbatch_size=32)
    bench.figures["bits equal"] = all(np.array_equal(one, other) for one, other in zip(wanted, found, strict=True))


def wire(bench: Bench) -> None:
    """Item 9: the weights to the host in bfloat16, cast on the device (pinned memory on GPUs) or on the host; and to where they are
    broadcast from while training goes on."""
    from rlhf_ray.models.wire import pack_weights
    from rlhf_ray.training.staged_weights import StagedWeights

    model = bench.model()
    layout = [(name, tuple(each.shape)) for name, each in model.named_parameters()]
    staged = StagedWeights(layout, bench.dtype, pinned=bench.device.type == "cuda")

    def stage() -> None:
        staged.fill(model.named_parameters(), 60)
        with staged.being_sent():
            pass

    stage()
    pack_weights(model.named_parameters(), 1, bench.dtype)
    for name, work in (
        ("cast first", lambda: pack_weights(model.named_parameters(), 1, bench.dtype)),
        ("staged", stage),
        ("cast on the host", lambda: [each.detach().to("cpu", bench.dtype) for each in model.parameters()]),
    ):
        with bench.measured(name):
            work()


def head(bench: Bench) -> None:
    """Item 12: one update's forward and backward pass with an entropy bonus: from the states in pieces, or with all logits."""
    from rlhf_ray.training.forward import LogprobModel, token_batch

    rows, response = (4, 16) if bench.small else (16, 512)
    batch = token_batch(bench.sequences(rows, 16), bench.sequences(rows, response, 1), packed=True, device=bench.device)
    gradients = {}
    for name in ("in pieces", "all logits"):
        model = bench.model()
        module = LogprobModel(model, temperature=1.0, compute_dtype=bench.dtype, entropy_gradient=True)
        module._head_is_plain = name == "in pieces"
        with bench.measured(name):
            logprobs, entropies = module(batch, with_entropy=True)
            (logprobs.mean() + 0.01 * entropies.mean()).backward()
        gradients[name] = torch.cat([each.grad.flatten().cpu() for each in model.parameters() if each.grad is not None])
        del model, module
    gap = (gradients["in pieces"] - gradients["all logits"]).norm() / gradients["all logits"].norm()
    bench.figures["gradients differ by"] = float(gap)


def prefill(bench: Bench) -> None:
    """Item 13: a long prompt into the cache in parts, and at once."""
    from rlhf_ray.generation import ragged_decoder
    from rlhf_ray.generation.ragged_decoder import RaggedDecoder

    rows, length = (2, 300) if bench.small else (8, 8192)
    prompts = bench.sequences(rows, length)
    as_set = ragged_decoder.PREFILL_TOKENS
    for name, tokens in (("in parts", as_set if not bench.small else 200), ("at once", rows * length)):
        ragged_decoder.PREFILL_TOKENS = tokens
        try:
            decoder = RaggedDecoder(bench.model(bench.dtype))
            cache = decoder.new_cache()
            cache.reserve(rows, length + 16)
            with bench.measured(name), torch.inference_mode():
                decoder.prefill(cache, 0, prompts)
            del decoder, cache
        finally:
            ragged_decoder.PREFILL_TOKENS = as_set


def first_kl(bench: Bench) -> None:
    """Item 14: approx_kl of a policy to itself, its rows in other microbatches: what ppo.max_first_approx_kl has to allow."""
    from rlhf_ray.training.forward import response_logprobs

    model = bench.model()
    prompts, responses = bench.sequences(32, 32), bench.sequences(32, 64, 1)
    each = [
        np.concatenate(response_logprobs(model, prompts, responses, compute_dtype=bench.dtype, microbatch_size=size))
        for size in (32, 5)
    ]
    log_ratio = each[1].astype(np.float64) - each[0]
    bench.figures["k3"] = float((np.exp(log_ratio) - 1 - log_ratio).mean())
    bench.figures["largest difference"] = float(np.abs(log_ratio).max())


CHECKS: dict[str, Callable[[Bench], None]] = {
    each.__name__: each for each in (decode, frozen, wire, head, prefill, first_kl)
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="One measurement of the first hour on GPUs.")
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model")
    given = parser.parse_args(arguments)
    work = Work(rows=4, prompt=64, response=512, epochs=1)
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place) / "run")
        recipe = bench_recipe(SMALL if given.small else LARGE, work, microbatch=4, precision="float32", resources={})
        write_random_run(recipe, folder, prompts=1, length=1, reward=False)
        model = folder.stage("sft").model
        config = json.loads((model / "config.json").read_text())
        config["max_position_embeddings"] = max(config["max_position_embeddings"], 16_384)  # rotary: no weights depend on it
        (model / "config.json").write_text(json.dumps(config))
        bench = Bench(torch.device(given.device), given.small, model)
        CHECKS[given.check](bench)
    print(f"{given.check}: " + ", ".join(f"{name} {value}" for name, value in bench.figures.items()))
    return bench.figures


if __name__ == "__main__":
    main()

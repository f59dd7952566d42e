"""`rlhf-ray bench generate`: the engine against `model.generate` of transformers, and vLLM where it is installed.

The same random model, prompts and number of tokens; no EOS ends a response. The engine also returns each token's log-prob.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from rlhf_ray.bench.flops import Shape, Work
from rlhf_ray.bench.random_run import bench_recipe, cores, random_prompts, torch_that_spins, write_random_run
from rlhf_ray.bench.results import hardware, in_brackets, on_hardware, ratios, show, spread
from rlhf_ray.config import Precision
from rlhf_ray.runs.run_folder import RunFolder

Runner = Callable[[], None]
PAUSE_S = 1.0  # before each round: threads that spin after their work (vLLM's, in a process of its own) have gone to sleep by then


def measure_generate(shape: Shape, work: Work, *, repeats: int, threads: int, precision: Precision) -> dict:
    """Tokens per second of each way; a ratio compares two ways in the same round, where one follows the other."""
    torch = torch_that_spins()
    threads = threads or cores()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="rlhf_ray_bench_") as path:
            runners, dtype = _runners(shape, work, precision, RunFolder(Path(path)))
            rates = _interleaved(runners, work.rows * work.response, repeats)
    finally:
        torch.set_num_threads(before)
    engine = rates["engine"]
    return {
        "ways": [
            {"way": name, "tokens_per_s": spread(values), "ratio": None if name == "engine" else ratios(engine, values)}
            for name, values in rates.items()
        ],
        "vllm_installed": find_spec("vllm") is not None,
        "work": {"layers": shape.layers, "width": shape.width, "heads": shape.heads, "vocabulary": shape.vocabulary,
                 "prompts": work.rows, "prompt_tokens": work.prompt, "response_tokens": work.response, "dtype": dtype,
                 "threads": threads, "repeats": repeats},
        "hardware": hardware(),
    }  # fmt: skip


def _interleaved(runners: dict[str, Runner], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each in `repeats` rounds, after one to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(repeats + 1):
        for name, run in runners.items():
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            run()
            if number > 0:
                rates[name].append(tokens / (time.perf_counter() - started))
    return rates


def _runners(shape: Shape, work: Work, precision: Precision, folder: RunFolder) -> tuple[dict[str, Runner], str]:
    import torch

    from rlhf_ray.models.load import load_causal_lm
    from rlhf_ray.training.precision import resolve_precision

    recipe = bench_recipe(shape, work, microbatch=work.rows, precision=precision, resources={})
    write_random_run(recipe, folder, prompts=1, length=1, reward=False)
    model, dtype = folder.stage("sft").model, resolve_precision(precision, "cpu")
    prompts = random_prompts(shape.vocabulary, work.rows, work.prompt, recipe.seed)
    runners = {
        "engine": _engine(load_causal_lm(model, dtype), model, prompts, recipe.generation.sampling),
        f"model.generate, {_name(dtype)}": _transformers(load_causal_lm(model, dtype), prompts, work.response),
    }
    if dtype != torch.float32:  # on some processors its faster precision
        plain = load_causal_lm(model, torch.float32)
        runners["model.generate, float32"] = _transformers(plain, prompts, work.response)
    if find_spec("vllm") is not None:
        from rlhf_ray.bench.yardsticks.vllm_generate import vllm_runner

        runners["vLLM"] = vllm_runner(model, prompts, work.response, dtype=_name(dtype))
    return runners, _name(dtype)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _engine(model, folder: Path, prompts: list[list[int]], sampling) -> Runner:
    from rlhf_ray.generation.engine import GenerationEngine
    from rlhf_ray.models.tokenizer import load_tokenizer

    engine = GenerationEngine(model, load_tokenizer(folder))

    def run() -> None:
        completions = engine.generate(prompts, range(len(prompts)), sampling)
        assert all(len(each.response_ids) == sampling.max_new_tokens for each in completions)

    return run


def _transformers(model, prompts: list[list[int]], new_tokens: int) -> Runner:
    import torch

    ids = torch.tensor(prompts)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": new_tokens,
                "eos_token_id": None, "attention_mask": torch.ones_like(ids)}  # fmt: skip
    model.generation_config.eos_token_id = None

    def run() -> None:
        torch.manual_seed(0)
        with torch.inference_mode():
            drawn = model.generate(ids, **settings)
        assert drawn.shape == (len(prompts), ids.shape[1] + new_tokens)

    return run


def show_generate(result: dict, *, as_json: bool, out: TextIO | None = None) -> None:
    rows = [
        (way["way"], f"{way['tokens_per_s']['median']:,.0f}", in_brackets(way["ratio"]) if way["ratio"] else "")
        for way in result["ways"]
    ]
    work = result["work"]
    lines = [
        f"{work['prompts']} prompts of {work['prompt_tokens']} tokens, {work['response_tokens']} new ones each, "
        f"{work['dtype']}, {work['threads']} threads, {work['repeats']} rounds of all ways in turn ({on_hardware(result)})"
    ]
    if not result["vllm_installed"]:
        lines.append("vLLM is not installed here, so it is left out")
    show(result, lines, as_json=as_json, columns=("", "tokens per second", "engine: times as fast"), rows=rows,
         out=out)  # fmt: skip

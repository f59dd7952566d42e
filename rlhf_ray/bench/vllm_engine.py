"""Both generation engines on the same model, turn by turn: tokens per CPU second, CPU seconds of a start and of an update.

    make test-vllm && .venv-vllm/bin/python -m rlhf_ray.bench.vllm_engine --width 256 --layers 4

A GPT-2 with random weights and heads of 64; 64 prompts of 32 tokens, 48 new tokens each; float32, one thread. CPU seconds of
this process, so that other load on the machine counts little. The first turn of each engine is not counted.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.generation.engine import GenerationEngine
from rlhf_ray.generation.vllm_generation import VllmEngine
from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import load_tokenizer, train_tokenizer
from rlhf_ray.models.wire import pack_weights

ROWS, PROMPT, RESPONSE, VOCABULARY = 64, 32, 48, 4096


def seconds(function, *args) -> float:
    started = time.process_time()
    function(*args)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_embd=args.width, n_layer=args.layers,
                        n_head=args.width // 64)  # fmt: skip
    prompts = list(np.random.default_rng(0).integers(3, 200, (ROWS, PROMPT)))
    params = SamplingParams(max_new_tokens=RESPONSE, min_new_tokens=RESPONSE)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer([f"number {i} of many" for i in range(400)], 300, "gpt2")
        start = save_model(GPT2LMHeadModel(config), tokenizer, Path(folder) / "model", "random weights, for timing")
        tokenizer = load_tokenizer(start)
        engines: dict[str, GenerationEngine | VllmEngine]
        engines = {"torch": GenerationEngine(load_causal_lm(start), tokenizer)}
        started = time.process_time()
        engines["vllm"] = VllmEngine(
            start, load_causal_lm(start), tokenizer, longest=PROMPT + RESPONSE, rows=ROWS, probes=prompts
        )
        start_s = time.process_time() - started
        weights = pack_weights(load_causal_lm(start).named_parameters(), 1, torch.float32)[0]
        taken = {(name, what): [] for name in engines for what in ("generate", "update")}
        for _ in range(args.turns + 1):
            for name, engine in engines.items():
                taken[name, "generate"].append(seconds(engine.generate, prompts, range(ROWS), params))
                taken[name, "update"].append(seconds(engine.load_weights, weights))
    middle = {key: statistics.median(turns[1:]) for key, turns in taken.items()}
    result = {"parameters": sum(array.size for array in weights.values()), "vllm_start_cpu_s": round(start_s, 1)}
    for name in engines:
        result[f"{name}_tokens_per_cpu_s"] = round(ROWS * RESPONSE / middle[name, "generate"])
        result[f"{name}_update_cpu_s"] = round(middle[name, "update"], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

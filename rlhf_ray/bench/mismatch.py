"""How far apart generator and policy are in a number format, and how far they are by a real fault.   `python -m`

Draws answers of a real model in the generator's dtype and computes their log-probs as the policy does, in several ways that should
agree and several that should not. PPO's gate (`ppo.max_mismatch`, `ppo.max_mismatch_kl`) has to stand between the two.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

MOVED = 7  # seed of the digits that bfloat16 weights lack
QUESTIONS = (
    "What is the capital of France?", "How do I bake bread?", "Tell me a short story about a dog.",
    "Why is the sky blue?", "Write a poem about rain.", "How can I sleep better?", "What is a good first bicycle?",
    "Explain how a plane flies.", "Name three kinds of trees.", "How do I remove a stain from a shirt?",
    "What should I cook tonight?", "Who wrote Hamlet?", "Is it healthy to run every day?", "How do I learn to play chess?",
    "What does a lawyer do?", "Describe the sea to a child.",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Log-probs of generator and policy: rounding and faults.")
    parser.add_argument("model", type=Path, help="the folder of a chat model")
    parser.add_argument("--samples", type=int, default=4, help="answers to each of 16 questions")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32-head", action="store_true", help="in bfloat16 only, with and without ppo.float32_head")
    given = parser.parse_args(arguments)
    found = (measure_heads if given.float32_head else measure)(given.model, given.samples, given.tokens, given.seed)
    for name, figures in found.items():
        print(f"{name:<68}" + "".join(f"{figure:>10.5f}" for figure in figures.values()))


def measure(folder: Path, samples: int, tokens: int, seed: int) -> dict[str, dict[str, float]]:
    """Name of a way -> {"mean k3", "99 % quantile", "maximum"} of log-prob differences, generator less policy, in nats."""
    from rlhf_ray.config.sampling_params import SamplingParams
    from rlhf_ray.generation.engine import GenerationEngine
    from rlhf_ray.models.load import load_causal_lm
    from rlhf_ray.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    prompts = _prompts(tokenizer, samples)
    found: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        engine = GenerationEngine(load_causal_lm(folder, dtype), tokenizer)
        drawn = engine.generate(prompts, list(range(seed, seed + len(prompts))), SamplingParams(max_new_tokens=tokens))
        answers = [np.array(each.response_ids) for each in drawn]
        logprobs = np.concatenate([each.logprobs for each in drawn])
        for name, theirs in _policies(folder, prompts, answers):
            found[f"generator {word}, {name}"] = gap(logprobs, theirs)
    return found


def measure_heads(folder: Path, samples: int, tokens: int, seed: int) -> dict[str, dict[str, float]]:
    """The same of a bfloat16 generator and policy, each with plain logits and in float32. The policy's weights are moved by a
    thousandth of each tensor's scale: those of a file in bfloat16 have no digits that rounding could lose."""
    from rlhf_ray.config.sampling_params import SamplingParams
    from rlhf_ray.generation.engine import GenerationEngine
    from rlhf_ray.models.float_head import logits_in_float32
    from rlhf_ray.models.load import load_causal_lm
    from rlhf_ray.models.tokenizer import load_tokenizer
    from rlhf_ray.training.forward import response_logprobs

    tokenizer = load_tokenizer(folder)
    prompts = _prompts(tokenizer, samples)
    heads = {"plain head": lambda model: model, "float32 head": lambda model: logits_in_float32(model, torch.bfloat16)}
    found: dict[str, dict[str, float]] = {}
    for name, headed in heads.items():
        engine = GenerationEngine(headed(_moved(load_causal_lm(folder), 0.001, MOVED).to(torch.bfloat16)), tokenizer)
        drawn = engine.generate(prompts, list(range(seed, seed + len(prompts))), SamplingParams(max_new_tokens=tokens))
        answers, logprobs = [np.array(each.response_ids) for each in drawn], np.concatenate([each.logprobs for each in drawn])
        for other, their_head in heads.items():
            policy = their_head(_moved(load_causal_lm(folder), 0.001, MOVED))
            rows = response_logprobs(policy, prompts, answers, compute_dtype=torch.bfloat16, microbatch_size=16)
            found[f"generator {name}, policy {other}"] = gap(logprobs, np.concatenate(rows))
    return found


def _prompts(tokenizer, samples: int) -> list[np.ndarray]:
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS for _ in range(samples)]
    return [np.array(tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False)) for one in asked]


def _moved(model: torch.nn.Module, share: float, seed: int = 0):
    """Weights changed by this share of each tensor's deviation."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std(correction=0) * share)
    return model


def _policies(folder: Path, prompts: list[np.ndarray], answers: list[np.ndarray]):
    from rlhf_ray.models.load import load_causal_lm
    from rlhf_ray.training.forward import response_logprobs

    def policy(model, dtype: torch.dtype = torch.float32, temperature: float = 1.0, given=prompts) -> np.ndarray:
        rows = response_logprobs(model, given, answers, temperature=temperature, compute_dtype=dtype, microbatch_size=16)
        return np.concatenate(rows)

    model = load_causal_lm(folder)
    yield "policy float32", policy(model)
    yield "policy bfloat16", policy(model, torch.bfloat16)
    for temperature in (0.9, 0.97, 1.03, 1.1):
        yield f"fault: temperature {temperature}", policy(model, temperature=temperature)
    yield "fault: the prompt's first token twice", policy(model, given=[np.concatenate([one[:1], one]) for one in prompts])
    yield "fault: the prompt's last token is missing", policy(model, given=[one[:-1] for one in prompts])
    for share in (0.01, 0.03, 0.1):
        changed = _moved(load_causal_lm(folder), share)
        yield f"fault: other weights, {share:.0%} of each tensor's scale", policy(changed)


def gap(drawn: np.ndarray, own: np.ndarray) -> dict[str, float]:
    """Of log-probs under generator and policy, [N] each."""
    apart = own.astype(np.float64) - drawn.astype(np.float64)
    return {
        "mean k3": float(np.mean(np.expm1(apart) - apart)),
        "99 % quantile": float(np.quantile(np.abs(apart), 0.99)),
        "maximum": float(np.abs(apart).max()),
    }


if __name__ == "__main__":
    main()

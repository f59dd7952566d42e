"""vLLM on the work of `rlhf-ray bench generate`, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def vllm_runner(folder: Path, prompts: list[list[int]], new_tokens: int, *, dtype: str) -> Callable[[], None]:
    """A function that draws `new_tokens` tokens for every prompt, with their log-probs, as the engine does."""
    from vllm import LLM, SamplingParams

    # Without the prefix cache: every round has the same prompts, and the engine reads them again each time.
    engine = LLM(
        model=str(folder), dtype=dtype, max_model_len=max(map(len, prompts)) + new_tokens, max_num_seqs=len(prompts),
        enable_prefix_caching=False, gpu_memory_utilization=0.5, seed=0,
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=1.0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, logprobs=0, detokenize=False
    )

    def run() -> None:
        answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        assert all(len(answer.outputs[0].token_ids) == new_tokens for answer in answers)

    return run

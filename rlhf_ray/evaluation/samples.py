"""Responses of one model to the held-out prompts, and samples.jsonl.   P prompts, S seeds, N = P * S responses.

Responses are kept flat, prompt by prompt: response i answers prompt i // S with seed i % S, so that
`array.reshape(P, S)` is the table that the bootstrap resamples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray.algorithms.schedule import draw_seed
from rlhf_ray.config.sampling_params import Completion, SamplingParams
from rlhf_ray.data.tokens import encode_prompts
from rlhf_ray.generation.engine_protocol import EngineSetting
from rlhf_ray.messages import Support
from rlhf_ray.roles.generator import supports_of
from rlhf_ray.roles.rollout_text import response_text
from rlhf_ray.runs.storage import write_atomically
from rlhf_ray.tables.engines import ENGINES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Kept = Callable[[int, Callable[[], list[Completion]]], list[Completion]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """N responses of one model."""

    prompt_ids: list[np.ndarray]  # N, each int32
    response_ids: list[np.ndarray]  # N, each int32, with the EOS that ended it
    texts: list[str]  # N, without EOS
    ended: np.ndarray  # [N] bool: by EOS or a stop string, not by max_new_tokens
    supports: list[Support] | None = None  # N: what their tokens were drawn among; None: all

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each response, EOS included, [N]."""
        return np.array([len(ids) for ids in self.response_ids])


def draw_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seeds: Sequence[int],
    params: SamplingParams,
    *,
    chunk_size: int,
    device: torch.device | str,
    progress: Callable[[int], None],
    engine: str = "torch",
    decodes: int | None = None,
    tensor_parallel: int = 1,
    folder: str | Path = "",
    trust_remote_code: bool = False,
    kept: Kept = lambda start, make: make(),
) -> Responses:
    """One response to every prompt for every seed. A response depends on (weights, chunk, seed) and on nothing else.

    engine: a name of `tables.engines`; decodes: rows at a time, None: a chunk; tensor_parallel: GPUs that hold its model together;
    folder: where the model is from, for engines that read it themselves. The random numbers of a (seed, prompt) are the same for
    every model, so two models are compared on the same draws. kept: of the chunk that begins at a row, what was drawn before, or
    what the function draws.
    """
    ids = [np.array(one, np.int32) for one in encode_prompts(tokenizer, prompts)]
    setting = EngineSetting(
        folder=folder, model=model, tokenizer=tokenizer, device=device, rows=decodes or chunk_size, probes=ids,
        tensor_parallel=tensor_parallel, longest=max(map(len, ids)) + params.max_new_tokens, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    # Even if all is drawn already: it changes the model's layers, and with them the last bits of what the model rates later.
    drawing = ENGINES.named(engine).engine(setting)
    params = replace(params, tells_support=params.truncates)
    rows = [(prompt, seed) for prompt in range(len(prompts)) for seed in seeds]

    def draw(start: int) -> list[Completion]:
        chunk = rows[start : start + chunk_size]
        draws = [draw_seed(seed, "evaluation", prompt) for prompt, seed in chunk]
        return drawing.generate([ids[prompt] for prompt, _ in chunk], draws, params)

    completions: list[Completion] = []
    for start in range(0, len(rows), chunk_size):
        completions += kept(start, partial(draw, start))
        progress(len(completions))
    drawing.close()
    return Responses(
        prompt_ids=[ids[prompt] for prompt, _ in rows],
        response_ids=[completion.response_ids for completion in completions],
        texts=[response_text(tokenizer, completion.response_ids, params.stop) for completion in completions],
        ended=np.array([completion.finish_reason != "length" for completion in completions]),
        supports=supports_of(completions),
    )


def write_samples(
    path: Path,
    prompts: Sequence[str],
    messages: Sequence[list[dict] | None],
    seeds: Sequence[int],
    models: dict[str, Responses],
    scores: dict[str, dict[str, np.ndarray | None]],
) -> None:
    """One object per line for every (seed, prompt): the prompt and each model's response with its scores.

    messages: of prompts that are conversations, their turns; they stand beside the text that the template makes of them
    scores: model -> scorer ("score", "judge") -> [N] or None
    """
    lines = []
    for position, seed in enumerate(seeds):
        for index, prompt in enumerate(prompts):
            i = index * len(seeds) + position
            row: dict[str, Any] = {"prompt": prompt, "index": index, "seed": seed}
            if messages[index]:
                row["messages"] = messages[index]
            for name, responses in models.items():
                row[name] = {
                    "response": responses.texts[i],
                    **{
                        scorer: None if values is None else round(float(values[i]), 6)
                        for scorer, values in scores[name].items()
                    },
                    "tokens": len(responses.response_ids[i]),
                    "ended": bool(responses.ended[i]),
                }
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))

"""The run's language models, and what they say of responses.   N responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rlhf_ray.config import Recipe
from rlhf_ray.config.ppo_section import Microbatches
from rlhf_ray.data.role_files import OTHER_TEXT_TOKENS
from rlhf_ray.data.tokens import encode_pairs
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.evidence import Rated
from rlhf_ray.evaluation.samples import Responses
from rlhf_ray.messages import Support
from rlhf_ray.models.control_tokens import marker
from rlhf_ray.models.positions import positions_of
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.training.forward import response_logprobs


def stage_model(folder: RunFolder, stage: str) -> Path:
    """The model folder of a finished stage."""
    path = folder.stage(stage).model
    if not path.exists():
        raise UserError(f"{path} is not there; run the stage '{stage}' before the evaluation")
    return path


def sft_model(recipe: Recipe, folder: RunFolder) -> Path | str:
    """What PPO started from: the SFT stage's model, or the recipe's own where there is no such stage."""
    return recipe.model.name_or_path if recipe.sft is None else stage_model(folder, "sft")


class LanguageModel:
    """A causal LM that rates text: summed log-probs and token counts.

    temperature divides the logits: 1 for perplexity and relevance, the sampling temperature for KL.
    """

    def __init__(
        self, model, tokenizer, dtype: torch.dtype, folder: Path | str = "", microbatches: Microbatches | None = None
    ):
        """folder: where the model is from. microbatches: the most that a forward pass takes; its logits are whole."""
        self.model, self.tokenizer, self.dtype, self.folder = model, tokenizer, dtype, folder
        self.microbatches: Microbatches = microbatches or {"microbatch_size": 32, "microbatch_tokens": None}

    def rate_tokens(
        self,
        prompt_ids: Sequence[np.ndarray],
        response_ids: Sequence[np.ndarray],
        temperature: float = 1.0,
        supports: Sequence[Support] | None = None,
    ) -> np.ndarray:
        """Log-prob of each response given its prompt, summed over its tokens, [N]; 0 for a response without tokens."""
        sums = np.zeros(len(response_ids))
        # Sorted by length, a microbatch holds little padding.
        rows = sorted(
            (i for i, ids in enumerate(response_ids) if len(ids)),
            key=lambda i: len(prompt_ids[i]) + len(response_ids[i]),
        )
        logprobs = response_logprobs(
            self.model,
            [prompt_ids[i] for i in rows],
            [response_ids[i] for i in rows],
            None if supports is None else [supports[i] for i in rows],
            temperature=temperature,
            compute_dtype=self.dtype,
            **self.microbatches,
        )
        sums[rows] = [row.sum(dtype=np.float64) for row in logprobs]
        return sums

    def encode(self, prompts: Sequence[str], responses: Responses) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(prompt_ids, response_ids) in this model's own tokenizer; a closing token only where the response ended by itself."""
        mark = marker(self.tokenizer, of_replies=True)
        pairs = encode_pairs(self.tokenizer, prompts, [mark(text) for text in responses.texts])
        rows = [
            (np.array(ids if end else ids[:-1], np.int32), length)
            for (ids, length), end in zip(pairs, responses.ended, strict=True)
        ]
        return [ids[:length] for ids, length in rows], [ids[length:] for ids, length in rows]


def rate_texts(model: LanguageModel, prompts: Sequence[str], responses: Sequence[str]) -> Rated:
    """Texts of people under the model: replies given their prompts, plain text (prompt "") given its first token."""
    longest = min(OTHER_TEXT_TOKENS, positions_of(model.model.config) or OTHER_TEXT_TOKENS)
    pairs = [
        (np.array(ids[:longest], np.int32), max(length, 1))
        for ids, length in encode_pairs(model.tokenizer, prompts, responses)
    ]
    logprobs = model.rate_tokens([ids[:length] for ids, length in pairs], [ids[length:] for ids, length in pairs])
    return Rated(logprobs=logprobs, tokens=np.array([max(len(ids) - length, 0) for ids, length in pairs]))

"""Rollouts as text, to score or show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlhf_ray.messages import Sequences
from rlhf_ray.models.tokenizer import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decode_sequences(
    tokenizer: PreTrainedTokenizerBase, sequences: Sequences, stop: tuple[str, ...] = ()
) -> tuple[list[str], list[str]]:
    """(prompts, responses) as text; EOS, padding and the stop string that ended a response are not part of its text.

    Special tokens stay in a prompt (a chat template's turns are made of them), except the BOS, which encoding adds.
    """
    prompts = [decode(tokenizer, ids, special_tokens=True) for ids in sequences.prompts()]
    bos = tokenizer.bos_token
    if isinstance(bos, str) and bos != tokenizer.eos_token:
        prompts = [prompt.removeprefix(bos) for prompt in prompts]
    responses = [response_text(tokenizer, ids, stop) for ids in sequences.responses()]
    return prompts, responses


def response_text(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, stop: tuple[str, ...] = ()) -> str:
    """One response as people read it and reward models were trained on it: without EOS and without its stop string."""
    text = decode(tokenizer, ids, special_tokens=False)
    # The last token may run past the stop string, so the text ends where the first stop string begins.
    ends = [place for place in (text.find(one) for one in stop) if place >= 0]
    return text[: min(ends)] if ends else text

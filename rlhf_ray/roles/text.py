"""Rollouts as text, for whoever scores or shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_ray.types import Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decode_sequences(tokenizer: PreTrainedTokenizerBase, sequences: Sequences) -> tuple[list[str], list[str]]:
    """(prompts, responses) as text; EOS and padding are not part of a response's text.

    Special tokens stay in a prompt (a chat template's turns are made of them), but for the BOS that encoding puts back.
    """
    prompts = [
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in sequences.prompts()
    ]
    bos = tokenizer.bos_token
    if bos is not None and bos != tokenizer.eos_token:
        prompts = [prompt.removeprefix(bos) for prompt in prompts]
    responses = [
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in sequences.responses()
    ]
    return prompts, responses

"""Rollouts as text, to score or show them.   B rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_ray.config.columns import NO_COLUMNS, Columns
from rlhf_ray.data.tokens import REPLACEMENT, encode_texts
from rlhf_ray.models.chat_shape import closing_ids, end_ids
from rlhf_ray.models.control_tokens import marker
from rlhf_ray.models.tokenizer import decode
from rlhf_ray.rewards.answers import Answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answers_of(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | None,
    prompt_ids: Sequence[np.ndarray],
    response_ids: Sequence[np.ndarray],
    ended: Sequence[bool],
    *,
    stop: tuple[str, ...] = (),
    columns: Columns = NO_COLUMNS,
) -> Answers:
    """The policy's token ids as what scorers read. prompts: the stored text; None: the ids are decoded."""
    stored = prompts is not None
    if prompts is None:
        prompts = [prompt_text(tokenizer, ids) for ids in prompt_ids]
    texts = [response_text(tokenizer, ids, stop) for ids in response_ids]
    ends, closings = set(end_ids(tokenizer)), closing_ids(tokenizer, prompts)

    def whole(ids: np.ndarray, text: str, closing: int) -> list[int]:
        """An ended response with the token that ends those that reward models are trained on, whichever was drawn."""
        if ids[-1] not in ends:
            return _stopped(tokenizer, ids, text, closing)
        # A decoded prompt may hide that it opens a turn (some tokenizers add spaces), so then EOS may be the wrong one.
        sure = stored or closing != tokenizer.eos_token_id
        return [*ids[:-1].tolist(), closing] if sure else ids.tolist()

    rows = [
        [*prompt.tolist(), *(whole(ids, text, closing) if end else ids.tolist())]
        for prompt, ids, text, end, closing in zip(prompt_ids, response_ids, texts, ended, closings, strict=True)
    ]
    return Answers(prompts=prompts, responses=texts, ended=ended, token_ids=rows, tokenizer=tokenizer, columns=columns)


def prompt_text(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> str:
    """A prompt with its special tokens, which a chat template's turns are made of, except the BOS, which encoding adds."""
    prompt, bos = decode(tokenizer, ids, special_tokens=True), tokenizer.bos_token
    return prompt.removeprefix(bos) if isinstance(bos, str) and bos != tokenizer.eos_token else prompt


def response_text(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, stop: tuple[str, ...] = ()) -> str:
    """One response as people read it: without EOS, without its stop string, without half a character at its end."""
    text = decode(tokenizer, ids, special_tokens=False).rstrip(REPLACEMENT)
    # The last token may run past the stop string, so the text ends where the first stop string begins.
    ends = [place for place in (text.find(one) for one in stop) if place >= 0]
    return text[: min(ends)] if ends else text


def _stopped(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, text: str, closing: int) -> list[int]:
    """A response that a stop string ended: its ids up to there, and the token that ends a whole one.

    Where the stop string begins inside a token, the text before it is encoded.
    """
    for size in range(len(ids), -1, -1):
        found = decode(tokenizer, ids[:size], special_tokens=False)
        if found == text:
            return [*ids[:size].tolist(), closing]
        if len(found) + 3 < len(text):  # half a character shows as up to three
            break
    return [*encode_texts(tokenizer, [marker(tokenizer, of_replies=True)(text)])[0], closing]

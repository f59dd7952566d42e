"""How text becomes token ids. SFT, reward model, PPO, evaluation and serving all use this module.

A sequence is encode(prompt) + encode(response) + [closing]. Prompt and response are encoded separately, so the ids of a
prompt do not depend on what follows it, and the boundary between the two is exact. The closing token is the end of a turn
where the prompt opens a turn of the tokenizer's chat template, else EOS: one token, the one that generation ends at. Where
the tokenizer puts a BOS token before every text (Llama, Gemma), the sequence has one BOS, before the prompt.

Texts may be marked (`models.control_tokens`): the name of a control token is then plain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlhf_ray.models.chat_shape import closing_ids
from rlhf_ray.models.control_tokens import encode_marked, is_marked, marker
from rlhf_ray.models.tokenizer import bos_id, decode, eos_id

BATCH = 1000  # texts per call to the tokenizer
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what the bytes of an incomplete character decode to


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] where the tokenizer puts one before every text, else []."""
    bos = bos_id(tokenizer)
    if bos is None:
        return []
    opens = tokenizer("").input_ids[:1] == [bos]
    # A tokenizer with one token for BOS and EOS may append it: then an empty text begins with it, and it is no opening.
    return [bos] if opens and bos != eos_id(tokenizer) else []


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of many prompts, with one BOS each if the tokenizer adds BOS, even where a chat template holds it."""
    opening = opening_ids(tokenizer)
    return [ids if ids[: len(opening)] == opening else opening + ids for ids in encode_texts(tokenizer, prompts)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids of one prompt (see `encode_prompts`); [] for "" where the tokenizer has no BOS."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str]
) -> list[tuple[list[int], int]]:
    """For each prompt and response: (ids with the closing token at the end, number of prompt ids)."""
    heads, tails = encode_prompts(tokenizer, prompts), encode_texts(tokenizer, responses)
    closings = closing_ids(tokenizer, prompts)
    return [(head + tail + [end], len(head)) for head, tail, end in zip(heads, tails, closings, strict=True)]


def cut_text(tokenizer: PreTrainedTokenizerBase, text: str, limit: int, side: Literal["left", "right"]) -> str:
    """`text`, cut on its left or right side until it encodes to at most `limit` ids.

    The result is text, because text is what is stored. A cut text may encode differently from the ids that it was cut
    from, so cutting goes on until the text's own encoding fits. A text with marks is marked again.
    """
    if limit <= 0:
        return ""
    mark = marker(tokenizer) if is_marked(text) else str
    ids = encode_texts(tokenizer, [text])[0]
    keep = min(limit, len(ids))
    while len(ids) > limit:
        kept = ids[-keep:] if side == "left" else ids[:keep]
        text = decode(tokenizer, kept, special_tokens=True)
        text = mark(text.lstrip(REPLACEMENT) if side == "left" else text.rstrip(REPLACEMENT))
        ids, keep = encode_texts(tokenizer, [text])[0], keep - 1
        if keep < 0:
            return ""
    return text


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of many texts as they are, no special tokens around them. Marked names of control tokens are plain text."""
    rows: list[list[int]] = []
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        # verbose=False: no warning about texts above the tokenizer's model_max_length; limits are checked elsewhere.
        rows += tokenizer(batch, add_special_tokens=False, verbose=False).input_ids
    marked = [place for place, text in enumerate(texts) if is_marked(text)]
    for place, ids in zip(marked, encode_marked(tokenizer, [texts[place] for place in marked]) if marked else [], strict=True):
        rows[place] = ids
    return rows

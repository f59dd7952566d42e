"""What a tokenizer's chat template writes around a reply, and the tokens that end a response."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf_ray.models.control_tokens import ENDS_KEY, template_text

ASKED, ANSWERED = "how many apples", "seven apples"  # two harmless contents, the same in every case that templates apply


@dataclass(frozen=True, slots=True)
class ChatShape:
    """What stands around contents."""

    end: str | None = None  # the token after a reply; None: the template writes none
    cue: str = ""  # what a prompt ends with, so that a reply follows
    before: frozenset[str | None] = frozenset()  # the characters before contents; None: not known, or another content
    after: frozenset[str | None] = frozenset()  # those behind them

    def may_join(self, names: Iterable[str]) -> bool:
        """Whether the end of a content and what the template writes beside it could make one of the names together."""
        if None in self.before | self.after:
            return True
        return any(not self.before.isdisjoint(name[:-1]) or not self.after.isdisjoint(name[1:]) for name in names)


def chat_shape(tokenizer: PreTrainedTokenizerBase) -> ChatShape:
    """Found by rendering a question and its answer; kept per tokenizer and template."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # a test's or a benchmark's own
        return ChatShape()
    source = template_text(tokenizer)
    known = _SHAPES.get(tokenizer)
    if known is None or known[0] != source:
        known = _SHAPES[tokenizer] = source, _found(tokenizer) if source else ChatShape()
    return known[1]


_SHAPES: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, ChatShape]] = WeakKeyDictionary()


def _found(tokenizer: PreTrainedTokenizerBase) -> ChatShape:
    question, answer = {"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}
    closed = _rendered(tokenizer, [question, answer], cue=False)
    place = closed.lower().rfind(ANSWERED)
    after = closed[place + len(ANSWERED) :].lstrip() if place >= 0 else ""
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    ends = [token for token in tokens if token.strip() and after.startswith(token)]
    alone, asking = (_rendered(tokenizer, [question], cue=cue) for cue in (False, True))
    cue = asking[len(alone) :] if asking.startswith(alone) else ""
    if not cue.strip():  # the template has none: what follows the question is all there is
        cue = asking[asking.lower().rfind(ASKED) + len(ASKED) :] if ASKED in asking.lower() else ""
    before, beside = _neighbours(_rendered(tokenizer, [question, answer, question], cue=False))
    return ChatShape(max(ends, key=len, default=None), cue.strip(), before, beside)


def _neighbours(text: str) -> tuple[frozenset[str | None], frozenset[str | None]]:
    """The characters before and behind the contents in a rendered conversation."""
    spans = [found.span() for found in re.finditer(f"{ASKED}|{ANSWERED}", text)]
    if len(spans) < 3:
        return frozenset([None]), frozenset([None])
    starts, ends = {start for start, _ in spans}, {end for _, end in spans}
    before = {None if start in ends else text[start - 1] for start in starts if start > 0}
    return frozenset(before), frozenset(None if end in starts else text[end] for end in ends if end < len(text))


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict], *, cue: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue)
    except (TemplateError, TypeError, ValueError, LookupError):  # a template for other roles than these two
        return ""
    return text if isinstance(text, str) else ""


def end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a response: EOS, those of the model's generation_config, the end of a turn in the template."""
    known: list[Any] = [tokenizer.eos_token_id]
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        end = chat_shape(tokenizer).end
        known += tokenizer.init_kwargs.get(ENDS_KEY, ())
        known += [] if end is None else [tokenizer.convert_tokens_to_ids(end)]
    return tuple(dict.fromkeys(number for number in known if isinstance(number, int)))


def saved_ends(tokenizer: PreTrainedTokenizerBase, listed: int | list[int] | None = None) -> int | list[int]:
    """The same as generation_config.json has them: a number where there is one. listed: what it said before; a list stays."""
    all_ends: list[int] = [*end_ids(tokenizer), *(listed if isinstance(listed, list) else [])]
    ends = list(dict.fromkeys(all_ends))
    return ends[0] if len(ends) == 1 else ends


def closing_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[int]:
    """The token that a whole reply to each prompt ends with: the end of a turn where the prompt opens a turn of the
    template, else EOS."""
    eos, shape = tokenizer.eos_token_id, chat_shape(tokenizer)
    assert isinstance(eos, int)
    if shape.end is None or not shape.cue:
        return [eos] * len(prompts)
    end = tokenizer.convert_tokens_to_ids(shape.end)
    assert isinstance(end, int)
    return [end if _opens_turn(prompt, shape) else eos for prompt in prompts]


def _opens_turn(prompt: str, shape: ChatShape) -> bool:
    _, cue, rest = prompt.rpartition(shape.cue)
    return bool(cue) and shape.end is not None and shape.end not in rest

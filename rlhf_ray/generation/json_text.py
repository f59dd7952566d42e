"""Responses that are held to a JSON schema, by llguidance.   V vocabulary entries.

The library says which tokens may come next; the engine draws among them. An object's keys come in the schema's order, and texts are
spaced as `json.dumps` spaces them: free white space would let a small model write blanks to the end.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_ray.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

KEPT = 32  # schemas; compiling a large one takes up to a second
_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class JsonGrammars:
    """For one tokenizer. Any thread may ask; the first one waits while the vocabulary is read (a second where it is large)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, list(eos_token_ids)
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._read: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # schema -> at its start; copied for each response

    def text(self, schema: str) -> JsonText:
        """A response's way through this JSON schema. UserError for one that can't be followed."""
        with self._lock:
            found = self._compiled.pop(schema, None)
        found = found or self._compile(schema)  # without the lock: meanwhile the engine follows others
        with self._lock:
            self._compiled[schema] = found
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        text = JsonText(found.deep_copy(), self._vocab_size)
        if text.is_stuck:  # the library finds out at the first token that a schema never ends, or takes too much work
            raise UserError("this JSON schema can't be followed: no token of this model can begin what it asks for")
        return text

    def _compile(self, schema: str) -> LLMatcher:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise UserError(
                "this server can't hold a response to JSON: it lacks the package llguidance (pip install 'rlhf-ray[json]')"
            ) from None
        matcher = LLMatcher(self._vocabulary(), LLMatcher.grammar_from_json_schema(schema, overrides=_SPACED), log_level=0)  # pyright: ignore[reportArgumentType]
        if matcher.is_error():
            raise UserError(f"this JSON schema can't be followed: {' '.join(matcher.get_error().split())[:300]}")
        return matcher

    def _vocabulary(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        with self._reading:
            if self._read is None:
                try:
                    self._read = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos)  # pyright: ignore[reportArgumentType]
                except ValueError as error:
                    raise UserError(f"this model's tokenizer can't be held to JSON: {str(error)[:300]}") from error
            return self._read


class JsonText:
    """One response on its way. When the text may end, an end token is among those allowed."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size
        self._bits = np.zeros((vocab_size + 31) // 32, np.int32)
        self.allowed = self._next()  # [V] bool: the tokens that may come now

    @property
    def is_stuck(self) -> bool:
        """No token may come: the tokenizer lacks a character, or the schema asks for more work than the library does per token."""
        return not self.allowed.any()

    def take(self, token: int) -> None:
        """The token that was drawn, an end token excepted."""
        self._matcher.consume_token(token)
        self.allowed = self._next()

    def _next(self) -> np.ndarray:
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, np.bool_)
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, np.bool_)
        return np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab_size].astype(np.bool_)

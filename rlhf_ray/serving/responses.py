"""The bodies of OpenAI's answers, whole and in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rlhf_ray.serving.handover import Drawn, Fixed
from rlhf_ray.serving.response_text import ResponseText, TokenText

_FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class Choice:
    """One response while it is being written."""

    def __init__(self, text: ResponseText, stop_token_ids: tuple[int, ...] = (), finish_reason: str | None = None):
        self.text = text
        self._stop_token_ids = stop_token_ids
        self.token_ids: list[int] = []
        self.finish_reason = finish_reason

    def push(self, drawn: Drawn) -> None:
        if self.finish_reason is not None:
            return
        self.token_ids.append(drawn.token_id)
        silent = drawn.reason == "eos" and drawn.token_id in self._stop_token_ids
        self.text.push(drawn.token_id, drawn.logprob, tuple(drawn.top), silent=silent)
        if self.text.stopped:
            self.finish_reason = "stop"
        elif drawn.reason is not None:
            self.finish_reason = _FINISH_REASONS[drawn.reason]

    def go_on_after(self, tokens: Iterable[Drawn]) -> None:
        """As after these tokens, whose text has been taken: what may be sent of a response follows from its tokens alone."""
        for drawn in tokens:
            self.push(drawn)
        self.take()

    def take(self) -> tuple[str, list[TokenText]]:
        return self.text.take(final=self.finish_reason is not None)


def usage(prompts: list[list[int]], choices: list[Choice]) -> dict[str, int]:
    """Tokens read and written; a prompt counts once, EOS counts."""
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    completion_tokens = sum(len(choice.token_ids) for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is shown before its response."""

    text: str
    tokens: list[TokenText]  # [] where no log-probs are asked for


class CompletionWriter:
    """/v1/completions"""

    def __init__(
        self, model: str, fixed: Fixed, *, alternatives: int | None, echoes: list[Echo] | None = None, version: str | None = None
    ):
        """alternatives: tokens shown beside each token's log-prob; None: no log-probs. echoes: of each choice."""
        self._head = _head("cmpl", "text_completion", model, fixed, version)
        self._alternatives, self._echoes = alternatives, echoes

    def whole(self, pieces: list[tuple[str, list[TokenText], str | None]], usage: dict[str, int]) -> dict:
        """pieces: text, tokens and finish reason of each choice."""
        choices = [
            self._choice(index, text, tokens, reason, echo=True) for index, (text, tokens, reason) in enumerate(pieces)
        ]
        return {**self._head, "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict | None:
        return {**self._head, "choices": [self._choice(index, "", [], None, echo=True)]} if self._echoes else None

    def piece(self, index: int, text: str, tokens: list[TokenText], reason: str | None) -> dict:
        return {**self._head, "choices": [self._choice(index, text, tokens, reason, echo=False)]}

    def last(self, usage: dict[str, int]) -> dict:
        return {**self._head, "choices": [], "usage": usage}

    def _choice(self, index: int, text: str, tokens: list[TokenText], reason: str | None, *, echo: bool) -> dict:
        shown = self._echoes[index] if self._echoes else Echo("", [])
        after = [replace(token, offset=len(shown.text) + token.offset) for token in tokens]
        if echo:
            text, after = shown.text + text, shown.tokens + after
        logprobs = None if self._alternatives is None else _completion_logprobs(after, self._alternatives)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _completion_logprobs(tokens: list[TokenText], alternatives: int) -> dict:
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_by_token(token) for token in tokens] if alternatives else None,
        "text_offset": [token.offset for token in tokens],
    }


def _by_token(token: TokenText) -> dict[str, float] | None:
    """The likeliest tokens, and the one that is there. Several may look alike: the likeliest of them counts."""
    if token.logprob is None:
        return None
    shown: dict[str, float] = {}
    for text, logprob in (*token.top, (token.token, token.logprob)):
        shown.setdefault(text, logprob)
    return shown


class ChatWriter:
    """/v1/chat/completions"""

    def __init__(self, model: str, fixed: Fixed, *, logprobs: bool, version: str | None = None):
        self._head = _head("chatcmpl", "chat.completion", model, fixed, version)
        self._logprobs = logprobs

    def whole(self, pieces: list[tuple[str, list[TokenText], str | None]], usage: dict[str, int]) -> dict:
        choices = [
            {"index": index, "message": {"role": "assistant", "content": text, "refusal": None},
             "logprobs": self._token_logprobs(tokens), "finish_reason": reason}
            for index, (text, tokens, reason) in enumerate(pieces)
        ]  # fmt: skip
        return {**self._head, "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict:
        return self._chunk([_delta(index, {"role": "assistant", "content": ""}, None, None)])

    def piece(self, index: int, text: str, tokens: list[TokenText], reason: str | None) -> dict:
        delta = {"content": text} if text or reason is None else {}
        return self._chunk([_delta(index, delta, self._token_logprobs(tokens), reason)])

    def last(self, usage: dict[str, int]) -> dict:
        return self._chunk([]) | {"usage": usage}

    def _chunk(self, choices: list[dict]) -> dict:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _token_logprobs(self, tokens: list[TokenText]) -> dict | None:
        if not self._logprobs:
            return None
        content = [
            {"token": token.token, "logprob": token.logprob, "bytes": _bytes(token.token),
             "top_logprobs": [{"token": text, "logprob": one, "bytes": _bytes(text)} for text, one in token.top]}
            for token in tokens
        ]  # fmt: skip
        return {"content": content, "refusal": None}


def with_token_ids(whole: dict, prompts: list[list[int]], choices: list[Choice]) -> dict:
    """A whole answer with the ids of its tokens and of its prompts, under vLLM's names."""
    for index, (told, choice) in enumerate(zip(whole["choices"], choices, strict=True)):
        told["token_ids"] = choice.token_ids
        if "text" in told:
            told["prompt_token_ids"] = prompts[index * len(prompts) // len(choices)]
    return whole if "text" in whole["choices"][0] else whole | {"prompt_token_ids": prompts[0]}


def _head(prefix: str, kind: str, model: str, fixed: Fixed, version: str | None) -> dict:
    head = {"id": f"{prefix}-{fixed.id}", "object": kind, "created": fixed.created, "model": model}
    return head if version is None else head | {"system_fingerprint": version}


def _delta(index: int, delta: dict, logprobs: dict | None, reason: str | None) -> dict:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _bytes(token: str) -> list[int] | None:
    """The token's UTF-8; null, as OpenAI says it, for a token that is part of a character."""
    return None if "\N{REPLACEMENT CHARACTER}" in token else list(token.encode())

"""What goes into and comes out of a generation engine, whichever engine it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_ray.errors import UserError

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one response is drawn: temperature, then top_k, then top_p, then min_p, then renormalise."""

    max_new_tokens: int = 48  # longest response in tokens, EOS counted
    temperature: float = 1.0  # divides the logits; 0: the likeliest token (PPO needs more than 0)
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens with this probability
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest
    stop: tuple[str, ...] = ()  # strings that end the response; they stay in it
    min_new_tokens: int = 0  # an EOS before this token does not end the response
    tells_support: bool = False  # completions say which tokens each of theirs was drawn among

    @property
    def truncates(self) -> bool:
        """Whether unlikely tokens are dropped before a token is drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {self.max_new_tokens} must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(
                f"min_new_tokens = {self.min_new_tokens} must be at least 0 and at most max_new_tokens = {self.max_new_tokens}"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature = {self.temperature} must be a number of at least 0")
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k} must be at least 0 (0 keeps every token)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} must lie above 0 and at most 1 (1 keeps every token)")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p = {self.min_p} must be at least 0 and below 1 (0 keeps every token)")
        if self.tells_support and self.temperature == 0:
            raise UserError("tells_support is set and temperature is 0: the likeliest token is drawn among no others")
        if isinstance(self.stop, str) or any(not text for text in self.stop):
            raise UserError(f"stop = {self.stop!r} must be a tuple of non-empty strings")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """What a served request may ask for beside `SamplingParams`. PPO uses none of it.

    The logits of each step are changed in this order, before the temperature: bias, minimum, repetition, frequency and presence,
    schema.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, number added to its logit), each id once
    min_tokens: int = 0  # before this many tokens no end token is drawn, and no stop string looked for
    repetition_penalty: float = 1.0  # positive logits of tokens of the prompt and response are divided by it, others multiplied
    frequency_penalty: float = 0.0  # taken off a token's logit per time that the response has it
    presence_penalty: float = 0.0  # taken off the logit of every token that the response has
    stop_token_ids: tuple[int, ...] = ()  # end the response like EOS
    ignore_eos: bool = False  # EOS does not end the response
    json_schema: str | None = None  # the response is JSON that fits this schema, if it ends by itself
    alternatives: int | None = None  # report `TokenLogprobs` with this many of the likeliest tokens; None: no report

    @property
    def changes_logits(self) -> bool:
        return bool(
            self.logit_bias
            or self.min_tokens
            or self.repetition_penalty != 1.0
            or self.frequency_penalty
            or self.presence_penalty
            or self.json_schema is not None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """What the model itself says of a token: no temperature, truncation, bias or penalty."""

    logprob: float  # of the token that is there
    top: tuple[tuple[int, float], ...]  # (token id, log-prob) of the likeliest, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished response of K tokens."""

    response_ids: np.ndarray  # [K] int32; the EOS that ended it included
    logprobs: np.ndarray  # [K] float32; of each token under the distribution that it was drawn from
    finish_reason: FinishReason  # eos: it ended by itself; stop: a stop string is complete; length: max_new_tokens
    support: list[np.ndarray] | None = None  # K arrays of int32, ascending: what each token was drawn among, if asked for
    log_mass: np.ndarray | None = None  # [K] float32; log of their probability before the others were dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One token of one running request, from a step of continuous batching."""

    request_id: int
    token_id: int
    logprob: float
    completion: Completion | None  # set on the request's last token
    raw: TokenLogprobs | None = None  # where the request's rules ask for it

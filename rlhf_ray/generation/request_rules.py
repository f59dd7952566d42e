"""`TokenRules` of one request at work in a batch, and the log-probs of its prompt.   V vocabulary entries."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from rlhf_ray.algorithms.token_rules import ruled_logits
from rlhf_ray.config.sampling_params import FinishReason, TokenLogprobs, TokenRules
from rlhf_ray.errors import UserError
from rlhf_ray.generation.json_text import JsonGrammars
from rlhf_ray.generation.ragged_decoder import RaggedDecoder

_SCORED_AT_ONCE = 1 << 25  # logits of a prompt that are in memory together


class RequestRules:
    """One request's rules with what they need of its prompt, its engine's end tokens and its device."""

    def __init__(
        self,
        rules: TokenRules,
        prompt_ids: np.ndarray,  # [P] int64
        eos_token_ids: tuple[int, ...],
        *,
        vocab_size: int,
        device: torch.device,
        grammars: JsonGrammars,
        begun: Iterable[int] = (),  # the response's first tokens, which are there already
    ):
        named = [token for token, _ in rules.logit_bias] + list(rules.stop_token_ids)
        beyond = [token for token in named if not 0 <= token < vocab_size]
        if beyond:
            raise UserError(f"token id {beyond[0]} is beyond the model's vocabulary of {vocab_size}; leave it out")
        self.rules = rules
        self._stops = frozenset(rules.stop_token_ids)
        self._eos = frozenset(eos_token_ids)
        self._prompt = torch.from_numpy(prompt_ids).to(device)
        self._bias_ids = torch.tensor([token for token, _ in rules.logit_bias], dtype=torch.int64, device=device)
        self._bias = torch.tensor([change for _, change in rules.logit_bias], dtype=torch.float32, device=device)
        self._end_ids = torch.tensor(sorted(self._eos | self._stops), dtype=torch.int64, device=device)
        self._json = None if rules.json_schema is None else grammars.text(rules.json_schema)
        if self._json is not None:
            for token in begun:
                self._json.take(int(token))
        if rules.min_tokens > 0 and len(self._end_ids) >= vocab_size:
            raise UserError(f"min_tokens is {rules.min_tokens}, but every token ends a response; leave some out of stop_token_ids")

    @property
    def min_tokens(self) -> int:
        return self.rules.min_tokens

    @property
    def changes_logits(self) -> bool:
        return self.rules.changes_logits

    @property
    def reports(self) -> bool:
        return self.rules.alternatives is not None

    def logits(self, logits: torch.Tensor, response_ids: np.ndarray) -> torch.Tensor:
        """[V] -> [V], changed as the rules say after this response."""
        out = ruled_logits(
            logits,
            self._prompt,
            torch.from_numpy(response_ids.astype(np.int64)).to(logits.device),
            bias_ids=self._bias_ids,
            bias=self._bias,
            forbidden_ids=self._end_ids if len(response_ids) < self.rules.min_tokens else self._end_ids[:0],
            repetition_penalty=self.rules.repetition_penalty,
            frequency_penalty=self.rules.frequency_penalty,
            presence_penalty=self.rules.presence_penalty,
        )
        if self._json is not None:
            out[torch.from_numpy(~self._json.allowed).to(out.device)] = -torch.inf
        return out

    def take(self, token: int, is_eos: bool) -> FinishReason | None:
        """The token that was drawn -> why the response ends with it, if it does. is_eos: whether it is an EOS that would end it."""
        if token in self._stops or (is_eos and not self.rules.ignore_eos):
            return "eos"
        if self._json is not None:
            self._json.take(token)
        return "length" if self._json is not None and self._json.is_stuck else None

    def raw(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probs of the model itself, [V] float32."""
        return logits.float().log_softmax(-1)

    def report(self, raw: torch.Tensor, token: int) -> TokenLogprobs:
        assert self.rules.alternatives is not None
        return token_logprobs(raw, token, self.rules.alternatives)


def token_logprobs(raw: torch.Tensor, token: int, alternatives: int) -> TokenLogprobs:
    """raw: log-probs [V]."""
    top = raw.topk(min(alternatives, len(raw)))
    return TokenLogprobs(
        logprob=float(raw[token]), top=tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    )


@torch.inference_mode()
def score_prompt(decoder: RaggedDecoder, prompt_ids: np.ndarray, alternatives: int) -> list[TokenLogprobs | None]:
    """Of each token of a prompt, given those before it; None for the first, which follows nothing."""
    ids = torch.from_numpy(prompt_ids)[None].to(decoder.device)
    vocab_size = decoder.vocab_size
    scores: list[TokenLogprobs | None] = [None]
    # Whole, the logits of a long prompt are gigabytes: it is read in parts, each after the cache of those before it.
    part, cache = max(1, _SCORED_AT_ONCE // vocab_size), None
    for start in range(0, len(prompt_ids) - 1, part):
        end = min(start + part, len(prompt_ids) - 1)
        answer = decoder.model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        for place, line in zip(range(start, end), answer.logits[0].float().log_softmax(-1), strict=True):
            if not bool(torch.isfinite(line[ids[0, place + 1]])):
                raise FloatingPointError(f"the model's logits for token {place + 1} of a prompt are not finite")
            scores.append(token_logprobs(line, int(ids[0, place + 1]), alternatives))
    return scores

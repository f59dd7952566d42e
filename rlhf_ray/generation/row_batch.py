"""Rows in flight: who they are, what they have drawn, when they end.   n rows, T their longest max_new_tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from rlhf_ray.algorithms.sampling import draw, draw_and_tell
from rlhf_ray.config.sampling_params import Completion, FinishReason, SamplingParams, TokenLogprobs
from rlhf_ray.generation.kv_cache import MORE_SLOTS, round_up
from rlhf_ray.generation.ragged_decoder import RaggedDecoder
from rlhf_ray.generation.request_rules import RequestRules


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One response to draw."""

    request_id: int
    prompt_ids: np.ndarray  # [P] int64
    seed: int
    params: SamplingParams
    rules: RequestRules | None = None
    begun: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[k]: the first tokens of the response, drawn by another engine; k < T."""

    @property
    def read_ids(self) -> np.ndarray:
        """[P + k]: what there is before the next token."""
        return np.concatenate([self.prompt_ids, self.begun])

    @property
    def most_slots(self) -> int:
        """Slots of the cache that its row takes in the end, at most."""
        return round_up(len(self.prompt_ids) + self.params.max_new_tokens)


def row_uniforms(seed: int, count: int) -> np.ndarray:
    """The row's draws in [0, 1), [count] float32. Token t's depends on (seed, t) only, not on count or the batch."""
    return np.random.Generator(np.random.Philox(key=seed % 2**64)).random(count, dtype=np.float32)


@dataclass(slots=True)
class _RowArrays:
    """One entry, or one line of T entries, per row; rows [0, n) are in use."""

    positions: np.ndarray  # [R] int64: tokens in the cache, so where the next one goes
    next_tokens: np.ndarray  # [R] int64: drawn (or the prompt's last), not yet in the cache
    counts: np.ndarray  # [R] int64: response tokens drawn
    budgets: np.ndarray  # [R] int64: max_new_tokens
    minima: np.ndarray  # [R] int64: min_new_tokens
    uniforms: np.ndarray  # [R, T] float32
    tokens: np.ndarray  # [R, T] int32: the response so far
    logprobs: np.ndarray  # [R, T] float32

    @classmethod
    def empty(cls) -> _RowArrays:
        flat, wide = np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
        return cls(flat, flat, flat, flat, flat, wide, wide.astype(np.int32), wide)

    def each(self) -> dict[str, np.ndarray]:
        """Name -> array."""
        # getattr: a slotted dataclass has no __dict__, and asdict would copy the arrays.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def grow(self, rows: int, width: int) -> None:
        rows, width = max(rows, len(self.counts)), max(width, self.tokens.shape[1])
        for name, old in self.each().items():
            new = np.zeros((rows,) if old.ndim == 1 else (rows, width), old.dtype)
            new[tuple(slice(size) for size in old.shape)] = old
            setattr(self, name, new)

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        for array in self.each().values():
            array[target] = array[source]


class RowBatch:
    """Rows [0, n) decode together; a row that ends or is removed leaves at once, its place taken by the last one."""

    def __init__(
        self, decoder: RaggedDecoder, tokenizer, eos_token_ids: Sequence[int], max_cache_tokens: int | None = None
    ):
        self.decoder, self.tokenizer = decoder, tokenizer
        self.eos_token_ids = np.array(eos_token_ids)
        self.cache = decoder.new_cache(max_cache_tokens)
        self.requests: list[Request] = []
        self.arrays = _RowArrays.empty()
        self._parameters: dict = {}
        self._stop_windows: dict[int, int] = {}  # row -> last tokens in which its stop strings are looked for
        self._tells = False  # whether a request asks for its support
        self._supports: dict[int, list[np.ndarray]] = {}  # request -> of each of its tokens so far
        self._log_mass: dict[int, list[float]] = {}
        self._rules: dict[int, RequestRules] = {}  # row -> its rules, if it has any
        self.reported: dict[int, TokenLogprobs] = {}  # of the last step, by place in the requests that it returned

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, requests: Sequence[Request]) -> None:
        """Prefill the requests' prompts together, and what there is of their responses, as the last rows of the batch."""
        n, arrays = len(self), self.arrays
        arrays.grow(n + len(requests), max(request.params.max_new_tokens for request in requests))
        read = [request.read_ids for request in requests]
        slots = max(
            len(ids) + min(request.params.max_new_tokens - len(request.begun), MORE_SLOTS)
            for ids, request in zip(read, requests, strict=True)
        )
        self.cache.reserve(n + len(requests), slots, used=int(arrays.positions[:n].max(initial=-1)) + 1)
        self.decoder.prefill(self.cache, n, read)
        for row, (ids, request) in enumerate(zip(read, requests, strict=True), start=n):
            count = len(request.begun)
            arrays.positions[row] = len(ids) - 1
            arrays.next_tokens[row] = ids[-1]
            arrays.counts[row] = count
            arrays.tokens[row, :count], arrays.logprobs[row, :count] = request.begun, np.nan  # who drew them knows those
            arrays.budgets[row] = request.params.max_new_tokens
            arrays.minima[row] = request.params.min_new_tokens
            arrays.uniforms[row, : arrays.budgets[row]] = row_uniforms(request.seed, request.params.max_new_tokens)
        self.requests += requests
        self._members_changed()

    @torch.inference_mode()
    def step(self) -> tuple[list[Request], np.ndarray, np.ndarray, dict[int, Completion]]:
        """Draw one token for every row; rows that end leave.

        -> the requests that were running [n], their tokens [n] and log-probs [n], and completions by place in these.
        """
        n, arrays = len(self), self.arrays
        logits = self.decoder.decode(self.cache, arrays.next_tokens[:n], arrays.positions[:n])
        rows, counts = np.arange(n), arrays.counts[:n]
        untouched = {row: rules.raw(logits[row]) for row, rules in self._rules.items() if rules.reports}
        logits = self._ruled(logits)
        uniforms = torch.from_numpy(arrays.uniforms[rows, counts]).to(logits.device)
        found = self._draw(logits, uniforms)
        # float64 holds token ids and float32 log-probs exactly: one copy to the host instead of two.
        drawn = torch.stack([part.double() for part in found]).cpu().numpy()
        tokens, logprobs = drawn[0].astype(np.int64), drawn[1].astype(np.float32)
        if not np.isfinite(logprobs).all():
            row = int(np.flatnonzero(~np.isfinite(logprobs))[0])
            raise FloatingPointError(
                f"the model's logits for token {counts[row]} of request {self.requests[row].request_id} are not finite"
            )

        self.reported = {row: self._rules[row].report(raw, int(tokens[row])) for row, raw in untouched.items()}
        arrays.tokens[rows, counts], arrays.logprobs[rows, counts] = tokens, logprobs
        arrays.next_tokens[:n] = tokens
        arrays.positions[:n] += 1
        arrays.counts[:n] += 1

        at_eos = (tokens[:, None] == self.eos_token_ids).any(1) & (arrays.counts[:n] >= arrays.minima[:n])
        ended: dict[int, FinishReason] = {int(row): "eos" for row in np.flatnonzero(at_eos) if int(row) not in self._rules}
        for row, rules in self._rules.items():
            reason = rules.take(int(tokens[row]), bool(at_eos[row]))
            if reason is not None:
                ended[row] = reason
        for row in self._stop_windows:
            if row not in ended and self._is_stopped(row):
                ended[row] = "stop"
        for row in np.flatnonzero(arrays.counts[:n] >= arrays.budgets[:n]):
            ended.setdefault(int(row), "length")
        requests = list(self.requests) if ended else self.requests
        completions = {row: self._completion(row, reason) for row, reason in ended.items()}
        self.remove(sorted(ended))
        return requests, tokens, logprobs, completions

    def _draw(self, logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and log-probs [n]; what they were drawn among is written down where a request asks for it."""
        if not self._tells:
            return draw(logits, uniforms, **self._parameters)
        tokens, logprobs, support, log_mass = draw_and_tell(logits, uniforms, **self._parameters)
        ids = support.nonzero()[:, 1].to("cpu", torch.int32).numpy()
        ends = support.sum(1).cumsum(0)[:-1].cpu().numpy()
        for request, among, mass in zip(self.requests, np.split(ids, ends), log_mass.tolist(), strict=True):
            self._supports.setdefault(request.request_id, []).append(among)
            self._log_mass.setdefault(request.request_id, []).append(mass)
        return tokens, logprobs

    def _ruled(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits with those rows changed that have rules for it."""
        changing = {row: rules for row, rules in self._rules.items() if rules.changes_logits}
        if not changing:
            return logits
        logits = logits.float().clone()  # the decoder writes over its own
        for row, rules in changing.items():
            logits[row] = rules.logits(logits[row], self.arrays.tokens[row, : self.arrays.counts[row]])
        return logits

    def remove(self, rows: Sequence[int]) -> None:
        """Drop these rows (ascending); the last ones move into the gaps."""
        if not rows:
            return
        for row in rows:
            for told in (self._supports, self._log_mass):
                told.pop(self.requests[row].request_id, None)
        n = len(self) - len(rows)
        target = np.array([row for row in rows if row < n], np.int64)
        source = np.array(sorted(set(range(n, len(self))) - set(rows)), np.int64)
        if len(source) > 0:
            length = int(self.arrays.positions[source].max())
            if length > 0:
                to = self.decoder.device
                self.cache.move_rows(torch.from_numpy(source).to(to), torch.from_numpy(target).to(to), length)
            self.arrays.move(source, target)
            for new, old in zip(target, source, strict=True):
                self.requests[new] = self.requests[old]
        del self.requests[n:]
        if n == 0:
            self.decoder.forget()
        self._members_changed()

    def _completion(self, row: int, reason: FinishReason) -> Completion:
        count, request = self.arrays.counts[row], self.requests[row]
        told = request.params.tells_support
        return Completion(
            response_ids=self.arrays.tokens[row, :count].copy(),
            logprobs=self.arrays.logprobs[row, :count].copy(),
            finish_reason=reason,
            support=self._supports[request.request_id] if told else None,
            log_mass=np.array(self._log_mass[request.request_id], np.float32) if told else None,
        )

    def _members_changed(self) -> None:
        """One number per parameter while all rows agree, which spares the vocabulary-wide work of those that are off."""
        self._parameters = {}
        params = [request.params for request in self.requests]
        self._tells = any(one.tells_support for one in params)
        columns: dict[str, list[float]] = {
            "temperature": [one.temperature for one in params], "top_k": [one.top_k for one in params],
            "top_p": [one.top_p for one in params], "min_p": [one.min_p for one in params],
        }  # fmt: skip
        for name, values in columns.items():
            if len(set(values)) <= 1:
                self._parameters[name] = values[0] if values else 0
            else:
                self._parameters[name] = torch.tensor(values, dtype=torch.float32, device=self.decoder.device)
        self._stop_windows = {
            row: max(len(text.encode()) for text in request.params.stop) + 8
            for row, request in enumerate(self.requests)
            if request.params.stop
        }
        self._rules = {row: request.rules for row, request in enumerate(self.requests) if request.rules is not None}

    def _is_stopped(self, row: int) -> bool:
        """Whether a stop string is complete.

        A token is at least a byte of text, so a tail of the response is enough; the tokens beyond it give the decoder
        its context (half a character, a leading space).
        """
        count = self.arrays.counts[row]
        rules = self._rules.get(row)
        start = max(0 if rules is None else rules.min_tokens, count - self._stop_windows[row])
        if start >= count:
            return False
        tail = self.arrays.tokens[row, start:count]
        text = self.tokenizer.decode(tail.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self.requests[row].params.stop)

"""The in-process generation engine: prompts and seeds in, responses with the log-probs they were drawn from out.

Two ways to use it: `generate` draws a closed batch, whose result depends on (weights, prompts, seeds, params) and on
nothing that ran before; `submit` / `step` / `cancel` keep one open batch that rows join and leave between steps.
An engine belongs to one thread; the number of torch threads is the caller's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf_ray.config.sampling_params import Completion, SamplingParams, TokenEvent, TokenLogprobs, TokenRules
from rlhf_ray.errors import UserError
from rlhf_ray.generation.engine_protocol import EngineSetting
from rlhf_ray.generation.json_text import JsonGrammars
from rlhf_ray.generation.ragged_decoder import RaggedDecoder
from rlhf_ray.generation.request_rules import RequestRules, score_prompt
from rlhf_ray.generation.row_batch import Request, RowBatch
from rlhf_ray.models.chat_shape import end_ids
from rlhf_ray.models.load import to_device
from rlhf_ray.models.wire import Weight, copy_weights


def torch_engine(setting: EngineSetting, *, graphs: bool = False) -> GenerationEngine:
    """As the table of engines makes it."""
    return GenerationEngine(
        setting.model, setting.tokenizer, max_rows=setting.rows, device=setting.device, eos_token_ids=setting.eos_token_ids,
        max_cache_tokens=setting.max_cache_tokens, graphs=graphs,
    )  # fmt: skip


def graphs_engine(setting: EngineSetting) -> GenerationEngine:
    """The same with its decode steps as CUDA graphs."""
    return torch_engine(setting, graphs=True)


class GenerationEngine:
    """Draws responses from a Hugging Face causal LM, which it takes over (evaluation mode, device).

    max_rows: rows of the open batch; further requests wait (`generate` runs whatever batch it is given).
    max_cache_tokens: its rows times the tokens of the longest, prompt and whole response; a request waits until it fits.
    graphs: see `RaggedDecoder`.
    eos_token_ids: tokens that end a response; default: the tokenizer's (`models.chat_shape.end_ids`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        *,
        max_rows: int = 64,
        device: torch.device | str | None = None,
        eos_token_ids: Sequence[int] | None = None,
        max_cache_tokens: int | None = None,
        graphs: bool = False,
    ):
        if eos_token_ids is None:
            if tokenizer.eos_token_id is None:
                raise UserError("the tokenizer has no EOS token, so no response could end; set tokenizer.eos_token")
            eos_token_ids = end_ids(tokenizer)
        self.model = model if device is None else to_device(model, device)
        self.tokenizer, self.max_rows, self.eos_token_ids = tokenizer, max_rows, tuple(eos_token_ids)
        self.max_cache_tokens = max_cache_tokens
        self.decoder = RaggedDecoder(self.model, graphs=graphs)
        self._grammars = JsonGrammars(tokenizer, self.vocab_size, self.eos_token_ids)
        self._open: RowBatch | None = None
        self._waiting: deque[Request] = deque()
        self._next_id = 0

    # ---- a closed batch

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[Sequence[int] | np.ndarray],
        seeds: Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[Completion]:
        """One response to each prompt, all in one batch. Row b draws with seeds[b] (and params[b], if several)."""
        each = [params] * len(prompt_ids) if isinstance(params, SamplingParams) else params
        requests = [
            self._request(place, ids, seed, one)
            for place, (ids, seed, one) in enumerate(zip(prompt_ids, seeds, each, strict=True))
        ]
        if not requests:
            return []
        batch = RowBatch(self.decoder, self.tokenizer, self.eos_token_ids)
        batch.add(requests)
        results: dict[int, Completion] = {}
        while len(batch):
            running, _, _, completions = batch.step()
            results |= {running[place].request_id: completion for place, completion in completions.items()}
        return [results[place] for place in range(len(requests))]

    # ---- an open batch

    def submit(
        self,
        prompt_ids: Sequence[int] | np.ndarray,
        seed: int,
        params: SamplingParams,
        rules: TokenRules | None = None,
        *,
        begun: Sequence[int] | np.ndarray = (),
    ) -> int:
        """Queue a request; it joins at the next step with a free row. -> its id, which its events carry.

        begun: the first tokens of its response, which are there already.
        """
        request = self._request(self._next_id, prompt_ids, seed, params, rules, begun)
        if self.max_cache_tokens is not None and request.most_slots > self.max_cache_tokens:
            raise UserError(
                f"a prompt of {len(request.prompt_ids)} tokens and max_new_tokens = {params.max_new_tokens} need a cache of "
                f"{request.most_slots} tokens, and there is room for {self.max_cache_tokens}; shorten the prompt or lower "
                "max_new_tokens"
            )
        self._next_id += 1
        self._waiting.append(request)
        return request.request_id

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Let waiting requests join, then draw one token for every row. -> one event per row; [] when nothing runs."""
        if self._open is None:
            self._open = RowBatch(self.decoder, self.tokenizer, self.eos_token_ids, self.max_cache_tokens)
        joining = self._joining()
        try:
            if joining:
                self._open.add(joining)
            if not len(self._open):
                return []
            running, tokens, logprobs, completions = self._open.step()
            reported = self._open.reported
        except BaseException:  # fault boundary: one call; its rows leave the batch, whatever ended it
            self._open = None  # a half-made step leaves rows that no later one can continue, maybe NaN in the cache
            self.decoder.forget()
            raise
        if not len(self._open):
            self._open = None  # gives the cache back while idle
        return [
            TokenEvent(
                request_id=request.request_id,
                token_id=int(token),
                logprob=float(logprob),
                completion=completions.get(place),
                raw=reported.get(place),
            )
            for place, (request, token, logprob) in enumerate(zip(running, tokens, logprobs, strict=True))
        ]

    @torch.inference_mode()
    def cancel(self, request_id: int) -> bool:
        """Drop a waiting or running request, between steps. -> whether it was there."""
        for request in self._waiting:
            if request.request_id == request_id:
                self._waiting.remove(request)
                return True
        if self._open is None:
            return False
        rows = [row for row, request in enumerate(self._open.requests) if request.request_id == request_id]
        if rows:
            self._open.remove(rows)
        return bool(rows)

    def check_schema(self, schema: str) -> None:
        """UserError for a JSON schema that a response can't be held to. Any thread may ask."""
        self._grammars.text(schema)

    def score(self, prompt_ids: Sequence[int] | np.ndarray, alternatives: int) -> list[TokenLogprobs | None]:
        """Log-probs of a prompt's own tokens, between steps; None for the first, which follows nothing."""
        return score_prompt(self.decoder, np.asarray(prompt_ids, np.int64), alternatives)

    @property
    def max_length(self) -> int | None:
        return self.decoder.max_length

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def num_running(self) -> int:
        return len(self._running())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    # ---- weights

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Weight], kept: Set[str] = frozenset()) -> None:
        """Copy new weights into the model, in place; nothing of state is kept, and it may be read-only.

        Every weight but those in `kept`, which stay, must be there (`models.wire.copy_weights`).
        """
        if self.num_running or self.num_waiting:
            raise RuntimeError(
                f"{self.num_running} rows are running and {self.num_waiting} wait under the old weights; "
                "let them end or cancel them before load_weights"
            )
        copy_weights(self.model, state, kept)

    def model_changed(self) -> None:
        """Whoever changed the model's weights in place says so. Nothing here is made from them."""

    def sleep(self) -> None:
        """Give memory back until there is work again. The cache is one of each batch, so there is nothing to give."""

    def close(self) -> None:
        """Nothing stays: see `sleep`."""

    # ---- inside

    def _joining(self) -> list[Request]:
        """Those that have waited longest, as many as there is room for, whatever length they all reach."""
        running = self._running()
        joining: list[Request] = []
        slots = max((request.most_slots for request in running), default=0)
        while self._waiting and len(running) + len(joining) < self.max_rows:
            slots = max(slots, self._waiting[0].most_slots)
            if self.max_cache_tokens is not None and (len(running) + len(joining) + 1) * slots > self.max_cache_tokens:
                break
            joining.append(self._waiting.popleft())
        return joining

    def _running(self) -> Sequence[Request]:
        return self._open.requests if self._open is not None else []

    def _request(
        self, request_id: int, prompt_ids, seed: int, params: SamplingParams, rules: TokenRules | None = None, begun=()
    ) -> Request:
        ids, begun = np.asarray(prompt_ids, np.int64), np.asarray(begun, np.int64)
        if ids.ndim != 1 or len(ids) == 0:
            raise UserError(f"prompt {request_id} has no tokens; give it at least one (for example BOS or EOS)")
        if ids.min() < 0 or ids.max() >= self.decoder.vocab_size:
            raise UserError(
                f"prompt {request_id} has token ids from {ids.min()} to {ids.max()}, but the model's vocabulary has "
                f"{self.decoder.vocab_size} entries; encode it with the model's own tokenizer"
            )
        if len(begun) >= params.max_new_tokens:
            raise UserError(f"response {request_id} has its max_new_tokens = {params.max_new_tokens} tokens already; it is whole")
        self.decoder.check_length(len(ids), params.max_new_tokens)
        return Request(
            request_id=request_id, prompt_ids=ids, seed=int(seed), params=params, begun=begun,
            rules=None if rules is None else RequestRules(
                rules, ids, self.eos_token_ids, vocab_size=self.vocab_size, device=self.decoder.device, grammars=self._grammars,
                begun=begun,
            ),
        )  # fmt: skip

"""vLLM as a server's engine: one open batch that requests join and leave between tokens (`engine_protocol.ContinuousEngine`).

Log-probs are the model's own, as a server tells them: no temperature, truncation, bias or penalty. The log-prob of the distribution
that a token was drawn from, which PPO needs, vLLM gives to closed batches only (one way per engine); here an event's `logprob` is
the model's own, too. A seed gives the same tokens as long as the rows beside it are the same; in another batch logits differ in
their last digits.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rlhf_ray.config.sampling_params import Completion, SamplingParams, TokenEvent, TokenLogprobs, TokenRules
from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.generation.engine_protocol import EngineSetting, Tokens
from rlhf_ray.generation.vllm_start import check_vllm, start_vllm
from rlhf_ray.generation.vllm_weights import CACHE_BLOCK, cache_bytes
from rlhf_ray.models.chat_shape import end_ids
from rlhf_ray.models.embeddings import embedding_rows
from rlhf_ray.models.load import to_device
from rlhf_ray.models.positions import positions_of
from rlhf_ray.tables.engines import ENGINES

MOST_ALTERNATIVES = 20  # of each token; what the API lets clients ask for
#: Largest difference of a prompt's log-probs to the Hugging Face model's, at the start (`vllm_generation.GATE`).
GATE = {torch.float32: 0.01, torch.bfloat16: 0.2}
PROBE_TOKENS = 8
COLDEST = ENGINES["vllm"].coldest


def vllm_serving(setting: EngineSetting) -> VllmServing:
    """As the table of engines makes it."""
    return VllmServing(setting)


class VllmServing:
    """Draws with vLLM, which builds the model from setting.folder. setting.model only says its size, and is what the first
    log-probs are compared with; nothing of it is kept."""

    def __init__(self, setting: EngineSetting):
        device = torch.device(setting.device)
        check_vllm(device)
        model = to_device(setting.model, device).eval()
        if embedding_rows(model) != _rows_of_folder(setting):
            raise UserError(
                f"the tokenizer of {setting.folder} has tokens that the model's embeddings lack, and vLLM reads these from the "
                "folder; save the model with enough rows, or give --engine torch"
            )
        self.eos_token_ids = tuple(setting.eos_token_ids or end_ids(setting.tokenizer))
        self.vocab_size = model.config.get_text_config().vocab_size
        rows, slot = setting.rows, cache_bytes(model, CACHE_BLOCK, 1) // (2 * CACHE_BLOCK)
        longest = positions_of(model.config) or CACHE_BLOCK * 64
        room = (setting.max_cache_tokens or rows * longest) // CACHE_BLOCK * CACHE_BLOCK
        if room < 2 * CACHE_BLOCK:
            least = 2 * CACHE_BLOCK
            raise UserError(f"a cache of {room} tokens is too small for vLLM; raise --max-cache-tokens to {least} or more")
        longest = min(longest, room - CACHE_BLOCK)
        cache = min(cache_bytes(model, longest, rows), slot * room)
        self.max_length: int | None = longest
        self.llm = start_vllm(
            setting.folder, model, device, longest=longest, rows=rows, cache=cache, tensor_parallel=setting.tensor_parallel,
            trust_remote_code=setting.trust_remote_code, logprobs_mode="raw_logprobs", max_logprobs=MOST_ALTERNATIVES,
        )  # fmt: skip
        self._engine = self.llm.llm_engine
        self._responses: dict[int, list[tuple[int, float]]] = {}  # request -> tokens and log-probs so far
        self._rules: dict[int, TokenRules | None] = {}
        self._ready: deque[TokenEvent] = deque()  # that came while a prompt was scored
        self._next_id = 0
        self._check(model)

    # ---- the open batch

    def submit(
        self, prompt_ids: Tokens, seed: int, params: SamplingParams, rules: TokenRules | None = None, *, begun: Tokens = ()
    ) -> int:
        """Queue a request -> its id, which its events carry. UserError for one that it can't take."""
        if len(begun) > 0:  # vLLM's random numbers of a request begin anew, and so do its penalties
            raise UserError("the engine vllm can't go on with a response that another one has begun; ask for the whole")
        ids = self._checked(prompt_ids, params, rules)
        number, self._next_id = self._next_id, self._next_id + 1
        self._engine.add_request(str(number), {"prompt_token_ids": ids}, self._vllm_params(params, seed, rules))
        self._responses[number], self._rules[number] = [], rules
        return number

    def step(self) -> list[TokenEvent]:
        """One token for every row that runs; [] when nothing does. A row whose prompt is still being read has none."""
        ready = list(self._ready)
        self._ready.clear()
        return ready or self._step(scored=None)

    def cancel(self, request_id: int) -> bool:
        """Drop a request, between steps -> whether it was there."""
        if self._responses.pop(request_id, None) is None:
            return False
        del self._rules[request_id]
        self._ready = deque(event for event in self._ready if event.request_id != request_id)
        self._engine.abort_request([str(request_id)])
        return True

    def score(self, prompt_ids: Tokens, alternatives: int) -> list[TokenLogprobs | None]:
        """The log-probs of a prompt's own tokens, and this many alternatives; None for the first token. Rows that run go on
        meanwhile."""
        from vllm import SamplingParams as VllmParams

        _check_alternatives(alternatives)
        ids = self._checked(prompt_ids, SamplingParams(max_new_tokens=1), None)
        params = VllmParams(max_tokens=1, temperature=0.0, prompt_logprobs=alternatives, detokenize=False)
        name = f"score-{self._next_id}"
        self._next_id += 1
        self._engine.add_request(name, {"prompt_token_ids": ids}, params)
        found: dict[str, list[Any]] = {}
        while name not in found:
            self._ready.extend(self._step(scored=found))
        told = found[name]
        return [None, *(_token_logprobs(at, token, alternatives) for at, token in zip(told[1:], ids[1:], strict=True))]

    # ---- inside

    def _step(self, scored: dict[str, list[Any]] | None) -> list[TokenEvent]:
        """scored: where the log-probs of a prompt go, by its request's name."""
        if not self._engine.has_unfinished_requests():
            return []
        # In a new thread OpenMP begins with its default, and torch sets the number of threads at its first operation: between two
        # of vLLM's kernels for CPUs, which have to agree. Asking sets it. (vLLM has made set_num_threads do nothing.)
        torch.get_num_threads()
        events: list[TokenEvent] = []
        for output in self._engine.step():
            if output.request_id.startswith("score-"):
                if output.finished and scored is not None:
                    scored[output.request_id] = output.prompt_logprobs
            elif (number := int(output.request_id)) in self._responses:
                events += self._events(number, output.outputs[0])
        return events

    def _events(self, number: int, output: Any) -> Iterator[TokenEvent]:
        """Of the tokens that a step has added to a row: one, as long as nothing is drawn ahead."""
        so_far, rules = self._responses[number], self._rules[number]
        for place, (token, at) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            logprob = float(at[token].logprob)
            if not np.isfinite(logprob):
                self.cancel(number)
                raise FloatingPointError(f"log-prob {len(so_far)} of a response is not finite")
            so_far.append((token, logprob))
            last = place == len(output.token_ids) - 1 and output.finish_reason is not None
            alternatives = None if rules is None else rules.alternatives
            yield TokenEvent(
                request_id=number, token_id=int(token), logprob=logprob,
                completion=self._completion(number, output) if last else None,
                raw=None if alternatives is None else _token_logprobs(at, token, alternatives),
            )  # fmt: skip

    def _completion(self, number: int, output: Any) -> Completion:
        tokens, _ = self._responses.pop(number), self._rules.pop(number)
        reason = output.finish_reason
        if reason == "stop" and not isinstance(output.stop_reason, str):
            reason = "eos"
        return Completion(
            response_ids=np.array([token for token, _ in tokens], np.int32),
            logprobs=np.array([logprob for _, logprob in tokens], np.float32), finish_reason=reason,
        )  # fmt: skip

    def _checked(self, prompt_ids: Tokens, params: SamplingParams, rules: TokenRules | None) -> list[int]:
        ids = np.asarray(prompt_ids, np.int64)
        if ids.ndim != 1 or len(ids) == 0:
            raise UserError("a prompt has no tokens; give it at least one (for example BOS or EOS)")
        named = [token for token, _ in rules.logit_bias] + list(rules.stop_token_ids) if rules else []
        beyond = [int(token) for token in (*ids.tolist(), *named) if not 0 <= token < self.vocab_size]
        if beyond:
            raise UserError(f"token id {beyond[0]} is beyond the model's vocabulary of {self.vocab_size}; leave it out")
        assert self.max_length is not None
        if len(ids) + params.max_new_tokens > self.max_length:
            needed = len(ids) + params.max_new_tokens
            raise UserError(
                f"a prompt of {len(ids)} tokens and max_new_tokens = {params.max_new_tokens} need {needed} positions, and there "
                f"are {self.max_length}; shorten the prompt or lower max_new_tokens"
            )
        if 0 < params.temperature < COLDEST:
            raise UserError(f"temperature = {params.temperature} is below {COLDEST}, vLLM's least; raise it, or give 0")
        if params.min_new_tokens > 1:
            raise UserError("min_new_tokens is for PPO's rollouts; a served request gives min_tokens")
        if rules is not None and rules.json_schema is not None:
            raise UserError("the engine vllm holds no response to a JSON schema; leave response_format out, or serve with torch")
        _check_alternatives(rules.alternatives or 0 if rules is not None else 0)
        return ids.tolist()

    def _vllm_params(self, params: SamplingParams, seed: int, rules: TokenRules | None) -> Any:
        from vllm import SamplingParams as VllmParams
        from vllm.sampling_params import RequestOutputKind

        rules = TokenRules() if rules is None else rules
        ends = [*rules.stop_token_ids, *(() if rules.ignore_eos else self.eos_token_ids)]
        return VllmParams(
            max_tokens=params.max_new_tokens, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p,
            min_p=params.min_p, seed=int(seed) % 2**63, logprobs=rules.alternatives or 0,
            # EOS as any token that ends a response: it comes back as stop_reason, and is always part of the response.
            ignore_eos=True, stop_token_ids=ends, min_tokens=rules.min_tokens,
            stop=list(params.stop), include_stop_str_in_output=True, detokenize=bool(params.stop), skip_special_tokens=False,
            logit_bias=dict(rules.logit_bias) or None, repetition_penalty=rules.repetition_penalty,
            frequency_penalty=rules.frequency_penalty, presence_penalty=rules.presence_penalty,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip

    @torch.no_grad()
    def _check(self, model: torch.nn.Module) -> None:
        """That vLLM computes what the folder's model does. RunFailed if not."""
        assert self.max_length is not None
        count = min(PROBE_TOKENS, self.max_length - 1, self.vocab_size)
        ids = (np.arange(count) * 7 + 1) % self.vocab_size
        logits = model(torch.from_numpy(ids[None, :-1]).to(next(model.parameters()).device)).logits[0].float().cpu()
        expected = logits.log_softmax(-1).gather(-1, torch.from_numpy(ids[1:, None]))[:, 0]
        told = torch.tensor([one.logprob for one in self.score(ids, 0) if one is not None])
        gap, most = float((expected - told).abs().max()), GATE[next(model.parameters()).dtype]
        if not gap <= most:  # NaN is not
            raise RunFailed(
                f"vLLM's log-probs differ by {gap:.3g} from those of the model, above {most}: it computes something else from this "
                f"{type(model).__name__}; give --engine torch, or --precision float32"
            )

    def close(self) -> None:
        """vLLM's weights and cache go; it is not asked again."""
        del self._engine, self.llm
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _check_alternatives(count: int) -> None:
    if count > MOST_ALTERNATIVES:
        raise UserError(f"{count} alternatives per token are asked for, and vLLM tells {MOST_ALTERNATIVES}; ask for fewer")


def _token_logprobs(at: Mapping[int, Any], token: int, alternatives: int) -> TokenLogprobs:
    """at: vLLM's, by token: those of the likeliest and of the one that is there."""
    likeliest: Sequence[tuple[int, Any]] = sorted(at.items(), key=lambda each: each[1].rank)[:alternatives]
    return TokenLogprobs(
        logprob=float(at[token].logprob), top=tuple((number, float(each.logprob)) for number, each in likeliest)
    )


def _rows_of_folder(setting: EngineSetting) -> int:
    from rlhf_ray.models.load import load_config

    return load_config(setting.folder, setting.trust_remote_code).get_text_config().vocab_size

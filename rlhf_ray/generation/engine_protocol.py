"""What a generation engine is: the contract behind `generation.engine`. `tables.engines` names those there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.config.sampling_params import Completion, SamplingParams, TokenEvent, TokenLogprobs, TokenRules
from rlhf_ray.models.wire import Weight

Tokens = Sequence[int] | np.ndarray


class BatchEngine(Protocol):
    """Prompts and seeds in, responses with their log-probs out. It belongs to one thread.

    The contract: a result depends on (weights, prompts, seeds, params) of the call and on nothing that ran before. A token's
    log-prob is that of the distribution it was drawn from (temperature, then top_k, top_p, min_p, renormalised), in float32,
    where the parameters ask for it (`tells_support`) the result says which tokens were not cut off, and the policy computes the
    same over them, to a few digits: PPO stops where the two differ (`ppo.max_mismatch`). The EOS or stop
    string that ends a response is part of it; an EOS before min_new_tokens does not end it.
    """

    def generate(
        self, prompt_ids: Sequence[Tokens], seeds: Sequence[int], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """One response to each prompt, in order. Row b draws with seeds[b] (and params[b], if several)."""
        ...

    def load_weights(self, state: Mapping[str, Weight], kept: Set[str] = frozenset()) -> None:
        """Copy new weights in, by their names in the Hugging Face model; nothing of state is kept, and it may be read-only.
        Every weight but those in `kept`, which stay, must be there. Not while it generates. state may be a
        `models.wire.WeightsInTurn`, whose items are read once and in order."""
        ...

    def model_changed(self) -> None:
        """Whoever changed the Hugging Face model's weights in place (a merged adapter's) says so."""
        ...

    def sleep(self) -> None:
        """Give GPU memory back until there is work again; the next call of another method wakes it."""
        ...

    def close(self) -> None:
        """Let go of the memory that goes with the engine; the Hugging Face model stays its owner's."""
        ...


class ContinuousEngine(Protocol):
    """One open batch that rows join and leave between tokens: what serving needs, to stream and to cancel."""

    @property
    def max_length(self) -> int | None:
        """Longest sequence in tokens; None: no limit."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def submit(
        self, prompt_ids: Tokens, seed: int, params: SamplingParams, rules: TokenRules | None = None, *, begun: Tokens = ()
    ) -> int:
        """Queue a request -> its id, which its events carry. UserError for one that it can't take.

        begun: the first tokens of its response, which are there already and count as drawn: no event tells of them, their
        log-probs are NaN in the completion, and the next token is drawn as it would be after them. Given only to an engine
        that `continues` (`tables.engines`).
        """
        ...

    def check_schema(self, schema: str) -> None:
        """UserError for a JSON schema that a response can't be held to. Any thread may ask, while the engine works."""
        ...

    def score(self, prompt_ids: Tokens, alternatives: int) -> list[TokenLogprobs | None]:
        """The log-probs of a prompt's own tokens, and this many alternatives, between steps; None for the first token."""
        ...

    def step(self) -> list[TokenEvent]:
        """One token for every row that runs; [] when nothing does."""
        ...

    def cancel(self, request_id: int) -> bool:
        """Drop a request, between steps -> whether it was there."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetting:
    """What an engine is made of."""

    folder: str | Path  # the model's Hugging Face folder or hub name
    model: PreTrainedModel  # the same, loaded in the dtype to compute in; the engine moves it to `device`
    tokenizer: PreTrainedTokenizerBase
    device: torch.device | str = "cpu"
    rows: int = 32  # that decode at a time
    max_cache_tokens: int | None = None  # of an open batch: rows times tokens of the longest; None: as many as there are
    tensor_parallel: int = 1  # GPUs that hold the engine's model together
    shares_gpu: bool = False  # other processes have memory on it, too
    longest: int | None = None  # tokens of the longest prompt with its response; None: what the model has positions for
    probes: Sequence[Tokens] = ()  # some prompts, to try new weights on
    eos_token_ids: Sequence[int] | None = None  # tokens that end a response; None: those of the tokenizer
    trust_remote_code: bool = False

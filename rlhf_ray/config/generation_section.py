"""The section `generation`."""

from __future__ import annotations

from typing import Annotated

from pydantic import model_validator

from rlhf_ray.config.base import OneOf, Precision, Section, option
from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.tables.engines import ENGINES


class GenerationConfig(Section):
    """How responses are drawn, in training and evaluation alike."""

    max_new_tokens: int = option(48, "longest response in tokens", gt=0)
    min_new_tokens: int = option(
        0, "an EOS before this token does not end the response; if it is max_new_tokens, all have that length", ge=0
    )
    temperature: float = option(1.0, "divides the logits in sampling and in every log-prob", gt=0)
    top_k: int = option(0, "sample from the k likeliest tokens; 0: all", ge=0)
    top_p: float = option(1.0, "sample from the smallest set with this probability", gt=0, le=1)
    min_p: float = option(0.0, "drop tokens less likely than this share of the likeliest", ge=0, lt=1)
    stop: tuple[str, ...] = option((), "strings that end a response")
    chunk_size: int = option(32, "responses per chunk; a chunk is one batch, whichever actor draws it", gt=0)
    precision: Precision = option("auto", "auto: as ppo.precision")
    engine: Annotated[str, OneOf(ENGINES)] = option(
        "torch",
        "what draws responses, in training, evaluation and serving; "
        + "; ".join(f"{engine.name}: {engine.words}" for engine in ENGINES.values()),
    )

    @property
    def sampling(self) -> SamplingParams:
        """These options as the engine takes them."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            stop=self.stop,
        )

    @model_validator(mode="after")
    def _lengths_fit(self):
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"generation.min_new_tokens = {self.min_new_tokens} is above max_new_tokens = {self.max_new_tokens}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _engine_tells_what_it_kept(self):
        if self.sampling.truncates and not ENGINES.named(self.engine).tells_support:
            able = " or ".join(engine.name for engine in ENGINES.values() if engine.tells_support)
            raise ValueError(
                f"generation.top_k = {self.top_k}, top_p = {self.top_p:g} and min_p = {self.min_p:g} drop tokens, but the engine "
                f"{self.engine} does not say which, so the policy's log-probs, its gradient and the KL would be those of another "
                "distribution, whatever ppo.kl_coef and importance_correction are; set them to 0, 1 and 0, or "
                f"generation.engine to {able}"
            )
        return self

    @model_validator(mode="after")
    def _engine_draws_so_cold(self):
        coldest = ENGINES.named(self.engine).coldest
        if self.temperature < coldest:
            raise ValueError(
                f"generation.temperature = {self.temperature} is below {coldest:g}, the least that {self.engine} draws at; "
                "raise it, or set generation.engine to another"
            )
        return self

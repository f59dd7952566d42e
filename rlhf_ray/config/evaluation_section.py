"""The section of the final evaluation."""

from __future__ import annotations

from rlhf_ray.config.base import Section, option


class EvaluationConfig(Section):
    """SFT model against PPO model on held-out prompts."""

    prompts: int = option(256, "held-out prompts", gt=0)
    samples: int = option(12, "sample pairs shown in the report", gt=0)
    seeds: tuple[int, ...] = option(
        (0,), "sampling seeds; every prompt is drawn once for each", min_length=1
    )
    bootstrap: int = option(2000, "resamples of the 95 % intervals", gt=0)
    judge_function: str | None = option(
        None, "package.module:function(prompts, responses) -> scores: the known true utility; may ask for columns, too"
    )
    trait_function: str | tuple[str, ...] | None = option(
        None,
        "package.module:function(prompts, responses) -> {trait: scores}, higher is better: figures of each model beside its "
        "scores; one function, or a list",
    )
    max_kl: float | None = option(
        None, "cap on the KL to the SFT model, nats per response; above it the result counts as failed", gt=0
    )
    judge_positive_above: float | None = option(
        None, "raw judge score above which a response counts as positive (judge_positive)"
    )

    @property
    def trait_functions(self) -> tuple[str, ...]:
        named = self.trait_function
        return () if named is None else (named,) if isinstance(named, str) else named

    @property
    def functions(self) -> list[tuple[str, str]]:
        """(what to call it, function's name) of the judge and the traits; no two are called alike."""
        judge = [] if self.judge_function is None else [("judge_function", self.judge_function)]
        paths = self.trait_functions
        return judge + [("trait_function" if len(paths) == 1 else f"trait_function {path}", path) for path in paths]

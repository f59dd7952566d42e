"""A term of `ppo.rewards`, and the keys of `ppo` that stand for a single one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from rlhf_ray.config.base import LONGEST_S, Section, option
from rlhf_ray.tables.rewards import REWARDS


class RewardTerm(Section):
    """One of several rewards whose weighted sum is the score."""

    weight: float = option(1.0, "factor of this term in the sum; negative: a penalty")
    function: str | None = option(
        None,
        "package.module:function scoring (prompts, responses), and columns of the prompts' rows that its other parameters "
        "name; this or model",
    )
    model: str | None = option(
        None, "'reward' (the reward stage's model or ensemble), or a folder / hub name of a reward model; this or function"
    )
    url: tuple[str, ...] = option(
        (), "address of a reward server (OpenRLHF's protocol, http://HOST:PORT), or several, asked in turn; in place of "
        "function and model. RLHF_RAY_REWARD_KEY of the environment is sent as bearer token",
    )  # fmt: skip
    retries: int = option(5, "with url: further tries of a request that failed, with growing pauses; then the run stops", ge=0)
    kind: str | None = option(None, "name of a kind of reward that a plugin registered; in place of function, model and url")
    options: dict[str, Any] = option({}, "what that kind reads")
    timeout_s: float | None = option(
        None, "longest time of the function per sample; it gets one sample at a time, in a process of its own; null: no limit. "
        "With url: deadline of each request; null: 60", gt=0, le=LONGEST_S,
    )  # fmt: skip
    timeout_score: float | None = option(None, "score of a sample over the limit, before the weight; null: the run stops")

    @field_validator("url", mode="before")
    @classmethod
    def _one_address(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_source(self):
        if self.kind is not None:
            problem = REWARDS.problem(self.kind)
            if problem is not None:
                raise ValueError(f"kind: {problem}")
            if REWARDS[self.kind].chosen_by is not None:
                raise ValueError(f"kind {self.kind} follows from the keys function, model and timeout_s; remove kind")
            if self.function is not None or self.model is not None or self.url:
                raise ValueError(f"the term has kind {self.kind} and a function, model or url; give it one of these")
        elif self.options:
            raise ValueError(f"options are {self.options}, but there is no kind that reads them; set kind, or remove them")
        elif self.url:
            if self.function is not None or self.model is not None:
                raise ValueError("the term has url and a function or model; give it one of the three")
            _check_urls(self.url)
        elif (self.function is None) == (self.model is None):
            has = "neither" if self.function is None else "both"
            raise ValueError(f"the term has {has} function and model; give it exactly one of the two, or url")
        if self.timeout_s is not None and self.function is None and not self.url:
            other = f"model '{self.model}'" if self.kind is None else f"kind {self.kind}"
            raise ValueError(f"timeout_s is {self.timeout_s:g}, but {other} is not a function; remove timeout_s")
        if self.timeout_score is not None and self.url:
            raise ValueError(
                f"timeout_score is {self.timeout_score:g}, but a reward server that does not answer gives no score; remove it"
            )
        if self.timeout_score is not None and self.timeout_s is None:
            raise ValueError(f"timeout_score is {self.timeout_score:g}, but there is no timeout_s; set it too")
        return self


def _check_urls(urls: tuple[str, ...]) -> None:
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ValueError(f"url is {url!r}, which is no address of a server; write http://HOST:PORT, without user and password")


def shorthand_problem(
    rewards: Iterable[str], function: str | None, timeout_s: float | None, timeout_score: float | None
) -> str | None:
    """Why the names of `ppo.rewards` and the keys ppo.reward_* do not fit together, in words."""
    names = list(rewards)
    if names and function is not None:
        return f"ppo.rewards and ppo.reward_function ('{function}') are both set; make the function a term of ppo.rewards"
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            return f"ppo.rewards has a term '{name}'; name it with letters, digits, '_', '.' and '-' only"
    if timeout_s is not None and function is None:
        return (
            f"ppo.reward_timeout_s is {timeout_s:g}, but there is no ppo.reward_function; remove it, or "
            "set timeout_s of a term of ppo.rewards"
        )
    if timeout_score is not None and timeout_s is None:
        return f"ppo.reward_timeout_score is {timeout_score:g}, but there is no ppo.reward_timeout_s; set it too"
    return None

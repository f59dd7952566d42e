"""Scores from a reward server, by the protocol of OpenRLHF's (`/get_reward`).   B responses.

    POST {"query": [prompt + response, ...], "prompts": [...], "labels": [...]}  ->  {"rewards": [...]}

A server that does not answer is a broken machine, never a score: the request is sent again, to the addresses in turn, and in
the end the run stops and says why.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from rlhf_ray.config.columns import NO_COLUMNS, Asked, Columns
from rlhf_ray.config.reward_term import RewardTerm
from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.messages import Scores
from rlhf_ray.rewards.finite_scores import UserScore, check_finite
from rlhf_ray.rewards.returned import SHOWN, NotNumbers, numbers_of

if TYPE_CHECKING:
    from rlhf_ray.config import Recipe

PATH = "/get_reward"
KEY_VARIABLE = "RLHF_RAY_REWARD_KEY"
LABEL = "label"  # the column of the prompts' rows that is sent as labels
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
_BUSY = (408, 425, 429)  # beside 5xx: the same request may be answered later


class HttpReward:
    """(prompts, responses) -> scores of the servers at `urls`.

    timeout_s: deadline of each request; `retries`: further tries of one that failed. Each call begins with the next address.
    `key` is sent as a bearer token.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout_s: float,
        retries: int,
        key: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.urls = [address_of(url) for url in urls]
        self.timeout_s, self.retries, self._sleep = timeout_s, retries, sleep
        self._starts = itertools.cycle(range(len(self.urls)))
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # trust_env: a proxy of the environment is for the internet.
        self._client = httpx.Client(headers=headers, timeout=timeout_s, trust_env=False)

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool], columns: Columns = NO_COLUMNS
    ) -> Scores:
        if not responses:
            return Scores(total=np.empty(0, np.float32))
        body = {
            "query": [prompt + response for prompt, response in zip(prompts, responses, strict=True)],
            "prompts": list(prompts),
            "labels": ["" if label is None else label for label in columns.get(LABEL, [None] * len(prompts))],
            "ended": [bool(one) for one in ended],  # of this package's own server; others pass over it
        }
        url, rewards = self._ask(body, len(responses))
        total = check_finite(
            UserScore, f"the reward server {url} answered", np.array(rewards, np.float64), prompts, responses
        )
        return Scores(total=total)

    def _ask(self, body: dict[str, Any], count: int) -> tuple[str, list[float]]:
        """The address that answered, and its rewards."""
        start, problems = next(self._starts), {}
        for attempt in range(self.retries + 1):
            url = self.urls[(start + attempt) % len(self.urls)]
            try:
                return url, self._one(url, body, count)
            except _NoAnswer as error:
                problems[url] = str(error)
                # Every address has its turn before the first pause.
                round_, place = divmod(attempt + 1, len(self.urls))
                if attempt < self.retries and place == 0:
                    self._sleep(max(error.wait_s, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (round_ - 1))))
        told = "; ".join(f"{url}: {problem}" for url, problem in problems.items())
        raise RunFailed(
            f"no reward server answered in {self.retries + 1} tries ({told}); start it, or give further addresses as url, then "
            "run the same command again"
        )

    def _one(self, url: str, body: dict[str, Any], count: int) -> list[float]:
        deadline = time.monotonic() + self.timeout_s
        try:
            # httpx counts its limit anew with every part that comes; a server that drips is late too.
            with self._client.stream("POST", url, json=body) as answer:
                content = b""
                for part in answer.iter_bytes():
                    content += part
                    if time.monotonic() > deadline:
                        raise _NoAnswer(f"no whole answer within {self.timeout_s:g} s")
        except httpx.TimeoutException:
            raise _NoAnswer(f"no answer within {self.timeout_s:g} s") from None
        except (httpx.HTTPError, OSError) as error:
            raise _NoAnswer(f"{type(error).__name__}: {error}") from None
        words = content[:SHOWN].decode("utf-8", "replace")
        if answer.status_code >= 500 or answer.status_code in _BUSY:
            raise _NoAnswer(f"status {answer.status_code}: {words}", _seconds(answer.headers.get("retry-after")))
        if answer.status_code != 200:
            raise UserError(f"the reward server {url} refuses the request with status {answer.status_code}: {words}")
        try:
            rewards = answer_of(content)
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _NoAnswer(f"it answered something else than rewards: {words}") from None
        try:
            return numbers_of(rewards, count)
        except NotNumbers as wrong:
            raise UserError(f"the reward server {url} answered {wrong}; it has to give one number for each query") from None


def answer_of(content: bytes) -> Any:
    """`rewards` of an answer's body."""
    return json.loads(content)["rewards"]


def address_of(url: str) -> str:
    """With the protocol's path, where none is given. UserError for what is no address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"the reward server's address {url!r} is none; write http://HOST:PORT")
    return url if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}{PATH}"


def _seconds(retry_after: str | None) -> float:
    return min(float(retry_after), LONGEST_PAUSE_S) if retry_after is not None and retry_after.isdigit() else 0.0


class _NoAnswer(Exception):
    """wait_s: that the server asks for."""

    def __init__(self, problem: str, wait_s: float = 0.0):
        super().__init__(problem)
        self.wait_s = wait_s


# -- a term of a recipe


def http_reward(term: RewardTerm) -> HttpReward:
    return HttpReward(term.url, timeout_s=term.timeout_s or 60.0, retries=term.retries, key=os.environ.get(KEY_VARIABLE))


def asked_by_http(term: RewardTerm) -> Asked:
    return Asked(welcome=(LABEL,))


def server_problems(recipe: Recipe, key: str, term: RewardTerm) -> list[str]:
    """Whether one of the servers scores a sample now."""
    scorer = HttpReward(
        term.url, timeout_s=min(term.timeout_s or 60.0, 20.0), retries=len(term.url) - 1, key=os.environ.get(KEY_VARIABLE)
    )
    try:
        scorer.score(["Hello"], [" there."], [True])
    except (RunFailed, UserError) as error:
        return [f"{key}.url: {error}"]
    return []

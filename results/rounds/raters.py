"""Simulated raters of the demo world, who use the page's HTTP interface as a person's browser does.

Each prefers answer a to b with probability sigmoid((v(a) - v(b)) / TEMPERATURE), where v(a) is the true utility of a plus the
rater's bias times the words of a / 10: one with a bias above 0 likes long answers for their length. Where the two are within TIE of
each other the vote is a tie.
"""

from __future__ import annotations

import math
import random
import threading
import time
import uuid
from dataclasses import dataclass

import httpx

from rlhf_ray.data.world import utility

TEMPERATURE = 0.7  # utility points, as of the annotator of the first preferences
TIE = 0.2  # utility points
BIASES = {"ada": 0.0, "ben": 0.0, "cleo": 0.3, "dev": 0.3, "eve": -0.2, "finn": 0.6}  # utility points per ten words; mean 0.17
PATIENCE_S = 600.0  # of a rater, with a server that is busy


@dataclass(frozen=True)
class Taste:
    """What one rater cares about."""

    name: str
    bias: float
    seed: int
    tie: float = TIE

    def choice(self, comparison: str, prompt: str, left: str, right: str) -> str:
        """left, right or tie. The noise follows from seed, rater and comparison."""
        draw = random.Random(f"{self.seed}/{self.name}/{comparison}")
        one, other = (
            value + self.bias * len(text.split()) / 10
            for value, text in zip(utility([prompt, prompt], [left, right]), (left, right), strict=True)
        )
        if abs(one - other) < self.tie:
            return "tie"
        return "left" if draw.random() < 1 / (1 + math.exp((other - one) / TEMPERATURE)) else "right"


def collect(url: str, total: int, seed: int, max_tokens: int, progress, tie: float = TIE) -> None:
    """Until the server's database holds `total` votes. progress(count) is called now and then."""
    over, failures = threading.Event(), []

    def rate(taste: Taste) -> None:
        try:
            with httpx.Client(base_url=url, timeout=300, trust_env=False) as page:
                while not over.is_set():
                    _vote(page, taste, max_tokens)
        except httpx.HTTPError as error:
            failures.append(f"{taste.name}: {type(error).__name__}: {error}")
            over.set()

    raters = [threading.Thread(target=rate, args=(Taste(name, bias, seed, tie),)) for name, bias in BIASES.items()]
    for rater in raters:
        rater.start()
    try:
        with httpx.Client(base_url=url, timeout=300, trust_env=False) as page:
            while not over.is_set() and (count := page.get("/page/results").raise_for_status().json()["votes"]) < total:
                progress(count)
                over.wait(2)
    finally:
        over.set()
        for rater in raters:
            rater.join()
    if failures:
        raise SystemExit(f"a rater could not vote: {failures[0]}")


def _vote(page: httpx.Client, taste: Taste, max_tokens: int) -> None:
    shown = _sent(page, "/page/comparisons", {"rater": taste.name, "max_tokens": max_tokens})
    prompt = shown["prompt"] if isinstance(shown["prompt"], str) else shown["prompt"][-1]["content"]
    choice = taste.choice(shown["comparison"], prompt, shown["left"]["text"], shown["right"]["text"])
    key = uuid.uuid4().hex
    _sent(page, "/page/votes", {"rater": taste.name, "comparison": shown["comparison"], "key": key, "choice": choice})


def _sent(page: httpx.Client, path: str, body: dict) -> dict:
    """The same request again where the server is busy or starting a replica."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        answer = page.post(path, json=body)
        if answer.status_code in (429, 503) and time.monotonic() < deadline:
            time.sleep(float(answer.headers.get("Retry-After", 1)))
            continue
        return answer.raise_for_status().json()

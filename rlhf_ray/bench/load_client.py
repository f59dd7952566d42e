"""Clients that ask a server without end, as OpenAI's library does, and what became of each request.

The library sends a request again, twice at most, for the statuses 408, 409, 429 and 500 and more, and where the connection ends
before the whole answer is there; it waits half a second, twice as long the second time, or what Retry-After says. A stream that
has begun is never sent again.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from rlhf_ray.bench.served_process import NAME

MAX_RETRIES = 2
_LONGEST_RETRY_AFTER_S = 60.0
_WORDS = re.compile(r"t(\d+)")


@dataclass(slots=True)
class LoadRequest:
    """One request. Times in seconds."""

    streams: bool
    seconds: float = 0.0
    """To the end of its answer, with all that was sent again and waited for."""
    tries: list[str] = field(default_factory=list)
    """What ended each but the last: a status, or what the connection did."""
    failed: str | None = None
    """What ended the last; None: it was answered."""
    versions: set[str] = field(default_factory=set)
    """That the answer names: in its header and in its body."""
    words: list[int] = field(default_factory=list)
    """Numbers of the tokens that it holds."""
    tokens: int = 0


def is_retried(status: int) -> bool:
    """Whether OpenAI's library sends a request again that was answered with this status."""
    return status in (408, 409, 429) or status >= 500


async def load(
    url: str, prompts: Sequence[Sequence[int]], *, clients: int, response: int, until: Callable[[], bool]
) -> list[LoadRequest]:
    """Each client sends its next request when the last one is answered, until `until`; every other one streams."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as http:
        found: list[LoadRequest] = []

        async def client(number: int) -> None:
            draws = random.Random(number)
            while not until():
                body = {
                    "model": NAME, "prompt": prompts[draws.randrange(len(prompts))], "max_tokens": response,
                    "temperature": 1.0, "seed": draws.getrandbits(31), "stream": number % 2 == 1,
                }  # fmt: skip
                found.append(await ask(http, body, draws))

        await asyncio.gather(*(client(number) for number in range(clients)))
    return found


async def ask(http: httpx.AsyncClient, body: dict, draws: random.Random) -> LoadRequest:
    """One request to its end, as the library would have it."""
    asked = LoadRequest(streams=body["stream"])
    started = time.perf_counter()
    while True:
        wait_s = 0.5 * 2 ** len(asked.tries) * (1 - 0.25 * draws.random())
        status, told = await _once(http, body, asked)
        if status is None:
            break
        retried = told.get("retried", True) and len(asked.tries) < MAX_RETRIES
        if not retried:
            asked.failed = status
            break
        asked.tries.append(status)
        await asyncio.sleep(told.get("after", wait_s))
    asked.seconds = time.perf_counter() - started
    return asked


async def _once(http: httpx.AsyncClient, body: dict, asked: LoadRequest) -> tuple[str | None, dict]:
    """-> what went wrong, None for nothing; and whether it is sent again, and after how long."""
    begun = False
    try:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                told: dict = {"retried": is_retried(answer.status_code)}
                after = answer.headers.get("retry-after", "")
                if after.isdigit() and 0 < int(after) <= _LONGEST_RETRY_AFTER_S:
                    told["after"] = float(after)
                return str(answer.status_code), told
            asked.versions, asked.words, asked.tokens = set(), [], 0
            if "x-model-version" in answer.headers:
                asked.versions.add(answer.headers["x-model-version"])
            if not asked.streams:
                _note(json.loads(await answer.aread()), asked)
                return None, {}
            begun = True
            return await _stream(answer, asked), {"retried": False}
    except httpx.HTTPError as error:
        return ("cut off in a stream" if begun else type(error).__name__), {"retried": not begun}


async def _stream(answer: httpx.Response, asked: LoadRequest) -> str | None:
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            return None
        if line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                return "error in a stream"
            _note(chunk, asked)
    return "cut off in a stream"


def _note(body: dict, asked: LoadRequest) -> None:
    if body.get("system_fingerprint"):
        asked.versions.add(body["system_fingerprint"])
    for choice in body["choices"]:
        asked.words += [int(number) for number in _WORDS.findall(choice["text"])]
    asked.tokens = len(asked.words)


def failures(found: Sequence[LoadRequest]) -> Counter[str]:
    return Counter(asked.failed for asked in found if asked.failed is not None)


def retries(found: Sequence[LoadRequest]) -> Counter[str]:
    return Counter(status for asked in found for status in asked.tries)

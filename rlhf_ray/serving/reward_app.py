"""A reward model behind HTTP: POST /get_reward as OpenRLHF's reward server takes it, /health, /stats. No Ray.

    {"query": [prompt + response, ...], "prompts": [...], "labels": [...]}  ->  {"rewards": [...]}
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse

from rlhf_ray.errors import NotFinite
from rlhf_ray.models.control_tokens import marker
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.rewards.http_reward import PATH
from rlhf_ray.rewards.scorer import Scorer
from rlhf_ray.serving.api_errors import ApiError, bad_request, install_error_handlers
from rlhf_ray.serving.config import Limits
from rlhf_ray.serving.request_bodies import parse
from rlhf_ray.serving.request_parts import Several

PATHS = (PATH, "/health", "/stats", "/version", "/openapi.json")


class RewardRequest(BaseModel):
    """Fields of other versions of the protocol are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore")

    query: Several[str]
    """Prompt and response as one text each."""
    prompts: Several[str] | None = None
    """Where each query's response begins; without them a query is scored as one text."""
    labels: list[Any] | None = None
    """Not read by a reward model."""
    ended: Several[bool] | None = None
    """Whether each response ended by itself; without it all did, as OpenRLHF's server has it."""


@dataclass(slots=True)
class RewardStats:
    requests: int = 0
    samples: int = 0
    waiting: int = 0


class RewardRunner:
    """Scores one request after the other, in a thread of its own. At most `max_waiting` samples wait."""

    def __init__(self, scorer: Scorer, tokenizer_folder: str, limits: Limits, trust_remote_code: bool = False):
        self.scorer, self.limits = scorer, limits
        self.tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code)
        self._mark = marker(self.tokenizer, of_replies=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-model")
        self.stats = RewardStats()

    async def rewards(self, body: RewardRequest) -> list[float]:
        """[B]. ApiError where too many wait."""
        count = len(body.query)
        most = self.limits.max_rows + self.limits.max_waiting_rows
        if self.stats.waiting and self.stats.waiting + count > most:
            raise ApiError(
                429, f"The server is overloaded: {self.stats.waiting} samples wait. Please retry shortly.",
                code="rate_limit_exceeded", headers={"Retry-After": "1"},
            )  # fmt: skip
        self.stats.waiting += count
        try:
            work = self._thread.submit(self._score, body)
            scores = await asyncio.wrap_future(work)
        finally:
            self.stats.waiting -= count
        self.stats.requests += 1
        self.stats.samples += count
        return scores

    def _score(self, body: RewardRequest) -> list[float]:
        prompts, responses = zip(*map(self._parts, body.query, body.prompts or [""] * len(body.query)), strict=True)
        ended = body.ended or [True] * len(body.query)
        return [float(score) for score in self.scorer.score(prompts, [self._mark(text) for text in responses], ended).total]

    def _parts(self, query: str, prompt: str) -> tuple[str, str]:
        """(prompt, response), without the closing and padding tokens that OpenRLHF leaves in its queries."""
        prompt = prompt if query.startswith(prompt) else ""
        response = query[len(prompt) :]
        names = [str(name) for name in (self.tokenizer.pad_token, self.tokenizer.eos_token) if name]
        while ended := next((name for name in names if response.endswith(name)), None):
            response = response.removesuffix(ended)
        return prompt, response


def build_reward_routes(runner: RewardRunner, name: str) -> FastAPI:
    """The app for a caller that has checked key, host and size."""
    app = FastAPI(
        title="rlhf_ray", description=f"The reward model {name}, by OpenRLHF's protocol.", version=version("rlhf_ray"),
        docs_url=None, redoc_url=None, openapi_url="/openapi.json", redirect_slashes=False,
    )  # fmt: skip
    install_error_handlers(app, PATHS)
    schema = {"content": {"application/json": {"schema": RewardRequest.model_json_schema()}}, "required": True}

    @app.exception_handler(NotFinite)
    async def not_finite(request: Request, error: NotFinite) -> JSONResponse:
        return ApiError(500, f"The reward model's score is not finite: {error}", code="not_finite").response()

    @app.post(PATH, openapi_extra={"requestBody": schema})
    async def get_reward(request: Request) -> JSONResponse:
        started = time.perf_counter()
        body = parse(RewardRequest, request.headers.get("content-type", ""), await request.body())
        _check(body, runner.limits)
        scores = await runner.rewards(body) if body.query else []
        seconds = time.perf_counter() - started
        return JSONResponse({"rewards": scores}, headers={"Server-Timing": f"score;dur={1000 * seconds:.1f}"})

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/version")
    async def package_version() -> dict[str, str]:
        return {"version": version("rlhf_ray")}

    return app


def _check(body: RewardRequest, limits: Limits) -> None:
    for name, values in (("prompts", body.prompts), ("labels", body.labels), ("ended", body.ended)):
        if values is not None and len(values) != len(body.query):
            raise bad_request(f"{name} has {len(values)} entries and query {len(body.query)}.", param=name)
    most = limits.max_rows + limits.max_waiting_rows
    if len(body.query) > most:
        raise bad_request(f"query has {len(body.query)} entries; this server takes at most {most} at once.", param="query")

"""The HTTP app over one engine: /v1/models, /v1/completions, /v1/chat/completions like OpenAI's, /health, /stats. No Ray."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from rlhf_ray.config.sampling_params import TokenRules
from rlhf_ray.errors import UserError
from rlhf_ray.serving.answered import TEXTS, USAGE
from rlhf_ray.serving.api_errors import ApiError, bad_request, error_body, install_error_handlers
from rlhf_ray.serving.config import AppConfig
from rlhf_ray.serving.critic_values import VALUES, CriticRunner, ValuesRequest, body_of, no_critic
from rlhf_ray.serving.guard import guarded
from rlhf_ray.serving.handover import Begun, Journal, handover_of
from rlhf_ray.serving.openapi import BODIES, describe_bodies
from rlhf_ray.serving.progress import Writer, finish, stream_of
from rlhf_ray.serving.prompts import PLAIN_CHAT_STOPS, PromptReader
from rlhf_ray.serving.request_bodies import ChatRequest, CompletionRequest, GenerationRequest, parse
from rlhf_ray.serving.response_text import ResponseText, TokenText, prompt_tokens
from rlhf_ray.serving.responses import ChatWriter, Choice, CompletionWriter, Echo, usage, with_token_ids
from rlhf_ray.serving.runner import EngineFailed, EngineRunner, Overloaded, RowRequest
from rlhf_ray.serving.streaming import ClientLeft, EventStream, while_connected

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens in /v1/completions; chat has none
PATHS = ("/v1/completions", "/v1/chat/completions", VALUES, "/v1/models", "/health", "/stats", "/version", "/openapi.json")

Body = TypeVar("Body", bound=GenerationRequest)


def build_app(runner: EngineRunner, reader: PromptReader, config: AppConfig) -> ASGIApp:
    """The app behind its guard. `runner` draws responses, `reader` turns requests into token ids. Both use the same model."""
    return guarded(build_routes(runner, reader, config), config)


def build_routes(
    runner: EngineRunner, reader: PromptReader, config: AppConfig, critic: CriticRunner | None = None
) -> FastAPI:
    """The app for a caller that has checked key, host and size: no guard. critic: of the run that the model is of."""
    app = FastAPI(
        title="rlhf_ray", description="OpenAI's completions and chat over one model.", version=version("rlhf_ray"),
        docs_url=None, redoc_url=None, openapi_url="/openapi.json", redirect_slashes=False,
    )  # fmt: skip
    install_error_handlers(app, PATHS)
    describe_bodies(app, BODIES | {VALUES: ValuesRequest}, streams=BODIES)

    @app.exception_handler(EngineFailed)
    async def engine_failed(request: Request, error: EngineFailed) -> JSONResponse:
        body = error_body(503, f"The server can't answer now: {error}.", code="unavailable")
        return JSONResponse(body, status_code=503, headers={"Retry-After": "5"})

    endpoints = _Endpoints(runner, reader, config, critic)
    app.get("/health")(endpoints.health)
    app.get("/stats")(endpoints.stats)
    app.get("/version")(endpoints.version)
    app.get("/v1/models")(endpoints.models)
    app.get("/v1/models/{model_id:path}")(endpoints.model)
    app.post("/v1/completions")(endpoints.completions)
    app.post("/v1/chat/completions")(endpoints.chat)
    app.post(VALUES)(endpoints.values)
    return app


class _Endpoints:
    """One method per route, then the steps that completions and chat share."""

    def __init__(self, runner: EngineRunner, reader: PromptReader, config: AppConfig, critic: CriticRunner | None):
        self.runner, self.reader, self.config, self.critic = runner, reader, config, critic
        self.names = (config.name, *config.others)
        self.card = {
            "id": config.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "rlhf_ray",
            "max_model_len": reader.positions,
            "chat_template": not reader.chat_is_plain,
        }

    async def health(self) -> JSONResponse:
        if self.runner.healthy:
            return JSONResponse({"status": "ok"})
        return JSONResponse(error_body(503, "The generation engine has failed."), status_code=503)

    async def stats(self) -> dict[str, Any]:
        """Counters since the start, and what is in the batch now: sums over the replicas, with each one's own in `replicas`."""
        return asdict(self.runner.stats())

    async def version(self) -> dict[str, str]:
        return {"version": version("rlhf_ray")}

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self.card]}

    async def model(self, model_id: str) -> dict[str, Any]:
        self._check_model(model_id)
        return self.card

    async def completions(self, request: Request) -> Response:
        body = await self._read(request, CompletionRequest)
        # Encoding a long prompt takes a while. In a thread it does not block the other requests.
        prompts = await asyncio.to_thread(self.reader.completion, body)
        self._check_count(len(prompts) * body.choices)
        echoes = await self._echoes(request, body, prompts) if body.echo else None
        fixed = handover_of(request.scope).fixed
        writer = CompletionWriter(
            self.config.name, fixed, alternatives=body.alternatives, echoes=echoes, version=self.config.version
        )
        if body.token_limit == 0:
            return await self._answer(request, body, prompts, [], writer)
        rows = self._rows(body, prompts, DEFAULT_COMPLETION_TOKENS, self.reader.stops, fixed.seed)
        return await self._answer(request, body, prompts, rows, writer)

    async def _echoes(self, request: Request, body: CompletionRequest, prompts: list[list[int]]) -> list[Echo]:
        """Each choice's prompt as text, and as tokens with their log-probs if these are asked for."""
        texts = [given if isinstance(given, str) else self.reader.text(given) for given in body.prompts]
        tokens: list[list[TokenText]] = [[] for _ in prompts]
        if body.alternatives is not None:
            with _refusals():
                scores = await while_connected(request.receive, self.runner.score(prompts, body.alternatives))
            tokens = [
                prompt_tokens(self.reader.tokenizer, prompt_ids, found)
                for prompt_ids, found in zip(prompts, scores, strict=True)
            ]
        echoes = [Echo(text, found) for text, found in zip(texts, tokens, strict=True)]
        return [echo for echo in echoes for _ in range(body.choices)]

    async def chat(self, request: Request) -> Response:
        body = await self._read(request, ChatRequest)
        prompts = await asyncio.to_thread(self.reader.chat, body)
        self._check_count(body.choices)
        fixed, logprobs = handover_of(request.scope).fixed, body.alternatives is not None
        writer = ChatWriter(self.config.name, fixed, logprobs=logprobs, version=self.config.version)
        plain = self.reader.chat_is_plain
        rows = self._rows(body, prompts, None, (*self.reader.stops, *(PLAIN_CHAT_STOPS if plain else ())), fixed.seed)
        return await self._answer(request, body, prompts, rows, writer, drop_first_space=plain)

    async def values(self, request: Request) -> dict[str, Any]:
        """After each token of a text: the reward of the whole that the critic of the served run expects."""
        body = parse(ValuesRequest, request.headers.get("content-type", ""), await request.body())
        self._check_model(body.model)
        if self.critic is None:
            raise no_critic()
        found, step = await while_connected(request.receive, self.critic.values(body.prompt))
        return body_of(self.config.name, found, step)

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        """The parsed body of a request, for this model and within this server's limits."""
        body = parse(kind, request.headers.get("content-type", ""), await request.body())
        self._check_model(body.model)
        most = self.config.limits.max_n
        if body.choices > most:
            raise bad_request(f"n is {body.choices}; this server allows at most {most}.", param="n")
        if body.json_schema is not None:
            try:
                await asyncio.to_thread(self.runner.engine.check_schema, body.json_schema)
            except UserError as error:
                raise bad_request(str(error), param="response_format", code="invalid_value") from None
        return body

    def _check_model(self, model_id: str) -> None:
        if model_id != self.config.name:
            raise ApiError(
                404,
                f"The model '{model_id}' does not exist; this server has {', '.join(map(repr, self.names))}.",
                code="model_not_found",
                param="model",
            )

    def _rows(
        self,
        body: GenerationRequest,
        prompts: list[list[int]],
        default_tokens: int | None,
        stops: tuple[str, ...],
        own_seed: int,
    ) -> list[RowRequest]:
        """The responses to draw: `body.choices` for each prompt, each with a seed of its own (of own_seed if the body has none)."""
        rows: list[RowRequest] = []
        self.reader.check_ids(body)
        rules = body.rules()
        seed = own_seed if body.seed is None else body.seed
        for prompt_ids in prompts:
            longest = self.reader.max_new_tokens(prompt_ids, body.token_limit, default_tokens)
            if rules is not None and rules.min_tokens > longest:
                raise bad_request(
                    f"min_tokens is {rules.min_tokens}; this response can have at most {longest}.",
                    param="min_tokens", code="invalid_value",
                )  # fmt: skip
            params = body.sampling(longest, stops)
            rows += [
                RowRequest(prompt_ids=prompt_ids, seed=choice_seed(seed, place), params=params, rules=rules)
                for place in range(body.choices)
            ]
        return rows

    async def _answer(
        self,
        request: Request,
        body: GenerationRequest,
        prompts: list[list[int]],
        rows: list[RowRequest],
        writer: Writer,
        drop_first_space: bool = False,
    ) -> Response:
        """Draw the rows and write them as OpenAI does: one body, or a stream of chunks."""
        choices = [self._choice(row, body, drop_first_space) for row in rows]
        if not rows:  # nothing but the echo is asked for
            texts = [ResponseText(self.reader.tokenizer, [], ()) for _ in range(len(prompts) * body.choices)]
            choices = [Choice(text, finish_reason="length") for text in texts]
        handover = handover_of(request.scope)
        begun = Begun(handover.begun)
        for index, tokens in begun.drawn.items():
            choices[index].go_on_after(tokens)
        there = [(row, choice) for row, choice in zip(rows, choices, strict=False) if choice.finish_reason is None]
        left = [replace(row, begun=tuple(choice.token_ids)) for row, choice in there]
        with _refusals():
            ticket = self.runner.submit(left, streams=bool(body.stream))
        if body.stream:
            journal = Journal(logprobs=body.alternatives is not None)
            if rows and self.runner.continues:
                handover.journal = journal
            chunks = stream_of(body, prompts, choices, ticket, writer, journal, begun)
            return EventStream(self._told(chunks, request, prompts, choices, rows), ticket.cancel)
        with _refusals():
            await while_connected(request.receive, finish(choices, ticket))
        pieces = [(*choice.take(), choice.finish_reason) for choice in choices]
        self._tell(request, prompts, choices, rows)
        whole = writer.whole(pieces, usage(prompts, choices))
        return JSONResponse(with_token_ids(whole, prompts, choices) if body.return_token_ids else whole)

    async def _told(
        self,
        chunks: AsyncGenerator[Any],
        request: Request,
        prompts: list[list[int]],
        choices: list[Choice],
        rows: list[RowRequest],
    ) -> AsyncGenerator[Any]:
        """The chunks; after the last one, or the last one that was read, the front is told of the answer."""
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()
            self._tell(request, prompts, choices, rows)

    def _tell(self, request: Request, prompts: list[list[int]], choices: list[Choice], rows: list[RowRequest]) -> None:
        told = request.scope.setdefault("state", {})
        told[USAGE] = usage(prompts, choices)
        if self.config.keep_texts:
            asked = [self.reader.text(row.prompt_ids) for row in rows]
            told[TEXTS] = [[prompt, choice.text.text] for prompt, choice in zip(asked, choices, strict=False)]

    def _choice(self, row: RowRequest, body: GenerationRequest, drop_first_space: bool) -> Choice:
        rules = row.rules or TokenRules()
        text = ResponseText(
            self.reader.tokenizer, row.prompt_ids, row.params.stop,
            min_tokens=rules.min_tokens, drop_first_space=drop_first_space,
            tells_tokens=body.alternatives is not None, in_pieces=bool(body.stream),
        )  # fmt: skip
        return Choice(text, rules.stop_token_ids)

    def _check_count(self, rows: int) -> None:
        most = self.runner.max_rows + self.runner.max_waiting_rows
        if rows > most:
            raise bad_request(f"The request asks for {rows} responses; this server takes at most {most}.", param="n")


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What the runner refuses, as the answers that a client gets."""
    try:
        yield
    except Overloaded as error:
        raise ApiError(
            429,
            f"The server is overloaded: {error}. Please retry shortly.",
            code="rate_limit_exceeded",
            headers={"Retry-After": "1"},
        ) from None
    except UserError as error:
        raise bad_request(str(error)) from None
    except ClientLeft:
        raise ApiError(499, "The client has left.") from None  # nobody reads it


def choice_seed(seed: int, place: int) -> int:
    """The seed of a prompt's place-th choice: the same alone, in a list of prompts and with a larger n."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest()) >> 1

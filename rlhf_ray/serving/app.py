"""The HTTP app over one engine: /v1/models, /v1/completions and /v1/chat/completions like OpenAI's, and /health. No Ray."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from rlhf_ray.errors import UserError
from rlhf_ray.serving.api_errors import ApiError, bad_request, error_body, install_error_handlers
from rlhf_ray.serving.config import AppConfig
from rlhf_ray.serving.gate import Gate
from rlhf_ray.serving.prompts import PLAIN_CHAT_STOPS, PromptReader
from rlhf_ray.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest, parse
from rlhf_ray.serving.responses import ChatWriter, Choice, CompletionWriter, usage
from rlhf_ray.serving.runner import EngineFailed, EngineRunner, Overloaded, RowRequest, Ticket
from rlhf_ray.serving.streaming import ClientLeft, EventStream, while_connected
from rlhf_ray.serving.text import ResponseText

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens in /v1/completions; chat has none

Writer = CompletionWriter | ChatWriter
Body = TypeVar("Body", bound=GenerationRequest)


def build_app(runner: EngineRunner, reader: PromptReader, config: AppConfig) -> FastAPI:
    """The app. `runner` draws responses, `reader` turns requests into token ids. Both use the same model."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, api_key=config.api_key, max_body_bytes=config.limits.max_body_bytes)
    install_error_handlers(app)

    @app.exception_handler(EngineFailed)
    async def engine_failed(request: Request, error: EngineFailed) -> JSONResponse:
        return JSONResponse(error_body(503, f"The server can't answer now: {error}."), status_code=503)

    endpoints = _Endpoints(runner, reader, config)
    app.get("/health")(endpoints.health)
    app.get("/stats")(endpoints.stats)
    app.get("/v1/models")(endpoints.models)
    app.get("/v1/models/{model_id:path}")(endpoints.model)
    app.post("/v1/completions")(endpoints.completions)
    app.post("/v1/chat/completions")(endpoints.chat)
    return app


class _Endpoints:
    """One method per route, then the steps that completions and chat share."""

    def __init__(self, runner: EngineRunner, reader: PromptReader, config: AppConfig):
        self.runner, self.reader, self.config = runner, reader, config
        self.card = {
            "id": config.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "rlhf_ray",
            "max_model_len": reader.positions,
        }

    async def health(self) -> JSONResponse:
        if self.runner.healthy:
            return JSONResponse({"status": "ok"})
        return JSONResponse(error_body(503, "The generation engine has failed."), status_code=503)

    async def stats(self) -> dict[str, int]:
        return asdict(self.runner.stats())

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self.card]}

    async def model(self, model_id: str) -> dict[str, Any]:
        self._check_model(model_id)
        return self.card

    async def completions(self, request: Request) -> Response:
        body = await self._read(request, CompletionRequest)
        # Encoding a long prompt takes a while. In a thread it does not block the other requests.
        prompts = await asyncio.to_thread(self.reader.completion, body)
        echoes = None
        if body.echo:
            texts = [given if isinstance(given, str) else self.reader.text(given) for given in body.prompts]
            echoes = [text for text in texts for _ in range(body.choices)]
        writer = CompletionWriter(self.config.name, logprobs=body.wants_logprobs, echoes=echoes)
        rows = self._rows(body, prompts, DEFAULT_COMPLETION_TOKENS, self.reader.stops)
        return await self._answer(request, body, prompts, rows, writer)

    async def chat(self, request: Request) -> Response:
        body = await self._read(request, ChatRequest)
        prompts = await asyncio.to_thread(self.reader.chat, body)
        writer = ChatWriter(self.config.name, logprobs=body.wants_logprobs)
        plain = self.reader.chat_is_plain
        rows = self._rows(body, prompts, None, (*self.reader.stops, *(PLAIN_CHAT_STOPS if plain else ())))
        return await self._answer(request, body, prompts, rows, writer, drop_first_space=plain)

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        """The parsed body of a request, for this model and within this server's limits."""
        body = parse(kind, request.headers.get("content-type", ""), await request.body())
        self._check_model(body.model)
        most = self.config.limits.max_n
        if body.choices > most:
            raise bad_request(f"n is {body.choices}; this server allows at most {most}.", param="n")
        return body

    def _check_model(self, model_id: str) -> None:
        if model_id != self.config.name:
            raise ApiError(
                404,
                f"The model '{model_id}' does not exist; this server has '{self.config.name}'.",
                code="model_not_found",
                param="model",
            )

    def _rows(
        self,
        body: GenerationRequest,
        prompts: list[list[int]],
        default_tokens: int | None,
        stops: tuple[str, ...],
    ) -> list[RowRequest]:
        """The responses to draw: `body.choices` for each prompt, each with a seed of its own."""
        rows: list[RowRequest] = []
        seed = secrets.randbits(63) if body.seed is None else body.seed
        for prompt_ids in prompts:
            longest = self.reader.max_new_tokens(prompt_ids, body.token_limit, default_tokens)
            params = body.sampling(longest, stops)
            rows += [
                RowRequest(prompt_ids=prompt_ids, seed=choice_seed(seed, place), params=params)
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
        choices = [
            Choice(
                ResponseText(
                    self.reader.tokenizer, row.prompt_ids, row.params.stop, drop_first_space=drop_first_space
                )
            )
            for row in rows
        ]
        ticket = self._submit(rows)
        if body.stream:
            return EventStream(_stream(body, prompts, choices, ticket, writer), ticket.cancel)
        try:
            await while_connected(request.receive, _finish(choices, ticket))
        except ClientLeft:
            return Response(status_code=499)  # nobody reads it
        except UserError as error:
            raise bad_request(str(error)) from None
        pieces = [(*choice.take(), choice.finish_reason) for choice in choices]
        return JSONResponse(writer.whole(pieces, usage(prompts, choices)))

    def _submit(self, rows: list[RowRequest]) -> Ticket:
        most = self.runner.max_rows + self.runner.max_waiting_rows
        if len(rows) > most:
            raise bad_request(
                f"The request asks for {len(rows)} responses; this server takes at most {most}.", param="n"
            )
        try:
            return self.runner.submit(rows)
        except Overloaded as error:
            raise ApiError(
                429,
                f"The server is overloaded: {error}. Please retry shortly.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            ) from None


async def _stream(
    body: GenerationRequest, prompts: list[list[int]], choices: list[Choice], ticket: Ticket, writer: Writer
) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of a streamed answer. With include_usage every chunk has the field. It is null in all but the last."""
    extra: dict[str, Any] = {"usage": None} if body.include_usage else {}
    for index in range(len(choices)):
        opening = writer.opening(index)
        if opening is not None:
            yield opening | extra
    async for touched in _progress(choices, ticket):
        for index in touched:
            text, tokens = choices[index].take()
            if text or tokens or choices[index].finish_reason is not None:
                yield writer.piece(index, text, tokens, choices[index].finish_reason) | extra
    if body.include_usage:
        yield writer.last(usage(prompts, choices))


async def _finish(choices: list[Choice], ticket: Ticket) -> None:
    async for _ in _progress(choices, ticket):
        pass


async def _progress(choices: list[Choice], ticket: Ticket) -> AsyncIterator[list[int]]:
    """Feed tokens to the choices as they come. Yields the indices of the choices that changed. Cancels the rest at the end."""
    try:
        while events := await ticket.events():
            changed: dict[int, bool] = {}
            for index, event in events:
                if choices[index].finish_reason is None:
                    choices[index].push(event)
                    changed[index] = True
                    if choices[index].finish_reason is not None:
                        ticket.cancel(index)  # its text holds a stop string that the engine has not seen
            yield list(changed)
    finally:
        ticket.cancel()


def choice_seed(seed: int, place: int) -> int:
    """The seed of a prompt's place-th choice: the same alone, in a list of prompts and with a larger n."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest()) >> 1

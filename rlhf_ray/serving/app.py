"""The HTTP app over one engine: /v1/models, /v1/completions, /v1/chat/completions as OpenAI's, /health. No Ray here."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import asdict

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


def build_app(runner: EngineRunner, reader: PromptReader, settings: AppConfig) -> FastAPI:
    """The app. `runner` draws, `reader` turns requests into token ids, and both have the same model."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, api_key=settings.api_key, max_body_bytes=settings.limits.max_body_bytes)
    install_error_handlers(app)

    @app.exception_handler(EngineFailed)
    async def engine_failed(request: Request, error: EngineFailed) -> JSONResponse:
        return JSONResponse(error_body(503, f"The server can't answer now: {error}."), status_code=503)

    card = {
        "id": settings.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "rlhf_ray",
        "max_model_len": reader.positions,
    }

    @app.get("/health")
    async def health() -> JSONResponse:
        if runner.healthy:
            return JSONResponse({"status": "ok"})
        return JSONResponse(error_body(503, "The generation engine has failed."), status_code=503)

    @app.get("/stats")
    async def stats() -> dict:
        return asdict(runner.stats())

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict:
        _check_model(model_id)
        return card

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await _read(request, CompletionRequest)
        # Encoding a long prompt takes a while, and other requests are being answered.
        prompts = await asyncio.to_thread(reader.completion, body)
        echoes = None
        if body.echo:
            texts = [given if isinstance(given, str) else reader.text(given) for given in body.prompts]
            echoes = [text for text in texts for _ in range(body.choices)]
        writer = CompletionWriter(settings.name, logprobs=body.wants_logprobs, echoes=echoes)
        return await _answer(request, body, prompts, writer, DEFAULT_COMPLETION_TOKENS)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await _read(request, ChatRequest)
        prompts = await asyncio.to_thread(reader.chat, body)
        writer = ChatWriter(settings.name, logprobs=body.wants_logprobs)
        return await _answer(request, body, prompts, writer, None, plain_chat=reader.chat_is_plain)

    def _check_model(model_id: str) -> None:
        if model_id != settings.name:
            raise ApiError(
                404,
                f"The model '{model_id}' does not exist; this server has '{settings.name}'.",
                code="model_not_found",
                param="model",
            )

    async def _read(request: Request, kind: type[GenerationRequest]) -> GenerationRequest:
        body = parse(kind, request.headers.get("content-type", ""), await request.body())
        _check_model(body.model)
        if body.choices > settings.limits.max_n:
            raise bad_request(f"n is {body.choices}; this server allows at most {settings.limits.max_n}.", param="n")
        return body

    async def _answer(
        request: Request,
        body: GenerationRequest,
        prompts: list[list[int]],
        writer: Writer,
        default_tokens: int | None,
        plain_chat: bool = False,
    ) -> Response:
        rows = []
        seed = secrets.randbits(63) if body.seed is None else body.seed
        for prompt_ids in prompts:
            longest = reader.max_new_tokens(prompt_ids, body.token_limit, default_tokens)
            params = body.sampling(longest, (*reader.stops, *(PLAIN_CHAT_STOPS if plain_chat else ())))
            rows += [
                RowRequest(prompt_ids=prompt_ids, seed=choice_seed(seed, place), params=params)
                for place in range(body.choices)
            ]
        choices = [
            Choice(ResponseText(reader.tokenizer, row.prompt_ids, row.params.stop, drop_first_space=plain_chat))
            for row in rows
        ]
        ticket = _submit(rows)
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

    def _submit(rows: list[RowRequest]) -> Ticket:
        most = runner.max_rows + runner.max_waiting_rows
        if len(rows) > most:
            raise bad_request(
                f"The request asks for {len(rows)} responses; this server takes at most {most}.", param="n"
            )
        try:
            return runner.submit(rows)
        except Overloaded as error:
            raise ApiError(
                429,
                f"The server is overloaded: {error}. Please retry shortly.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            ) from None

    return app


async def _stream(
    body: GenerationRequest, prompts: list[list[int]], choices: list[Choice], ticket: Ticket, writer: Writer
) -> AsyncIterator[dict]:
    """The chunks of a streamed answer. With include_usage every chunk has the field, null in all but the last."""
    extra = {"usage": None} if body.include_usage else {}
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
    """Feed tokens to the choices as they come; yields which have changed. Cancels the rest at the end."""
    try:
        while events := await ticket.events():
            changed = {}
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

"""The app in front of the replicas: it chooses one for each request, passes its answer on, and says what has become of them.

It holds no model. /health and the refusals never wait for a replica.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Sequence
from typing import Any, Protocol

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from rlhf_ray.serving.api_errors import ApiError, error_body
from rlhf_ray.serving.relay import Piece, Relayed, relayed, send_piece
from rlhf_ray.serving.streaming import ClientLeft, server_sent, while_connected

_EVENT_STREAM = b"text/event-stream"
_STATS_WAIT_S = 5.0


class ReplicaLost(Exception):
    """A replica ended, or there is none, before the answer was complete."""


class Link(Protocol):
    """The way to one replica."""

    name: str
    model: str
    """The id of the model that it has."""
    up: bool
    """Whether it is known to run."""
    ongoing: int
    """Requests that are with it."""

    def answer(self, request: Relayed) -> AsyncGenerator[Piece]:
        """Its answer. ReplicaLost where it can't be had, or ends early."""
        ...

    async def stats(self) -> dict[str, int]: ...


class Front:
    """An ASGI app over links to replicas. What `beside` makes runs from its start to its end."""

    def __init__(self, links: Sequence[Link], beside: Callable[[], Coroutine[Any, Any, None]] | None = None):
        self.links, self.beside = links, beside
        self.models = tuple(dict.fromkeys(link.model for link in links))
        self.draining = False
        """Refuse what is new."""
        self.ongoing = 0
        """Requests that are being answered."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            return
        if scope["path"] == "/health" and scope["method"] == "GET":
            await self._health()(scope, receive, send)
        elif scope["path"] == "/stats" and scope["method"] == "GET":
            await JSONResponse(await self._stats())(scope, receive, send)
        elif self.draining:
            await _unavailable("The server is shutting down.", 5).response()(scope, receive, send)
        else:
            self.ongoing += 1
            try:
                await while_connected(receive, self._pass_on(scope, receive, send))
            except (ClientLeft, OSError):
                pass  # nobody reads it
            finally:
                self.ongoing -= 1

    async def _live(self, receive: Receive, send: Send) -> None:
        task = None if self.beside is None else asyncio.ensure_future(self.beside())
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await send({"type": "lifespan.shutdown.complete"})

    def _health(self) -> JSONResponse:
        if self.draining:
            return _unavailable("The server is shutting down.", 5).response()
        running = {link.model for link in self.links if link.up}
        if running == set(self.models):
            return JSONResponse({"status": "ok"})
        down = ", ".join(model for model in self.models if model not in running)
        return _unavailable(f"No replica of the model {down} is running.", 5).response()

    async def _stats(self) -> dict[str, Any]:
        """The sums over the replicas, and each one's own."""
        each = await asyncio.gather(*(self._stats_of(link) for link in self.links))
        found = [one for one in each if one is not None]
        sums = {name: sum(one[name] for one in found) for name in (found[0] if found else ())}
        replicas = [
            {"name": link.name, "model": link.model, "up": one is not None, **(one or {})}
            for link, one in zip(self.links, each, strict=True)
        ]
        return sums | {"replicas": replicas}

    async def _stats_of(self, link: Link) -> dict[str, int] | None:
        if not link.up:
            return None
        try:
            return await asyncio.wait_for(link.stats(), _STATS_WAIT_S)
        except (ReplicaLost, TimeoutError):
            return None

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await relayed(scope, receive)
        if request is None:
            return
        if len(self.models) > 1 and scope["path"] == "/v1/models" and scope["method"] == "GET":
            await JSONResponse(await self._cards(request))(scope, receive, send)
            return
        model = self._model_of(request)
        tried: list[Link] = []
        lost = 0
        error = _unavailable(f"No replica of the model {model} is running.", 5)
        full: list[Piece] = []  # the answer of a replica that is full
        while (link := self._least_busy(model, tried)) is not None:
            tried.append(link)
            try:
                full = await self._pass_to(link, request, send)
            except ReplicaLost:
                error = _unavailable("The replica that had the request has ended.", 1)
                lost += 1
                if lost == 2:  # the request may be what ends them
                    break
            else:
                if not full:
                    return
        if full:
            for piece in full:
                await send_piece(piece, send)
        else:
            await error.response()(scope, receive, send)

    def _model_of(self, request: Relayed) -> str:
        """The model that a request names. Where that is none of ours, the first one's replica says so."""
        if len(self.models) == 1:
            return self.models[0]
        asked: Any = request.scope["path"].removeprefix("/v1/models/")
        if request.body:
            try:
                asked = json.loads(request.body)["model"]
            except (ValueError, LookupError, TypeError, RecursionError):
                asked = None
        return asked if asked in self.models else self.models[0]

    async def _cards(self, request: Relayed) -> dict[str, Any]:
        """What a replica of each model that runs says of it."""
        data: list[Any] = []
        for model in self.models:
            link = self._least_busy(model, ())
            if link is None:
                continue
            try:
                body = b"".join([piece[-2] async for piece in link.answer(request)])
            except ReplicaLost:
                continue
            data += json.loads(body)["data"]
        return {"object": "list", "data": data}

    def _least_busy(self, model: str, tried: Collection[Link]) -> Link | None:
        left = [link for link in self.links if link.up and link.model == model and link not in tried]
        return min(left, key=lambda link: link.ongoing, default=None)

    async def _pass_to(self, link: Link, request: Relayed, send: Send) -> list[Piece]:
        """Pass one replica's answer on -> [], or the whole answer, unsent, if it is that the replica is full.

        ReplicaLost where it ended before anything was sent.
        """
        answer = link.answer(request)
        started, is_stream, more, full = False, False, True, []
        try:
            async for piece in answer:
                if not started and (full or piece[0] == 429):
                    full.append(piece)
                    continue
                if not started:
                    is_stream = any(name == b"content-type" and _EVENT_STREAM in value for name, value in piece[1])
                started, more = True, piece[-1]
                await send_piece(piece, send)
            if not full and more:
                raise ReplicaLost(link.name)
        except ReplicaLost:
            if not started:
                raise
            if not is_stream:
                raise OSError("the replica ended in its answer") from None  # the connection ends with it
            failure = error_body(503, "The replica that was writing the response has ended.", code="unavailable")
            await send_piece([server_sent(failure) + server_sent("[DONE]"), False], send)
        finally:
            await answer.aclose()
        return full


def _unavailable(message: str, retry_after_s: int) -> ApiError:
    return ApiError(
        503, f"{message} Please retry shortly.", code="unavailable", headers={"Retry-After": str(retry_after_s)}
    )

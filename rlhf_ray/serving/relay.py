"""An ASGI answer as pieces that cross processes: the replica's app talks to the front's client through them.

The first piece of an answer is [status, headers, body, more], each later one [body, more]. The last one has what
the app said of the answer behind it (a dict, `told`), which is for the front alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Piece = list[Any]

NOT_HERE = 421
"""Misdirected request: the replica has no such version. It stays between front and replica."""

# What of a request's scope an app reads, and all of it that can cross.
_SCOPE_KEYS = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Relayed:
    """One request."""

    scope: dict[str, Any]
    body: bytes
    model: str = ""
    version: str = ""
    """The one that has to answer; "": the stable one."""


async def relayed(scope: Scope, receive: Receive) -> Relayed | None:
    """The request, whose body the gate has already read; None if the client has left."""
    message = await receive()
    if message["type"] != "http.request":
        return None
    # The key stays here.
    headers = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
    kept = {key: scope[key] for key in _SCOPE_KEYS if key in scope} | {"headers": headers}
    return Relayed(scope=kept, body=message.get("body", b""))


async def pieces(app: ASGIApp, request: Relayed) -> AsyncGenerator[Piece]:
    """The app's answer, all that is ready at a time. Closing the generator cancels the app's work."""
    ready: list[Message] = []
    arrived = asyncio.Event()
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # a client that leaves cancels the whole task instead
        sent = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: Message) -> None:
        ready.append(message)
        arrived.set()

    state: dict[str, Any] = {}
    working = asyncio.ensure_future(app({**request.scope, "state": state}, receive, send))
    working.add_done_callback(lambda _: arrived.set())
    try:
        while True:
            await arrived.wait()
            arrived.clear()
            done = working.done()
            messages, ready[:] = list(ready), []
            piece = _joined(messages)
            if piece is not None and not piece[-1]:
                # Nobody listens behind an answer's end, so what the app says of it has to be there before.
                await asyncio.wait({working})
                piece.append(state)
            if piece is not None:
                yield piece
            if done:
                working.result()
                return
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


def _joined(messages: list[Message]) -> Piece | None:
    """Messages of one answer as one piece."""
    if not messages:
        return None
    bodies = [message for message in messages if message["type"] == "http.response.body"]
    body = b"".join(message.get("body", b"") for message in bodies)
    more = not bodies or bodies[-1].get("more_body", False)
    if messages[0]["type"] == "http.response.start":
        return [messages[0]["status"], [list(pair) for pair in messages[0].get("headers", [])], body, more]
    return [body, more]


def told(piece: Piece) -> tuple[Piece, dict[str, Any]]:
    """The piece, and what the app said of its answer."""
    return (piece[:-1], piece[-1]) if isinstance(piece[-1], dict) else (piece, {})


async def send_piece(piece: Piece, send: Send) -> None:
    if len(piece) == 4:
        status, headers, body, more = piece
        await send({"type": "http.response.start", "status": status, "headers": [tuple(pair) for pair in headers]})
    else:
        body, more = piece
    if body or not more:
        await send({"type": "http.response.body", "body": body, "more_body": more})

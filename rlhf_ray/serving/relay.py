"""An ASGI answer as pieces that cross processes: the replica's app talks to the front's client through them.

The first piece of an answer is [status, headers, body, more], each later one [body, more]. What is for the front alone stands
behind that (a dict, `told`): the journal of a stream, and with the last piece what the app said of the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_ray.serving.answered import FAILED, TEXTS, USAGE
from rlhf_ray.serving.handover import HANDOVER, Fixed, Handover

Piece = list[Any]
Put = Callable[[Piece], None]

NOT_HERE = 421
"""Misdirected request: the replica has no such version. It stays between front and replica."""

JOURNAL = "journal"
"""Said with the pieces of a stream that another replica can go on with, from the first one on (`serving.handover`)."""

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
    fixed: Fixed = field(default_factory=Fixed)
    begun: bytes = b""
    """The journal of a stream that is to be gone on with; b"": from the start."""


async def relayed(scope: Scope, receive: Receive) -> Relayed | None:
    """The request, whose body the gate has already read; None if the client has left."""
    message = await receive()
    if message["type"] != "http.request":
        return None
    # The key stays here.
    headers = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
    kept = {key: scope[key] for key in _SCOPE_KEYS if key in scope} | {"headers": headers}
    return Relayed(scope=kept, body=message.get("body", b""))


async def write_answer(app: ASGIApp, request: Relayed, put: Put) -> None:
    """Hand the app's answer to `put` as it comes. Cancelling this cancels the app's work."""
    asked, handover = False, Handover(request.fixed, request.begun)
    last: Piece | None = None  # nobody listens behind an answer's end, so what the app says of it has to be there before

    async def receive() -> Message:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()  # a client that leaves cancels the whole task instead
        asked = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal last
        if message["type"] == "http.response.start":
            put([message["status"], [list(pair) for pair in message.get("headers", [])], b"", True, *journal()])
        elif message.get("more_body", False):
            put([message.get("body", b""), True, *journal()])
        else:
            last = [message.get("body", b""), False]

    def journal() -> list[dict[str, Any]]:
        return [] if handover.journal is None else [{JOURNAL: handover.journal.take()}]

    state: dict[str, Any] = {HANDOVER: handover}
    await app({**request.scope, "state": state}, receive, send)
    if last is not None:
        put([*last, {name: state[name] for name in (USAGE, FAILED, TEXTS) if name in state}])


def merged(first: Piece, then: Piece) -> Piece:
    """Two pieces of one answer that follow each other."""
    says = any(isinstance(each[-1], dict) for each in (first, then))
    (first, said), (then, said_then) = told(first), told(then)
    both = said | said_then
    if JOURNAL in said and JOURNAL in said_then:
        both[JOURNAL] = said[JOURNAL] + said_then[JOURNAL]
    return [*first[:-2], first[-2] + then[0], then[1], *([both] if says else [])]


def goes_on(piece: Piece) -> bool:
    """Whether more of the answer follows."""
    return told(piece)[0][-1]


def is_opening(piece: Piece) -> bool:
    """Whether it is the first of an answer."""
    return isinstance(piece[0], int)


class Pieces:
    """Those of one answer, from whoever puts them to whoever reads them; what waits together is read as one piece."""

    def __init__(self) -> None:
        self._ready: Piece | None = None
        self._ended = False
        self.begun = False
        self._arrived = asyncio.Event()

    def put(self, piece: Piece) -> None:
        self.begun = True
        self._ready = piece if self._ready is None else merged(self._ready, piece)
        self._arrived.set()

    def end(self) -> None:
        """None comes any more."""
        self._ended = True
        self._arrived.set()

    async def next(self) -> Piece | None:
        """Waits for one; None: it has ended."""
        while self._ready is None:
            if self._ended:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        piece, self._ready = self._ready, None
        return piece


def pieces(app: ASGIApp, request: Relayed) -> AsyncGenerator[Piece]:
    """The app's answer, all that is ready at a time. Closing the generator cancels the app's work."""
    return pieces_of(lambda put: write_answer(app, request, put))


async def pieces_of(writing: Callable[[Put], Coroutine[Any, Any, None]]) -> AsyncGenerator[Piece]:
    """What `writing` puts, all that is ready at a time. Closing the generator cancels it."""
    found = Pieces()
    working = asyncio.ensure_future(writing(found.put))
    working.add_done_callback(lambda _: found.end())
    try:
        while (piece := await found.next()) is not None:
            yield piece
        working.result()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


def told(piece: Piece) -> tuple[Piece, dict[str, Any]]:
    """The piece, and what the app said of its answer."""
    return (piece[:-1], piece[-1]) if isinstance(piece[-1], dict) else (piece, {})


async def send_piece(piece: Piece, send: Send) -> None:
    if is_opening(piece):
        status, headers, body, more = piece
        await send({"type": "http.response.start", "status": status, "headers": [tuple(pair) for pair in headers]})
    else:
        body, more = piece
    if body or not more:
        await send({"type": "http.response.body", "body": body, "more_body": more})

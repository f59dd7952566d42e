"""The way of requests and answers between the front and a replica of the same machine: a Unix socket in msgpack. No Ray.

Serve's handles make an object of each piece of an answer, which costs more than a decode step does. Here what one step gives to
all answers is one write. A frame is [number of the request, what is said of it]: to the replica the request, or None: nobody
reads its answer any more; from the replica the next piece of the answer, or None: it ends here, incomplete.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgpack

from rlhf_ray.serving.handover import Fixed
from rlhf_ray.serving.relay import Piece, Pieces, Put, Relayed, goes_on, merged

logger = logging.getLogger(__name__)

_LARGEST_BYTES = 1 << 30  # of what has come and makes no whole frame yet; the gate has limited the request's body

Answering = Callable[[Relayed, Put], Awaitable[None]]
"""Hands the pieces of a request's answer to a function."""


class WireLost(Exception):
    """The other end is gone, or could not complete the answer."""


class _End(asyncio.Protocol, ABC):
    """What both ends share: frames that are written in one iteration of the event loop go out together."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(max_buffer_size=_LARGEST_BYTES, unicode_errors="surrogatepass")
        self._transport: Any = None
        self._ready: dict[int, Any] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # of asyncio or of uvloop, which share no class

    def data_received(self, data: bytes) -> None:
        self._unpacker.feed(data)
        for number, said in self._unpacker:
            self.said(number, said)

    def say(self, number: int, what: Any) -> None:
        if not self._ready:
            asyncio.get_running_loop().call_soon(self._flush)
        before = self._ready.get(number)
        self._ready[number] = what if before is None or what is None else merged(before, what)

    def _flush(self) -> None:
        packer = msgpack.Packer(unicode_errors="surrogatepass")
        frames = [packer.pack([number, what]) for number, what in self._ready.items()]
        self._ready.clear()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(frames))

    @abstractmethod
    def said(self, number: int, what: Any) -> None:
        """What the other end said of this request."""


class _ReplicaEnd(_End):
    """Of one connection."""

    def __init__(self, answering: Answering):
        super().__init__()
        self._answering = answering
        self._tasks: dict[int, asyncio.Task] = {}

    def said(self, number: int, what: Any) -> None:
        if what is None:
            if number in self._tasks:
                self._tasks.pop(number).cancel()
            return
        scope, body, model, version, fixed, begun = what
        scope["headers"] = [tuple(pair) for pair in scope["headers"]]
        request = Relayed(scope=scope, body=body, model=model, version=version, fixed=Fixed(**fixed), begun=begun)
        self._tasks[number] = asyncio.get_running_loop().create_task(self._answer(number, request))

    async def _answer(self, number: int, request: Relayed) -> None:
        complete = False

        def put(piece: Piece) -> None:
            nonlocal complete
            complete = not goes_on(piece)
            self.say(number, piece)

        try:
            await self._answering(request, put)
        except Exception:  # fault boundary: one request; the front is told that it has no answer
            logger.exception("a request could not be answered")
        finally:
            if not complete and number in self._tasks:
                self.say(number, None)
            self._tasks.pop(number, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()


class Listening:
    """A socket that a replica answers at. None: it has none."""

    def __init__(self, path: str | None, answering: Answering):
        """path: in a folder that only this user can enter."""
        self._path, self._answering = path, answering
        self._server: asyncio.Server | None = None

    async def begin(self) -> None:
        """Safe to call twice. A socket that an earlier process has left there is replaced."""
        if self._path is None or self._server is not None:
            return
        new = Path(f"{self._path}.new")
        new.unlink(missing_ok=True)
        self._server = await asyncio.get_running_loop().create_unix_server(lambda: _ReplicaEnd(self._answering), str(new))
        new.rename(self._path)


class FrontEnd(_End):
    """One connection to a replica, for any number of requests at a time."""

    def __init__(self, on_lost: Callable[[], None]):
        super().__init__()
        self._on_lost = on_lost
        self._numbers = itertools.count()
        self._answers: dict[int, Pieces] = {}

    async def answer(self, request: Relayed) -> AsyncGenerator[Piece]:
        """WireLost where it ends early."""
        if self._transport is None:
            raise WireLost
        number, found = next(self._numbers), Pieces()
        self._answers[number] = found
        self.say(number, [request.scope, request.body, request.model, request.version, asdict(request.fixed), request.begun])
        try:
            more = True
            while more:
                piece = await found.next()
                if piece is None:
                    raise WireLost
                more = goes_on(piece)
                yield piece
        finally:
            if self._answers.pop(number, None) is not None and self._transport is not None and more:
                self.say(number, None)

    def said(self, number: int, what: Any) -> None:
        found = self._answers.get(number)
        if found is None:
            return  # its reader has left
        if what is None:
            self._answers.pop(number)
            found.end()
        else:
            found.put(what)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for found in self._answers.values():
            found.end()
        self._answers.clear()
        self._on_lost()

    def end_unanswered(self) -> None:
        """What has had no piece yet is lost; the others go on."""
        for number, found in list(self._answers.items()):
            if not found.begun:
                del self._answers[number]
                found.end()


async def connect(path: str, on_lost: Callable[[], None]) -> FrontEnd | None:
    """None: nobody listens there."""
    with contextlib.suppress(OSError):
        _, end = await asyncio.get_running_loop().create_unix_connection(lambda: FrontEnd(on_lost), path)
        return end
    return None

"""One request's way to its answer: replicas are asked in turn, and where one ends with the request in hand, another takes it over.

A whole answer goes to the client when all of it is there; so what a lost replica had of it is asked for again, with the same seed.
A stream goes out as it comes, and the front keeps its journal (`serving.handover`); another replica goes on after the tokens that
the client has. It does not draw these again: in another batch the last digits of logits differ, and now and then a token.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, Protocol

from starlette.types import Send

from rlhf_ray.serving.answered import Answered
from rlhf_ray.serving.api_errors import ApiError, error_body
from rlhf_ray.serving.relay import JOURNAL, NOT_HERE, Piece, Relayed, is_opening, send_piece, told
from rlhf_ray.serving.streaming import server_sent

MOST_LOST = 3
"""Replicas that one request may lose: it may be what ends them."""
STREAM_WAIT_S, WHOLE_WAIT_S = 60.0, 15.0
"""That a request whose replica has ended waits for another. No client library sends a stream again that has begun."""
LONGEST_RETRY_AFTER_S = 60  # OpenAI's library passes over a longer one. It asks twice again, each time after Retry-After
LOOK_EVERY_S = 0.1
_EVENT_STREAM = b"text/event-stream"


class ReplicaLost(Exception):
    """A replica ended, or there is none, before the answer was complete."""


class Link(Protocol):
    """The way to one replica."""

    name: str
    models: Sequence[str]
    """The ids of the models that it has."""
    up: bool
    """Whether it is known to run."""
    ongoing: int
    """Requests that are with it."""

    @property
    def back_in_s(self) -> float:
        """Until it is expected to run; 0: it does."""
        ...

    def answer(self, request: Relayed) -> AsyncGenerator[Piece]:
        """Its answer. ReplicaLost where it can't be had, or ends early."""
        ...

    async def stats(self) -> dict[str, Any]: ...


def least_busy(links: Sequence[Link], model: str, tried: Collection[Link] = ()) -> Link | None:
    """Of those that run and have the model, without those that were tried."""
    left = [link for link in links if link.up and model in link.models and link not in tried]
    return min(left, key=lambda link: link.ongoing, default=None)


class Passing:
    """Of one request to one version of one model."""

    def __init__(
        self, links: Sequence[Link], request: Relayed, send: Send, answered: Answered,
        ending: Callable[[], bool] = lambda: False,
    ):  # fmt: skip
        """ending: whether the server ends, so that no other replica is to be waited for."""
        self.lost = 0
        """Replicas that have ended with the request in hand."""
        self._links, self._request, self._send, self._answered = links, request, send, answered
        self._ending = ending
        self._streams = False  # the client has the head of a stream
        self._journal: bytearray | None = None  # of what it has of it; None: no other replica can go on with it

    async def pass_on(self) -> ApiError | None:
        """-> None, or why there is no answer; nothing has been sent then."""
        error: ApiError | None = None
        full: list[Piece] = []  # the answer of a replica that is full
        tried: list[Link] = []
        clock = asyncio.get_running_loop().time
        until = clock()  # what no replica has had in hand does not wait
        while self.lost < MOST_LOST:
            link = self._next(tried)
            if link is None:
                if clock() >= until or self._ending():
                    break
                tried.clear()
                await asyncio.sleep(LOOK_EVERY_S)
                continue
            try:
                refused = await self._ask(link)
            except ReplicaLost:
                if self._streams and self._journal is None:
                    break
                until = clock() + (STREAM_WAIT_S if self._streams else WHOLE_WAIT_S)
                full = []
                continue
            if not refused:
                return None
            if refused[0][0] == NOT_HERE:
                error = unavailable(f"No replica has version {self._request.version} yet.", 1)
            elif refused[0][0] in (429, 503):
                full = refused
            else:  # of a stream that has begun: another time it would say the same
                break
        if self._streams:
            await self._cut_off()
            return None
        for piece in full:
            await send_piece(piece, self._send)
        if full:
            return None
        if self.lost:
            return unavailable("The replica that had the request has ended.", self._back_in_s())
        return error or unavailable(f"No replica of the model {self._request.model} is running.", self._back_in_s())

    def _back_in_s(self) -> int:
        """Until a replica of the model runs, in whole seconds, 1 at least."""
        each = [link.back_in_s for link in self._links if self._request.model in link.models]
        return max(1, min(math.ceil(min(each)), LONGEST_RETRY_AFTER_S))

    async def _cut_off(self) -> None:
        self._answered.failed = True
        failure = error_body(503, "The replica that was writing the response has ended.", code="unavailable")
        await send_piece([server_sent(failure) + server_sent("[DONE]"), False], self._send)

    def _next(self, tried: list[Link]) -> Link | None:
        link = least_busy(self._links, self._request.model, tried)
        if link is not None:
            tried.append(link)
            self._answered.replica = link.name
        return link

    async def _ask(self, link: Link) -> list[Piece]:
        """Pass one replica's answer, or the rest of one, on. -> [], or the whole answer, unsent, if the replica is full or has no
        such version, or does not go on with the stream.

        ReplicaLost where it ended before the answer did; the journal then says what the client has of it.
        """
        answer = link.answer(replace(self._request, begun=bytes(self._journal or b"")))
        held: list[Piece] = []
        passes, more = False, True
        try:
            async for piece in answer:
                piece, said = told(piece)  # noqa: PLW2901
                more, journal = piece[-1], said.pop(JOURNAL, None)
                if is_opening(piece) and _is_stream(piece):
                    passes, piece = True, self._opened(piece, journal)  # noqa: PLW2901
                self._answered.told(said)
                if passes:
                    await send_piece(piece, self._send)
                    self._note(journal)
                else:
                    held.append(piece)
            if more:
                raise ReplicaLost(link.name)
        except ReplicaLost:
            self.lost += 1
            raise
        finally:
            await answer.aclose()
        if held and (self._streams or held[0][0] in (429, NOT_HERE)):
            return held
        self._answered.taken_over = self.lost
        for piece in held:
            await send_piece(piece, self._send)
        return []

    def _opened(self, piece: Piece, journal: bytes | None) -> Piece:
        """The first piece of a stream, without its head if the client has one."""
        self._answered.taken_over = self.lost
        if self._streams:
            return piece[2:]
        self._streams, self._journal = True, None if journal is None else bytearray()
        return piece

    def _note(self, journal: bytes | None) -> None:
        if self._journal is not None and journal:
            self._journal += journal


def _is_stream(opening: Piece) -> bool:
    return opening[0] == 200 and any(name == b"content-type" and _EVENT_STREAM in value for name, value in opening[1])


def unavailable(message: str, retry_after_s: int) -> ApiError:
    return ApiError(
        503, f"{message} Please retry shortly.", code="unavailable", headers={"Retry-After": str(retry_after_s)}
    )

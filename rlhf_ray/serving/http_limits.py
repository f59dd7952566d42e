"""uvicorn's HTTP protocol with the limits that it lacks: on headers, on waiting for a client, on connections.

A connection is idle (no byte of a request has come), reads a header, reads a body, or is busy (a request is complete and its
answer is not). Only a busy one has no deadline: its answer takes as long as the model does. The body's deadline is the gate's.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from rlhf_ray.serving.api_errors import error_body

REFUSED_AT_ONCE = 64  # connections that are told that there is no place, before the first of them is cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What a connection may cost."""

    header_bytes: int = 64 << 10
    """Request line and headers together; trailers of a chunked body too."""
    header_timeout_s: float = 10.0
    """From the first byte of a request to the end of its headers; of a new connection, to its first byte too."""
    keep_alive_s: float = 75.0
    """From an answer to the next request."""
    linger_s: float = 3.0
    """How long a client that has its answer may still send, so that it can read the answer before the connection ends."""
    write_s: float = 60.0
    """How long a client may take nothing of its answer."""
    connections: int = 512
    pipelined: int = 16
    """Requests of one connection that have come and are not answered; what comes after them is thrown away."""
    framing_bytes: int = 8 << 20
    """Bytes of a body that are none of its content: chunk lengths, extensions, trailers."""


class Connections:
    """The connections of one server that are not busy, the one that has waited longest first."""

    def __init__(self, limits: HttpLimits):
        self.limits = limits
        self.waiting: dict[LimitedProtocol, None] = {}
        self.refused: dict[LimitedProtocol, None] = {}
        """Those that came when all places were taken. They are told so, and have none."""

    def protocol(self, **settings) -> LimitedProtocol:
        """For uvicorn, which makes one per connection."""
        return LimitedProtocol(self, **settings)


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, shared: Connections, **settings):
        super().__init__(**settings)
        self.shared, self.limits = shared, shared.limits
        self._reading: Literal["idle", "header", "body", "nothing"] = "idle"
        self._cycles: deque[RequestResponseCycle] = deque()  # requests whose headers have come and whose answers have not gone
        self._header_bytes = 0  # as parsed
        self._unparsed = 0  # that came while a header was incomplete
        self._framing = 0
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # ---- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) - len(self.shared.refused) > self.limits.connections:
            longest = next(iter(self.shared.waiting), None)
            if longest is None:
                self.shared.refused[self] = None
                if len(self.shared.refused) > REFUSED_AT_ONCE:
                    next(iter(self.shared.refused)).transport.abort()
                self.refuse(503, "The server has as many connections as it can take. Please retry shortly.")
                return
            longest.give_up(at_once=True)
        self._wait_as("idle", self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timer(None)
        self._stop_write_timer()
        self.shared.waiting.pop(self, None)
        self.shared.refused.pop(self, None)
        self._reading = "nothing"
        self._leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._reading == "nothing" or self.parser is None:
            return
        before = self._reading
        if before == "header":
            self._unparsed += len(data)
        elif before == "body":
            self._framing += len(data)
        super().data_received(data)
        headers = max(self._unparsed, self._header_bytes) if self._reading == "header" else 0
        framing = self._framing if before == self._reading == "body" else 0
        if headers > self.limits.header_bytes or framing > self.limits.framing_bytes:
            self._refuse_header()

    # ---- the parser's callbacks

    def on_message_begin(self) -> None:
        if self._reading == "nothing":
            return
        if len(self._cycles) >= self.limits.pipelined:
            self._reading = "nothing"
            self._cycles[-1].keep_alive = False  # its answer is the connection's last
            return
        super().on_message_begin()
        self._header_bytes = self._unparsed = self._framing = 0
        self._wait_as("header", self.limits.header_timeout_s)

    def on_url(self, url: bytes) -> None:
        if self._reading == "nothing":
            return
        self._header_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reading == "nothing":
            return
        self._header_bytes += len(name) + len(value) + 4  # ": " and the line's end
        if self._header_bytes > self.limits.header_bytes:
            if self._reading == "body":  # a trailer
                self._refuse_header()
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._reading == "nothing":
            return
        if self._header_bytes > self.limits.header_bytes:
            self._refuse_header()
            return
        before, busy = self.cycle, bool(self._cycles)
        super().on_headers_complete()
        if self.cycle is not None and self.cycle is not before:
            self._cycles.append(self.cycle)
        self._wait_as("body", None)
        if busy:  # uvicorn stops reading here, and would not see that the client leaves; `pipelined` bounds what comes
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        if self._reading != "nothing":
            self._framing -= len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._reading == "nothing":
            return
        super().on_message_complete()
        self._wait_as("idle", self.limits.keep_alive_s)

    def on_response_complete(self) -> None:
        if self._cycles:
            self._cycles.popleft()
        super().on_response_complete()
        if self.transport.is_closing():  # as soon as the client has read it all
            if self._write_timer is None:
                self._watch_writing()
            return
        self._unset_keepalive_if_required()  # uvicorn's own, which any byte would stop
        if self._reading == "body":
            self._wait_as("body", None if self._cycles else self.limits.linger_s)
        elif self._reading != "nothing":
            self._wait_as(self._reading, self.limits.keep_alive_s if self._reading == "idle" else self.limits.header_timeout_s)

    # ---- waiting

    @property
    def _busy(self) -> bool:
        return len(self._cycles) > (1 if self._reading == "body" else 0)

    def _wait_as(self, reading: Literal["idle", "header", "body"], seconds: float | None) -> None:
        """What is waited for now, and how long (None: the app sees to it). The connection is last of those that wait."""
        if self._reading == "nothing":
            return
        self._reading = reading
        self.shared.waiting.pop(self, None)
        self._set_timer(None)
        if not self._busy:
            self.shared.waiting[self] = None
            if seconds is not None:
                self._set_timer(self.loop.call_later(seconds, self.give_up))

    def give_up(self, *, at_once: bool = False) -> None:
        """The client has sent nothing for too long or, at_once, others need its place."""
        if self._reading == "header" or (self._reading == "body" and self._cycles):
            self.refuse(408, "The request was not complete in time.")
            if at_once:
                self._close()
        else:
            self._close()

    def _set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer

    # ---- refusing

    def _refuse_header(self) -> None:
        self.refuse(431, f"The request's headers are larger than {self.limits.header_bytes} bytes.")

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, "The request is not valid HTTP.")

    def refuse(self, status: int, message: str) -> None:
        """Answer without the app, read on for a moment, and close."""
        if self._reading == "nothing" or self.transport.is_closing():
            return
        busy, self._reading = self._busy, "nothing"
        started = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        self._leave()
        if started or busy:  # an answer that is under way can't be followed by another's
            self._close()
            return
        self.shared.waiting.pop(self, None)
        if self not in self.shared.refused:
            self.shared.waiting[self] = None
        self.transport.write(_answer(status, message))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._set_timer(self.loop.call_later(self.limits.linger_s, self._close))

    def _close(self) -> None:
        self._reading = "nothing"
        self._set_timer(None)
        self.shared.waiting.pop(self, None)
        if not self.transport.is_closing():
            self.transport.close()  # once the client has read what is written, for which it has a moment
            self._set_timer(self.loop.call_later(self.limits.linger_s, self.transport.abort))

    def _leave(self) -> None:
        """What the app still does for this connection reaches nobody."""
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()

    # ---- a client that does not read

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def _watch_writing(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self.limits.write_s, self._has_taken, unsent)

    def _has_taken(self, unsent: int) -> None:
        """A slow client goes on, one that takes nothing is cut off."""
        if self.transport.get_write_buffer_size() < unsent:
            self._watch_writing()
        else:
            self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
        self._write_timer = None


def _answer(status: int, message: str) -> bytes:
    body = json.dumps(error_body(status, message, code=HTTPStatus(status).phrase.lower().replace(" ", "_"))).encode()
    retry = "Retry-After: 1\r\n" if status == 503 else ""
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{retry}Connection: close\r\n\r\n"
    )
    return head.encode() + body

"""Answers that end when their reader leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, MutableMapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rlhf_ray.serving.answered import FAILED
from rlhf_ray.serving.api_errors import error_body

logger = logging.getLogger(__name__)


def server_sent(data: dict[str, Any] | str) -> bytes:
    """One event of a stream."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class ClientLeft(Exception):
    """The connection closed before the answer was complete."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled (its `finally` runs) when the client leaves or the caller is."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: each item of `events` is one, `data: [DONE]` the last. A failure becomes an error event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any]], on_end: Callable[[], None]):
        # X-Accel-Buffering: proxies such as nginx would otherwise collect the stream before passing it on.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send, scope.get("state", {})))
        except (ClientLeft, OSError):  # a server may also say that the client left by failing to send
            pass
        finally:
            # Not only in the generator: one that has not started yet runs nothing when it is closed.
            self._on_end()

    async def _send_all(self, send: Send, state: MutableMapping[str, Any]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": server_sent(event), "more_body": True})
        except OSError:
            raise
        except Exception:  # fault boundary: one stream. The others go on, whatever failed here.
            # The status line is already sent. OpenAI's clients raise an APIError for an error inside the stream.
            logger.exception("a stream failed")
            state[FAILED] = True
            failure = error_body(500, "The server had an error while writing the response.")
            await send({"type": "http.response.body", "body": server_sent(failure), "more_body": True})
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": server_sent("[DONE]"), "more_body": False})

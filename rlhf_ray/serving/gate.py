"""What every request passes before it is routed: the API key, then the size of its body and the time that it takes."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_ray.serving.api_errors import ApiError

# A client that is still sending its body can't read the answer: an over-long body is read (and thrown away) up to here.
_DRAIN_BYTES = 64 << 20

# A body may take so many seconds, and one more for every so many bytes that have come.
BODY_TIMEOUT_S = 20.0
_BYTES_PER_S = 16 << 10

_OPEN_PATHS = ("/health",)


class Gate:
    """ASGI middleware. The body is read once, up to `max_body_bytes`, and replayed to the app."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body_bytes: int,
        body_timeout_s: float = BODY_TIMEOUT_S,
        is_open: Callable[[str], bool] | None = None,
    ):
        """is_open: tells the paths that need no key."""
        self.is_open = is_open or (lambda path: False)
        self.app, self.api_key, self.max_body_bytes = app, api_key, max_body_bytes
        self.body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await self._read_body(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self.app(scope, _replay(body, receive), send)

    def _check_key(self, scope: Scope) -> None:
        known = scope["path"] in _OPEN_PATHS and scope["method"] == "GET"
        if self.api_key is None or known or self.is_open(scope["path"]):
            return
        scheme, _, given = _header(scope, b"authorization").strip().partition(b" ")
        if not hmac.compare_digest(given.strip(), self.api_key.encode()) or scheme.lower() != b"bearer":
            what = "Incorrect API key provided." if given else "You didn't provide an API key."
            raise ApiError(
                401,
                f"{what} Send it as the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client left before it was sent."""
        too_large = ApiError(
            413, f"The request body is larger than the limit of {self.max_body_bytes} bytes.", code="request_too_large"
        )
        announced = _header(scope, b"content-length")
        if announced.isdigit() and int(announced) > _DRAIN_BYTES:
            raise too_large
        parts: list[bytes] = []
        size, more = 0, True
        loop = asyncio.get_running_loop()
        started = loop.time()
        while more:
            try:
                async with asyncio.timeout_at(started + self.body_timeout_s + size / _BYTES_PER_S):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"The request's body was not complete after {loop.time() - started:.0f} s.",
                    code="request_timeout",
                    headers={"Connection": "close"},
                ) from None
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size <= self.max_body_bytes:
                parts.append(part)
            elif size > _DRAIN_BYTES:
                break
            more = message.get("more_body", False)
        if size > self.max_body_bytes:
            raise too_large
        return b"".join(parts)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _replay(body: bytes, receive: Receive) -> Receive:
    """First the body, then whatever the connection says next (that the client has left)."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed

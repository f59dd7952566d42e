"""What stands before every app that is served: host names, web pages of other origins, methods, then the gate."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection

from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_ray.serving.api_errors import ApiError
from rlhf_ray.serving.config import AppConfig
from rlhf_ray.serving.gate import Gate

_METHODS = ("GET", "HEAD", "POST", "OPTIONS")


def guarded(app: ASGIApp, config: AppConfig, is_open: Callable[[str], bool] | None = None) -> ASGIApp:
    """`app` for anybody's requests: it sees those alone that may be answered, with their bodies complete.

    is_open: tells the paths at which the app itself asks who somebody is.
    """
    app = Gate(app, api_key=config.api_key, max_body_bytes=config.limits.max_body_bytes, is_open=is_open)
    app = _Methods(app)
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=_METHODS,
            allow_headers=("*",),
            expose_headers=("Retry-After", "X-Request-ID", "X-Model-Version"),
        )
    if config.allowed_hosts is not None:
        app = _Hosts(app, config.allowed_hosts)
    return app


class _Methods:
    """HEAD is GET without the body. OPTIONS, where no page of another origin asks, names the methods."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope.get("method")
        if method == "OPTIONS":
            await Response(status_code=204, headers={"Allow": ", ".join(_METHODS)})(scope, receive, send)
        elif method == "HEAD":
            await self.app({**scope, "method": "GET"}, receive, _without_body(send))
        else:
            await self.app(scope, receive, send)


def _without_body(send: Send) -> Send:
    async def headers_only(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return headers_only


class _Hosts:
    """Refuses requests for other host names.

    A page of any site may have its own name resolved to 127.0.0.1 and then talk to this server as to its own (DNS rebinding).
    Its browser still sends the page's name as Host. An IP address as Host can't be had that way.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str]):
        self.app, self.allowed = app, {name.lower() for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = self._refusal([value for name, value in scope["headers"] if name == b"host"], scope["http_version"])
            if error is not None:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, given: list[bytes], http_version: str) -> ApiError | None:
        if len(given) > 1 or (not given and http_version != "1.0"):
            return ApiError(400, "The request must have one Host header.", code="invalid_host")
        name = host_name(given[0].decode("latin-1")) if given else "localhost"
        if name in self.allowed or _is_own_address(name):
            return None
        return ApiError(
            403,
            f"This server does not answer to the host name '{name}'; start it with --allowed-host to let it.",
            code="invalid_host",
        )


def host_name(header: str) -> str:
    """The name in a Host header, without port and brackets, in lower case."""
    name, _, port = header.strip().rpartition(":")
    if not name or not port.isdigit() or (":" in name and not name.startswith("[")):
        name = header.strip()
    return name.strip("[]").rstrip(".").lower()


def _is_own_address(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False

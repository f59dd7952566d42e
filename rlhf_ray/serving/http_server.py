"""An ASGI app behind uvicorn with our limits, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import uuid

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_ray.serving.http_limits import Connections, HttpLimits

_BACKLOG = 2048


class HttpServer:
    """Serves `app` on a bound socket from `start` to `close`."""

    def __init__(self, app: ASGIApp, bound: socket.socket, limits: HttpLimits):
        self._bound = bound
        config = uvicorn.Config(
            _with_request_ids(app),
            http=Connections(limits).protocol,  # type: ignore[arg-type]  # a factory does as well as a class
            ws="none",
            lifespan="on",
            backlog=_BACKLOG,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(limits.keep_alive_s) + 1,
            timeout_graceful_shutdown=1,
        )
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http-server", daemon=True)
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Returns when connections are accepted."""
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)
        if not self._server.started:
            raise RuntimeError("the HTTP server could not start") from self._failure

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def unsent(self) -> int:
        """Bytes of answers that clients have not taken yet."""
        for _ in range(10):
            with contextlib.suppress(RuntimeError):  # a connection came or went meanwhile
                connections = list(self._server.server_state.connections)
                return sum(each.transport.get_write_buffer_size() for each in connections)
        return 0

    def close(self) -> None:
        """Cut what is still being answered, and release the port."""
        self._server.should_exit = self._server.force_exit = True
        if self._thread.is_alive():
            self._thread.join(5)
        self._bound.close()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
                runner.run(self._server.serve(sockets=[self._bound]))
        except BaseException as error:  # fault boundary: the thread's end, told to whoever asks `alive`
            self._failure = error


def _with_request_ids(app: ASGIApp) -> ASGIApp:
    """Every answer has an X-Request-ID: the request's own, or a new one."""

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        number = given[:200] if given else uuid.uuid4().hex.encode()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", number)]}
            await send(message)

        headers = scope["headers"] if given is not None else [*scope["headers"], (b"x-request-id", number)]
        await app({**scope, "headers": headers}, receive, send_named)

    return named

"""An ASGI app behind uvicorn with our limits, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from rlhf_ray.serving.http_limits import Connections, HttpLimits

_BACKLOG = 2048


class HttpServer:
    """Serves `app` on a bound socket from `start` to `close`. What `background` returns runs beside it in its event loop."""

    def __init__(
        self,
        app: ASGIApp,
        bound: socket.socket,
        limits: HttpLimits,
        background: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ):
        self._bound, self._background = bound, background
        config = uvicorn.Config(
            app,
            http=Connections(limits).protocol,  # type: ignore[arg-type]  # a factory does as well as a class
            ws="none",
            lifespan="off",
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
        if self._failure is not None:
            raise RuntimeError("the HTTP server could not start") from self._failure

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Cut what is still being answered, and release the port."""
        self._server.should_exit = self._server.force_exit = True
        if self._thread.is_alive():
            self._thread.join(5)
        self._bound.close()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
                runner.run(self._serve())
        except BaseException as error:  # fault boundary: the thread's end, told to whoever asks `alive`
            self._failure = error

    async def _serve(self) -> None:
        if self._background is None:
            await self._server.serve(sockets=[self._bound])
            return
        beside = asyncio.create_task(self._background())
        try:
            await self._server.serve(sockets=[self._bound])
        finally:
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)

"""The app in front of the replicas: it chooses version and replica for each request, passes the answer on, and says what has
become of them.

It holds no model. /health and the refusals never wait for a replica.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rlhf_ray.publish.version import Version
from rlhf_ray.serving.answered import Answered, Listener, Watched
from rlhf_ray.serving.api_errors import ApiError
from rlhf_ray.serving.passing import Link, Passing, ReplicaLost, least_busy, unavailable
from rlhf_ray.serving.relay import Relayed, relayed, told
from rlhf_ray.serving.streaming import ClientLeft, while_connected
from rlhf_ray.serving.versions import NoSuchVersion, VersionTable

_STATS_WAIT_S = 5.0


class Front:
    """An ASGI app over links to replicas. What `beside` makes runs from its start to its end.

    tables: of each model whose versions can be told apart. pages: further apps by path, for GET, that wait for no replica.
    """

    def __init__(
        self,
        links: Sequence[Link],
        beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
        tables: Mapping[str, VersionTable] | None = None,
    ):
        self.links, self.beside = links, beside
        self.models = tuple(dict.fromkeys(model for link in links for model in link.models))
        self.tables = dict(tables or {})
        self.pages: dict[str, ASGIApp] = {}
        self.listeners: list[Listener] = []
        """Called with each answer that has ended."""
        self.draining = False
        """Refuse what is new."""
        self.ending = False
        """Refuse what waits for another replica, too."""
        self.ongoing = 0
        """Requests that are being answered."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            return
        if scope["path"] == "/health" and scope["method"] == "GET":
            await self._health()(scope, receive, send)
        elif scope["path"] == "/stats" and scope["method"] == "GET":
            await JSONResponse(await self.stats())(scope, receive, send)
        elif scope["path"] in self.pages and scope["method"] == "GET":
            await self.pages[scope["path"]](scope, receive, send)
        elif self.draining:
            await unavailable("The server is shutting down.", 5).response()(scope, receive, send)
        else:
            await self._watched(scope, receive, send)

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.ongoing += 1
        watched = Watched(scope, send)
        try:
            await while_connected(receive, self._pass_on(scope, receive, watched.send, watched.answer))
        except (ClientLeft, OSError):
            pass  # nobody reads it
        finally:
            self.ongoing -= 1
            ended = watched.end()
            for listener in self.listeners:
                listener(ended)

    async def _live(self, receive: Receive, send: Send) -> None:
        task = None if self.beside is None else asyncio.ensure_future(self.beside())
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await send({"type": "lifespan.shutdown.complete"})

    def _health(self) -> JSONResponse:
        if self.draining:
            return unavailable("The server is shutting down.", 5).response()
        if any(link.up for link in self.links):
            return JSONResponse({"status": "ok"})
        return unavailable("No replica is running.", 5).response()

    async def stats(self) -> dict[str, Any]:
        """The sums over the replicas, and each one's own."""
        each = await asyncio.gather(*(self._stats_of(link) for link in self.links))
        found = [one for one in each if one is not None]
        numbers = [name for name, value in (found[0] if found else {}).items() if isinstance(value, int)]
        sums: dict[str, Any] = {name: sum(one[name] for one in found) for name in numbers}
        replicas = [
            {"name": link.name, "model": ", ".join(link.models), "up": one is not None, **(one or {})}
            for link, one in zip(self.links, each, strict=True)
        ]
        return sums | {"replicas": replicas}

    async def _stats_of(self, link: Link) -> dict[str, Any] | None:
        if not link.up:
            return None
        try:
            return await asyncio.wait_for(link.stats(), _STATS_WAIT_S)
        except (ReplicaLost, TimeoutError):
            return None

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, answer: Answered) -> None:
        request = await relayed(scope, receive)
        if request is None:
            return
        if len(self.models) > 1 and scope["path"] == "/v1/models" and scope["method"] == "GET":
            await JSONResponse(await self._cards(request))(scope, receive, send)
            return
        model = answer.model = self._model_of(request)
        try:
            versions = self._versions(model, request)
        except NoSuchVersion as error:
            await _no_such_version(error, self.tables[model]).response()(scope, receive, send)
            return
        for version in versions:
            with ExitStack() as stack:
                asked = replace(request, model=model)
                if version is not None:
                    stack.enter_context(self.tables[model].serving(version))
                    asked = replace(asked, version=version.id)
                    answer.version = version.id
                passing = Passing(self.links, asked, send, answer, lambda: self.ending)
                error = await passing.pass_on()
            if error is None:
                return
            if passing.lost:  # a request that has begun ends on its version
                break
        await error.response()(scope, receive, send)

    def _versions(self, model: str, request: Relayed) -> list[Version | None]:
        """Who may answer: by the share or as the request asks; where no replica has the candidate (one that starts again
        loads it later than the stable one), the stable version."""
        if model not in self.tables:
            return [None]
        table = self.tables[model]
        given = next((value for name, value in request.scope["headers"] if name == b"x-model-version"), None)
        chosen = table.choose(None if given is None else given.decode("latin-1"))
        return [chosen] if given is not None or chosen == table.stable else [chosen, table.stable]

    def _model_of(self, request: Relayed) -> str:
        """The model that a request names. Where that is none of ours, or it names none, a replica that runs says so."""
        if len(self.models) == 1:
            return self.models[0]
        asked: Any = request.scope["path"].removeprefix("/v1/models/")
        if request.body:
            try:
                asked = json.loads(request.body)["model"]
            except (ValueError, LookupError, TypeError, RecursionError):
                asked = None
        if asked in self.models:
            return asked
        return next((link.models[0] for link in self.links if link.up), self.models[0])

    async def _cards(self, request: Relayed) -> dict[str, Any]:
        """What a replica of each model that runs says of it."""
        data: list[Any] = []
        for model in self.models:
            link = least_busy(self.links, model)
            if link is None:
                continue
            try:
                answer = [told(piece)[0] async for piece in link.answer(replace(request, model=model))]
            except ReplicaLost:
                continue
            if answer and answer[0][0] == 200:
                data += json.loads(b"".join(piece[-2] for piece in answer))["data"]
        return {"object": "list", "data": data}


def _no_such_version(error: NoSuchVersion, table: VersionTable) -> ApiError:
    there = ", ".join(version.id for version in table.taking)
    return ApiError(
        404, f"No version '{error}' of this model takes requests; there is {there}.", code="version_not_found",
        param="X-Model-Version",
    )  # fmt: skip

"""The page in front of the front: its files, its interface, and what a browser must keep to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_ray.serving.api_errors import ApiError
from rlhf_ray.serving.config import AppConfig
from rlhf_ray.serving.page.options import PageOptions
from rlhf_ray.serving.page.prompt_list import common_ending, longest_of_run, prompts_of_run, read_prompts
from rlhf_ray.serving.page.raters import Raters
from rlhf_ray.serving.page.routes import Routes
from rlhf_ray.serving.page.served_answers import Models
from rlhf_ray.votes.records import Prompt
from rlhf_ray.votes.store import VoteStore

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Scripts and styles from this server's own files alone, nothing from elsewhere, no text that becomes markup, no frame around it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store",
}  # fmt: skip


def is_of_page(path: str) -> bool:
    """Whether the page answers it. These need no API key at the gate: the page asks for a token or the key itself."""
    return path == "/" or path.startswith("/page/")


@dataclass(frozen=True, slots=True, kw_only=True)
class PageParts:
    """What the page works with, opened before a server starts."""

    options: PageOptions
    store: VoteStore | None
    prompts: list[Prompt]
    longest: int
    """Tokens of an answer to compare, unless a request says otherwise."""

    @classmethod
    def opened(cls, options: PageOptions, run: Path) -> PageParts:
        """run: the folder that is served. UserError for a database or a file of prompts that can't be used."""
        prompts = prompts_of_run(run) if options.prompts is None else read_prompts(options.prompts)
        store = None if options.votes is None else VoteStore(options.votes, create=True)
        return cls(options=options, store=store, prompts=prompts, longest=longest_of_run(run))

    def close(self) -> None:
        if self.store is not None:
            self.store.close()


def build_page(front: ASGIApp, config: AppConfig, parts: PageParts) -> Page:
    """front: the app that serves the models, without a key."""
    database = None if parts.store is None else parts.store.database
    raters = Raters(database, api_key=config.api_key, invited_only=parts.options.invited_only)
    models = Models(front, common_ending(parts.prompts))
    return Page(front, Routes(models, parts.store, raters, parts.prompts, parts.options, parts.longest), config.cors_origins)


class Page:
    """An ASGI app. Requests that a web page of another origin sends are refused, unless it is one of `origins`."""

    def __init__(self, front: ASGIApp, routes: Routes, origins: tuple[str, ...]):
        self.front, self.routes, self.origins = front, routes, origins
        self.app = routes.app()
        folder = resources.files("rlhf_ray.serving.page") / "static"
        self.files = {
            f"/page/{file.name}": file.read_bytes() for file in folder.iterdir() if Path(file.name).suffix in KINDS
        }
        self.files["/"] = self.files.pop("/page/index.html")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.front(scope, receive, send)
        elif scope["path"] == "/openapi.json" and scope["method"] == "GET":
            await (await self._document())(scope, receive, send)
        elif not is_of_page(scope["path"]):
            await self.front(scope, receive, send)
        else:
            await self._answer(scope, receive, _with_headers(send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope)
        if error is not None:
            await error.response()(scope, receive, send)
        elif scope["path"] in self.files and scope["method"] == "GET":
            suffix = Path(scope["path"]).suffix or ".html"
            await Response(self.files[scope["path"]], media_type=KINDS[suffix])(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin")
        if scope["method"] == "GET" or origin in self.origins or "*" in self.origins:
            return None
        foreign = origin is not None and _host_of(origin) != headers.get(b"host", "")
        if foreign or headers.get(b"sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return ApiError(403, "A web page of another origin may not do this.", code="cross_site")
        return None

    async def _document(self) -> Response:
        """The description of the models' interface, and of the page's."""
        try:
            document = await self.routes.models.ask("GET", "/openapi.json")
        except ApiError as error:
            return error.response()
        own: dict[str, Any] = json.loads(json.dumps(self.app.openapi()))
        document["paths"] |= own["paths"]
        document["components"]["schemas"] |= own["components"]["schemas"]
        return JSONResponse(document)


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # no address
        return None


def _with_headers(send: Send) -> Send:
    added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
    names = {name for name, _ in added}

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message.get("headers", ()) if pair[0].lower() not in names]
            message = {**message, "headers": [*kept, *added]}
        await send(message)

    return sent

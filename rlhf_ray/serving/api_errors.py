"""Every failure as OpenAI's error body: {"error": {"message", "type", "param", "code"}} with the right status."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

MESSAGE_LIMIT = 500
"""Characters of an error message: what a client sent is repeated to it in part only."""


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    @property
    def body(self) -> dict:
        return error_body(self.status, self.message, code=self.code, param=self.param)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict:
    if status == 429:
        kind = "rate_limit_error"
    elif status >= 500:
        kind = "server_error"
    else:
        kind = "invalid_request_error"
    return {"error": {"message": _cut(message, MESSAGE_LIMIT), "type": kind, "param": param and _cut(param, 100), "code": code}}


def _cut(text: str, most: int) -> str:
    """At most `most` characters, all of which UTF-8 can write."""
    text = text if len(text) <= most else f"{text[: most - 4]} ..."
    return text.encode("utf-8", "replace").decode()


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def install_error_handlers(app: FastAPI, paths: Sequence[str]) -> None:
    """Replace the framework's own error bodies, those of unknown paths and wrong methods included.

    paths: those that the app has, for the message about one that it has not.
    """

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message, code = str(error.detail), None
        if error.status_code == 404:
            message, code = _unknown(request.method, request.url.path, paths), "unknown_url"
        elif error.status_code == 405:
            message, code = f"{request.method} is not allowed on {_cut(request.url.path, 200)}.", "method_not_allowed"
        return JSONResponse(
            error_body(error.status_code, message, code=code), status_code=error.status_code, headers=error.headers
        )

    @app.exception_handler(Exception)
    async def server_error(request: Request, error: Exception) -> JSONResponse:
        # The exception's text may hold paths or other people's prompts: it goes to the log, not to the client.
        return JSONResponse(error_body(500, "The server had an error while processing the request."), status_code=500)


def _unknown(method: str, path: str, paths: Sequence[str]) -> str:
    """Clients of OpenAI's other endpoints (embeddings, responses, audio) read which ones there are."""
    without_slash = path.rstrip("/")
    hint = f" Did you mean {without_slash}?" if without_slash in paths else f" This server has {', '.join(paths)}."
    return f"Unknown request URL: {method} {_cut(path, 200)} is not an endpoint of this server.{hint}"

"""What the owner of a server may ask of it: publish a version, roll one back. Beside the front, behind a token of its own.

    GET  /versions              for every client: which versions there are, what was seen of them, and the history
    POST /control/publish       {"model", "folder", "adapter", "id", "share", "watch_s", "thresholds"}
    POST /control/rollback      {"model", "why"}

The token is in the server's note (`publish.servers`), which its owner alone can read. No web page knows it.
"""

from __future__ import annotations

import hmac
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rlhf_ray.errors import UserError
from rlhf_ray.publish.version import Version
from rlhf_ray.serving.api_errors import ApiError, bad_request
from rlhf_ray.serving.publication import Publisher
from rlhf_ray.serving.rollback import Thresholds

VERSIONS, CONTROL = "/versions", "/control/"
_MOST_BYTES = 1 << 16


class Control:
    """An ASGI app: /control/ by the publisher, all else by `app`."""

    def __init__(self, app: ASGIApp, publisher: Publisher, token: str):
        self.app, self.publisher, self.token = app, publisher, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(CONTROL):
            await self.app(scope, receive, send)
            return
        try:
            answer = JSONResponse(await self._answer(Request(scope, receive)))
        except UserError as error:
            answer = bad_request(str(error), code="refused").response()
        except ApiError as error:
            answer = error.response()
        await answer(scope, receive, send)

    async def _answer(self, request: Request) -> dict[str, Any]:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            raise ApiError(401, "This is for the server's owner: rlhf-ray publish.", code="invalid_control_token")
        if request.method != "POST":
            raise ApiError(405, f"{request.method} is not allowed on {request.url.path}.", code="method_not_allowed")
        body = await _body(request)
        action = request.url.path.removeprefix(CONTROL)
        try:
            if action == "publish":
                return await self.publisher.publish(
                    body["model"] or next(iter(self.publisher.tables)), Version.from_json(body), body["share"],
                    watch_s=body["watch_s"], thresholds=Thresholds(**body["thresholds"]),
                )  # fmt: skip
            if action == "rollback":
                return await self.publisher.roll_back(body["model"] or next(iter(self.publisher.tables)), body["why"])
        except (KeyError, TypeError) as error:
            raise bad_request(f"The body is not what this version of the server reads ({error}).") from None
        raise ApiError(404, f"There is no {request.url.path}.", code="unknown_url")


def versions_page(publisher: Publisher) -> ASGIApp:
    """GET /versions"""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        states = [publisher.state(model) for model in publisher.tables]
        await JSONResponse({"object": "list", "data": states})(scope, receive, send)

    return app


async def _body(request: Request) -> dict[str, Any]:
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > _MOST_BYTES:
            raise ApiError(413, "The body is too large.", code="request_too_large")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise bad_request("The body is no JSON object.")
    return found

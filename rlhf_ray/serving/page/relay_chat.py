"""A chat's answer, streamed from the front to the page as the front writes it."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_ray.serving.page.served_answers import too_long


class RelayedAnswer(Response):
    """The front's answer to a POST of `body` at `path`; with half as many tokens where there is no room for so many.

    version: that has to answer; None: whichever takes the request
    """

    def __init__(self, front: ASGIApp, path: str, body: dict[str, Any], version: str | None = None):
        super().__init__()
        self.front, self.path, self.body_ = front, path, body
        self.pinned = [] if version is None else [(b"x-model-version", version.encode())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left_out = (b"authorization", b"content-length", *(name for name, _ in self.pinned))
        kept = [(name, value) for name, value in scope["headers"] if name not in left_out] + self.pinned
        inner = {**scope, "path": self.path, "raw_path": self.path.encode(), "query_string": b"", "headers": kept}
        while True:
            refusal: list[Message] = []
            await self.front(inner, _replayed(json.dumps(self.body_).encode(), receive), _unless_refused(send, refusal))
            if not refusal:
                return
            told = json.loads(b"".join(each.get("body", b"") for each in refusal))
            if not too_long(400, told["error"]["param"], self.body_["max_tokens"]):
                for message in refusal:
                    await send(message)
                return
            self.body_ = self.body_ | {"max_tokens": self.body_["max_tokens"] // 2}


def _replayed(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _unless_refused(send: Send, refusal: list[Message]) -> Send:
    """Passes an answer on, unless its status is 400: that one is kept in `refusal`."""

    async def passed(message: Message) -> None:
        if refusal or message.get("status") == 400:
            refusal.append(message)
        else:
            await send(message)

    return passed

"""What is known of an answer when it has ended: for the request log, the metrics and the watch over versions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Message, Scope, Send

#: Written by the app into a request's state (`scope["state"]`), and sent with an answer's last piece.
USAGE, FAILED, TEXTS = "usage", "failed", "texts"
CLIENT_LEFT = 499


@dataclass(slots=True, kw_only=True)
class Answered:
    """One request and its answer. Times in seconds."""

    method: str
    path: str
    request_id: str
    started: float = field(default_factory=time.time)
    """Since 1970."""
    model: str = ""
    version: str = ""
    replica: str = ""
    status: int = CLIENT_LEFT
    failed: bool = False
    """The answer is an error of the server's, or was cut off."""
    taken_over: int = 0
    """Replicas that ended with it in hand, before the one that answered."""
    seconds: float = 0.0
    first_s: float | None = None
    """Until its first part was sent."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    texts: list[tuple[str, str]] = field(default_factory=list)
    """Prompt and response of each choice, where the server keeps them."""

    def told(self, state: dict[str, Any]) -> None:
        """What the app said of its answer."""
        if not state:
            return
        usage = state.get(USAGE, {})
        self.prompt_tokens, self.completion_tokens = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        self.failed |= state.get(FAILED, False)
        self.texts = [(prompt, response) for prompt, response in state.get(TEXTS, [])]


Listener = Callable[[Answered], None]


class Watched:
    """The `send` of one answer, which notes what passes."""

    def __init__(self, scope: Scope, send: Send):
        headers = dict(scope["headers"])
        self.answer = Answered(
            method=scope["method"],
            path=scope["path"],
            request_id=headers.get(b"x-request-id", b"").decode("latin-1")[:200],
        )
        self._send, self._clock = send, time.perf_counter()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.answer.status = message["status"]
            self.answer.failed |= message["status"] >= 500
        elif self.answer.first_s is None:
            self.answer.first_s = time.perf_counter() - self._clock
        await self._send(message)

    def end(self) -> Answered:
        self.answer.seconds = time.perf_counter() - self._clock
        return self.answer

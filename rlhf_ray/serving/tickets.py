"""What the event loop and the engine's thread hand each other: rows to draw, prompts to score, tokens, failures."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_ray.config.sampling_params import SamplingParams, TokenEvent, TokenLogprobs, TokenRules


class Overloaded(Exception):
    """More rows than may wait."""


class EngineFailed(Exception):
    """The engine raised, or was shut down, while it held these rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRequest:
    """One response to draw."""

    prompt_ids: list[int]
    seed: int
    params: SamplingParams
    rules: TokenRules | None = None
    begun: tuple[int, ...] = ()
    """Its tokens so far, which another replica has drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptToScore:
    """One prompt whose own tokens' log-probs are asked for."""

    prompt_ids: list[int]
    alternatives: int
    future: asyncio.Future
    loop: asyncio.AbstractEventLoop

    def answer(self, scores: list[TokenLogprobs | None]) -> None:
        post(self.loop, lambda found: self.future.done() or self.future.set_result(found), scores)

    def fail(self, error: Exception) -> None:
        post(self.loop, lambda found: self.future.done() or self.future.set_exception(found), error)


class Ticket:
    """The rows of one request. Only its event loop's thread touches it, except for what `EngineRunner` hands over."""

    def __init__(
        self,
        cancel: Callable[[Ticket, set[int]], None],
        rows: list[RowRequest],
        loop: asyncio.AbstractEventLoop,
        *,
        streams: bool = True,
    ):
        """streams: its tokens are handed over as they are drawn; else those of a row together, when it ends."""
        self.rows, self.loop, self.streams = rows, loop, streams
        self.kept: dict[int, list[tuple[int, TokenEvent]]] = {}
        """By row, what is not handed over yet; the engine's thread alone touches it."""
        self._cancel = cancel
        self._inbox: deque[tuple[int, TokenEvent]] = deque()
        self._arrived = asyncio.Event()
        self._error: Exception | None = None
        self._unfinished = set(range(len(rows)))

    async def events(self) -> list[tuple[int, TokenEvent]]:
        """All (row, token) pairs that have come since the last call; waits for one. [] when every row is done."""
        while not self._inbox:
            if self._error is not None:
                raise self._error
            if not self._unfinished:
                return []
            self._arrived.clear()
            await self._arrived.wait()
        events = list(self._inbox)
        self._inbox.clear()
        return events

    def cancel(self, row: int | None = None) -> None:
        """Take one row, or all that are unfinished, out of the batch. Safe to call twice."""
        leaving = self._unfinished & ({row} if row is not None else set(range(len(self.rows))))
        self._unfinished -= leaving
        if leaving:
            self._cancel(self, leaving)

    def deliver(self, events: list[tuple[int, TokenEvent]]) -> None:
        for row, event in events:
            if row in self._unfinished:
                self._inbox.append((row, event))
                if event.completion is not None:
                    self._unfinished.discard(row)
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._unfinished.clear()
        self._arrived.set()


def post(loop: asyncio.AbstractEventLoop, callback: Callable, argument: object) -> None:
    try:
        loop.call_soon_threadsafe(callback, argument)
    except RuntimeError:
        if not loop.is_closed():
            raise
        # The loop has ended, and everyone who waited with it; their rows run out.


def deliver_all(items: list[tuple[Ticket, list[tuple[int, TokenEvent]]]]) -> None:
    for ticket, events in items:
        ticket.deliver(events)

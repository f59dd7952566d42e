"""One engine, one thread, many requests: rows join and leave the batch between two steps.

The event loop never runs the model (it has health checks to answer) and the engine's thread never waits for a client:
requests go in through a queue, tokens come out through one `call_soon_threadsafe` per step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_ray.config.sampling import SamplingParams, TokenEvent
from rlhf_ray.errors import UserError

if TYPE_CHECKING:
    from rlhf_ray.generation.protocol import ContinuousEngine

logger = logging.getLogger(__name__)

# A failed step costs the rows that were in the batch; this many in a row cost the replica.
MAX_FAILED_STEPS = 3


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerStats:
    """Counters since the start, and what is in the batch now."""

    steps: int
    tokens: int
    requests: int
    cancelled_rows: int
    running_rows: int
    waiting_rows: int


class Ticket:
    """The rows of one request. Only its event loop's thread touches it, except for what `EngineRunner` hands over."""

    def __init__(self, runner: EngineRunner, rows: list[RowRequest], loop: asyncio.AbstractEventLoop):
        self.rows, self.loop = rows, loop
        self._runner = runner
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
            self._runner._cancel(self, leaving)

    def _deliver(self, events: list[tuple[int, TokenEvent]]) -> None:
        for row, event in events:
            if row in self._unfinished:
                self._inbox.append((row, event))
                if event.completion is not None:
                    self._unfinished.discard(row)
        self._arrived.set()

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._unfinished.clear()
        self._arrived.set()


class EngineRunner:
    """Runs `engine` in a thread of its own. At most `max_rows` decode together and `max_waiting_rows` wait."""

    def __init__(self, engine: ContinuousEngine, *, max_rows: int, max_waiting_rows: int):
        self.engine, self.max_rows, self.max_waiting_rows = engine, max_rows, max_waiting_rows
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._outstanding = 0  # rows accepted and not yet finished or cancelled; under the lock
        self._failure: EngineFailed | None = None
        self._closed = False
        # The engine thread's own:
        self._waiting: deque[tuple[Ticket, int]] = deque()
        self._running: dict[int, tuple[Ticket, int]] = {}
        self._steps = self._tokens = self._requests = self._cancelled = 0
        self._thread = threading.Thread(target=self._run, name="generation-engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self._failure is None and self._thread.is_alive()

    def stats(self) -> RunnerStats:
        return RunnerStats(
            steps=self._steps,
            tokens=self._tokens,
            requests=self._requests,
            cancelled_rows=self._cancelled,
            running_rows=len(self._running),
            waiting_rows=max(0, self._outstanding - len(self._running)),
        )

    def submit(self, rows: list[RowRequest]) -> Ticket:
        """Queue all rows of one request, or raise Overloaded or EngineFailed. Called from the event loop."""
        with self._lock:
            if self._failure is not None or self._closed:
                raise self._failure or EngineFailed("the engine is shut down")
            if self._outstanding + len(rows) > self.max_rows + self.max_waiting_rows:
                raise Overloaded(
                    f"{self._outstanding} responses are being written or waiting; this request asks for "
                    f"{len(rows)} more and the server takes {self.max_rows + self.max_waiting_rows} at once"
                )
            self._outstanding += len(rows)
            ticket = Ticket(self, rows, asyncio.get_running_loop())
            # Inside the lock: nothing is queued after the failure or the close that empties the queue.
            self._commands.put(("submit", ticket, range(len(rows))))
        return ticket

    def _cancel(self, ticket: Ticket, rows: set[int]) -> None:
        self._commands.put(("cancel", ticket, rows))

    def close(self) -> None:
        """Stop the thread; what is running fails. Waits for the step that is under way."""
        with self._lock:
            self._closed = True
            self._commands.put(("close", None, ()))
        self._thread.join()

    def _run(self) -> None:
        failed_steps = 0
        try:
            while failed_steps < MAX_FAILED_STEPS and self._take_commands():
                self._admit()
                if self._running:
                    failed_steps = 0 if self._step() else failed_steps + 1
        finally:  # however it ends, nobody is left waiting
            self._fail_all(EngineFailed("the engine is shut down" if self._closed else "the engine has failed"))

    def _step(self) -> bool:
        # A failed step fails the requests whose rows were in the batch. After several in a row `healthy` turns False, and
        # Serve replaces the replica.
        try:
            events = self.engine.step()
        except Exception as error:  # fault boundary: one step
            logger.exception("a step of the generation engine failed")
            self._fail_running(EngineFailed(f"the engine failed: {type(error).__name__}"))
            return False
        self._steps += 1
        self._hand_out(events)
        return True

    def _take_commands(self) -> bool:
        """Carry out what has been asked; sleeps while there is nothing to decode. False: close."""
        while True:
            idle = not self._running and not self._waiting
            try:
                verb, ticket, rows = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if verb == "close":
                return False
            if verb == "submit":
                self._requests += 1
                self._waiting.extend((ticket, row) for row in rows)
            else:
                self._drop(ticket, rows)

    def _drop(self, ticket: Ticket, rows: set[int]) -> None:
        waiting = [place for place in self._waiting if place[0] is ticket and place[1] in rows]
        for place in waiting:
            self._waiting.remove(place)
        running = [number for number, place in self._running.items() if place[0] is ticket and place[1] in rows]
        for number in running:
            self.engine.cancel(number)
            del self._running[number]
        self._cancelled += len(waiting) + len(running)
        self._release(len(waiting) + len(running))

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_rows:
            ticket, row = self._waiting.popleft()
            request = ticket.rows[row]
            try:
                number = self.engine.submit(request.prompt_ids, request.seed, request.params)
            except UserError as error:  # a request that the engine refuses is its sender's problem alone
                self._drop(ticket, set(range(len(ticket.rows))))
                self._release(1)
                _post(ticket.loop, ticket._fail, error)
            else:
                self._running[number] = (ticket, row)

    def _hand_out(self, events: list[TokenEvent]) -> None:
        per_ticket: dict[Ticket, list[tuple[int, TokenEvent]]] = {}
        for event in events:
            ticket, row = self._running[event.request_id]
            per_ticket.setdefault(ticket, []).append((row, event))
            if event.completion is not None:
                del self._running[event.request_id]
                self._release(1)
        self._tokens += len(events)
        for loop in {ticket.loop for ticket in per_ticket}:
            mine = [(ticket, items) for ticket, items in per_ticket.items() if ticket.loop is loop]
            _post(loop, _deliver_all, mine)

    def _release(self, rows: int) -> None:
        with self._lock:
            self._outstanding -= rows

    def _fail_running(self, failure: EngineFailed) -> None:
        tickets = {ticket for ticket, _ in self._running.values()}
        self._release(len(self._running))
        self._running.clear()
        for ticket in tickets:
            self._drop(ticket, set(range(len(ticket.rows))))  # those of its rows that still wait
            _post(ticket.loop, ticket._fail, failure)

    def _fail_all(self, failure: EngineFailed) -> None:
        with self._lock:
            self._failure = failure
        tickets = {ticket for ticket, _ in self._waiting} | {ticket for ticket, _ in self._running.values()}
        while not self._commands.empty():
            verb, ticket, _ = self._commands.get()
            if verb == "submit":
                tickets.add(ticket)
        self._waiting.clear()
        self._running.clear()
        for ticket in tickets:
            _post(ticket.loop, ticket._fail, failure)


def _post(loop: asyncio.AbstractEventLoop, callback: Callable, argument: object) -> None:
    try:
        loop.call_soon_threadsafe(callback, argument)
    except RuntimeError:
        if not loop.is_closed():
            raise
        # The loop has ended, and everyone who waited with it; their rows run out.


def _deliver_all(items: list[tuple[Ticket, list[tuple[int, TokenEvent]]]]) -> None:
    for ticket, events in items:
        ticket._deliver(events)

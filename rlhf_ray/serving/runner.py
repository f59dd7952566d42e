"""One engine, one thread, many requests: rows join and leave the batch between two steps.

The event loop never runs the model (it has health checks to answer) and the engine's thread never waits for a client:
requests go in through a queue, tokens come out through one `call_soon_threadsafe` per step that has some to hand over: those of
a stream at once, those of a whole answer when it ends.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_ray.config.sampling_params import TokenEvent, TokenLogprobs
from rlhf_ray.errors import UserError
from rlhf_ray.serving.tickets import EngineFailed, Overloaded, PromptToScore, RowRequest, Ticket, deliver_all, post

if TYPE_CHECKING:
    from rlhf_ray.generation.engine_protocol import ContinuousEngine

logger = logging.getLogger(__name__)

# A failed step costs the rows that were in the batch; this many in a row cost the replica.
MAX_FAILED_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerStats:
    """Counters since the start, and what is in the batch now."""

    steps: int
    tokens: int
    requests: int
    cancelled_rows: int
    running_rows: int
    waiting_rows: int


class EngineRunner:
    """Runs `engine` in a thread of its own. At most `max_rows` decode together and `max_waiting_rows` wait."""

    def __init__(self, engine: ContinuousEngine, *, max_rows: int, max_waiting_rows: int):
        self.engine, self.max_rows, self.max_waiting_rows = engine, max_rows, max_waiting_rows
        self.precision = "float32"
        """That the engine computes in, of `publish.checked_rows.TOLERANCE`."""
        self.continues = False
        """Whether the engine goes on with rows that another one has begun (`tables.engines`)."""
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._outstanding = 0  # rows accepted and not yet finished or cancelled; under the lock
        self._failure: EngineFailed | None = None
        self._closed = False
        # The engine thread's own:
        self._waiting: deque[tuple[Ticket, int]] = deque()
        self._running: dict[int, tuple[Ticket, int]] = {}
        self._to_score: deque[PromptToScore] = deque()
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

    def submit(self, rows: list[RowRequest], *, streams: bool = True) -> Ticket:
        """Queue all rows of one request, or raise Overloaded or EngineFailed. Called from the event loop.

        streams: see `Ticket`.
        """
        with self._lock:
            self._take_places(len(rows))
            ticket = Ticket(self._cancel, rows, asyncio.get_running_loop(), streams=streams)
            # Inside the lock: nothing is queued after the failure or the close that empties the queue.
            self._commands.put(("submit", ticket, range(len(rows))))
        return ticket

    async def score(self, prompts: list[list[int]], alternatives: int) -> list[list[TokenLogprobs | None]]:
        """The log-probs of each prompt's own tokens. A prompt is scored between two steps and counts as a row until then."""
        loop = asyncio.get_running_loop()
        asked = [
            PromptToScore(prompt_ids=ids, alternatives=alternatives, future=loop.create_future(), loop=loop) for ids in prompts
        ]
        with self._lock:
            self._take_places(len(asked))
            for one in asked:
                self._commands.put(("score", one, ()))
        try:
            return [await one.future for one in asked]
        finally:
            for one in asked:
                one.future.cancel()  # the engine passes over what nobody waits for

    def _take_places(self, rows: int) -> None:
        """Count rows in, or refuse them. Under the lock."""
        if self._failure is not None or self._closed:
            raise self._failure or EngineFailed("the engine is shut down")
        if self._outstanding + rows > self.max_rows + self.max_waiting_rows:
            raise Overloaded(
                f"{self._outstanding} responses are being written or waiting; this request asks for "
                f"{rows} more and the server takes {self.max_rows + self.max_waiting_rows} at once"
            )
        self._outstanding += rows

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
                if self._to_score:
                    self._score_one()
                if self._running:
                    failed_steps = 0 if self._step() else failed_steps + 1
        finally:  # however it ends, nobody is left waiting
            self._fail_all(EngineFailed("the engine is shut down" if self._closed else "the engine has failed"))

    def _score_one(self) -> None:
        one = self._to_score.popleft()
        try:
            if not one.future.cancelled():
                one.answer(self.engine.score(one.prompt_ids, one.alternatives))
        except UserError as error:
            one.fail(error)
        except Exception as error:  # fault boundary: one prompt
            logger.exception("a prompt could not be scored")
            one.fail(EngineFailed(f"the engine failed: {type(error).__name__}"))
        finally:
            self._release(1)

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
            idle = not self._running and not self._waiting and not self._to_score
            try:
                verb, ticket, rows = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if verb == "close":
                return False
            if verb == "submit":
                self._requests += 1
                self._waiting.extend((ticket, row) for row in rows)
            elif verb == "score":
                self._to_score.append(ticket)
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
                begun = {"begun": request.begun} if request.begun else {}
                number = self.engine.submit(request.prompt_ids, request.seed, request.params, request.rules, **begun)
            except UserError as error:  # a request that the engine refuses is its sender's problem alone
                self._drop(ticket, set(range(len(ticket.rows))))
                self._release(1)
                post(ticket.loop, ticket.fail, error)
            else:
                self._running[number] = (ticket, row)

    def _hand_out(self, events: list[TokenEvent]) -> None:
        per_ticket: dict[Ticket, list[tuple[int, TokenEvent]]] = {}
        for event in events:
            ticket, row = self._running[event.request_id]
            if ticket.streams:
                per_ticket.setdefault(ticket, []).append((row, event))
            else:
                ticket.kept.setdefault(row, []).append((row, event))
                if event.completion is not None:
                    per_ticket.setdefault(ticket, []).extend(ticket.kept.pop(row))
            if event.completion is not None:
                del self._running[event.request_id]
                self._release(1)
        self._tokens += len(events)
        for loop in {ticket.loop for ticket in per_ticket}:
            mine = [(ticket, items) for ticket, items in per_ticket.items() if ticket.loop is loop]
            post(loop, deliver_all, mine)

    def _release(self, rows: int) -> None:
        with self._lock:
            self._outstanding -= rows

    def _fail_running(self, failure: EngineFailed) -> None:
        tickets = {ticket for ticket, _ in self._running.values()}
        self._release(len(self._running))
        self._running.clear()
        for ticket in tickets:
            self._drop(ticket, set(range(len(ticket.rows))))  # those of its rows that still wait
            post(ticket.loop, ticket.fail, failure)

    def _fail_all(self, failure: EngineFailed) -> None:
        with self._lock:
            self._failure = failure
        tickets = {ticket for ticket, _ in self._waiting} | {ticket for ticket, _ in self._running.values()}
        while not self._commands.empty():
            verb, ticket, _ = self._commands.get()
            if verb == "submit":
                tickets.add(ticket)
            elif verb == "score":
                self._to_score.append(ticket)
        for one in self._to_score:
            one.fail(failure)
        self._waiting.clear()
        self._running.clear()
        for ticket in tickets:
            post(ticket.loop, ticket.fail, failure)

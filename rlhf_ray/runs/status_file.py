"""status.json: what a run is doing, for whoever sees its folder. Written by the run's own process, every other second."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.errors import RunFailed, StageStopped, UserError, whole_message
from rlhf_ray.runs.pace import Pace
from rlhf_ray.runs.storage import write_atomically

BEAT_S = 2.0
State = Literal["running", "finished", "stopped", "failed"]
EXIT_CODES: dict[State, int] = {"finished": 0, "failed": 1, "stopped": 130}


@dataclass(slots=True, kw_only=True)
class Written:
    """What status.json holds. Times are seconds since 1970, by the clock of the run's host."""

    state: State
    host: str
    process: int
    process_started: int | None  # clock ticks after the host's start, which tells a process from a later one of its number
    started: float
    written: float
    exit_code: int | None = None  # of a run that has ended
    words: str | None = None  # why it has
    stage: str | None = None
    step: int | None = None
    total: int | None = None  # steps of the stage
    total_is_estimate: bool = False
    phase: str | None = None
    phase_since: float | None = None
    waiting_for: str | None = None
    waiting_since: float | None = None
    samples_per_s: float | None = None
    tokens_per_s: float | None = None
    seconds_per_step: float | None = None
    left_s: float | None = None  # to the end of the stage, from `written` on
    metrics: str | None = None  # where Prometheus can read the run's metrics


class StatusFile:
    """Hears the progress events of a run and writes them down. `told` is the run."""

    def __init__(
        self, path: Path, tells: Callable[[Written], None] = lambda now: None, clock: Callable[[], float] = time.time
    ):
        """tells: hears what is written, every time."""
        self._clock = clock
        now = clock()
        me = os.getpid()
        self._path, self._tells, self._ended = path, tells, threading.Event()
        self._lock = threading.RLock()  # a signal's handler may need it while the main thread has it
        self._now = Written(
            state="running", host=socket.gethostname(), process=me, process_started=process_started(me), started=now, written=now,
            phase="start", phase_since=now,
        )  # fmt: skip
        self._pace, self._limit_s = Pace(), None

    @contextmanager
    def told(self) -> Generator[None]:
        """The run: it is written down that it goes on, and with which words and exit code it ends."""
        self.write()
        threading.Thread(target=self._beat, name="status", daemon=True).start()
        try:
            yield
        except StageStopped as stopped:
            self.end("stopped", str(stopped))
            raise
        except KeyboardInterrupt:
            self.end("stopped", "stopped at once")
            raise
        except UserError as error:
            self.end("failed", str(error), 2)
            raise
        except RunFailed as failure:
            self.end("failed", str(failure))
            raise
        except BaseException as error:  # fault boundary: the run; what ends it is written down, and raised
            self.end("failed", whole_message(error))
            raise
        else:
            self.end("finished", None)

    def end(self, state: State, words: str | None, exit_code: int | None = None) -> None:
        """The run is over."""
        self._ended.set()
        with self._lock:
            now = self._now
            now.state, now.words = state, words
            now.exit_code = EXIT_CODES[state] if exit_code is None else exit_code
            now.waiting_for = now.waiting_since = now.left_s = now.metrics = None
        self.write()

    def hear(self, event: dict[str, Any]) -> None:
        """A progress event of a stage."""
        with self._lock:
            self._hear(event)
        if any(event.get(key) for key in ("started", "done", "skipped")):
            self.write()

    def exports(self, metrics: str) -> None:
        """Where Prometheus can read the run's metrics."""
        self._now.metrics = metrics

    def write(self) -> None:
        with self._lock:
            self._now.written = self._clock()
            self._now.left_s = self._left()
            self._tells(self._now)
            text = json.dumps(asdict(self._now), indent=2) + "\n"
        with suppress(OSError):  # a full disk: whoever looks sees that nothing new was written
            write_atomically(self._path, text, durable=self._ended.is_set())

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            self.write()

    def _hear(self, event: dict[str, Any]) -> None:
        now, at = self._now, self._clock()
        if event.get("started"):
            self._pace, self._limit_s = Pace(), None
            now.stage, now.step, now.total, now.total_is_estimate = event["stage"], None, None, False
            now.samples_per_s = now.tokens_per_s = now.seconds_per_step = None
            self._enter("start", at)
        elif event.get("done"):
            self._enter("done", at)
        if "goes_on_from" in event:
            now.step = event["goes_on_from"]
        for name in ("phase", "doing"):
            if event.get(name):
                self._enter(event[name], at)
        if "waiting_for" in event:
            now.waiting_for, now.waiting_since = event["waiting_for"], at - event.get("waiting_s", 0.0)
        if "step" in event:
            self._step(event, at)

    def _step(self, event: dict[str, Any], at: float) -> None:
        """A step is done."""
        now = self._now
        if event["step"] != now.step and not event.get("doing") and "metrics" not in event:
            self._enter("training", at)  # a supervised stage, whose workers tell of no phases
        now.step, now.total = event["step"], event.get("total")
        now.total_is_estimate = bool(event.get("total_is_estimate"))
        now.waiting_for = now.waiting_since = None
        rates = event | event.get("metrics", {})
        now.samples_per_s, now.tokens_per_s = rates.get("samples_per_s"), rates.get("tokens_per_s")
        self._limit_s = event.get("limit_s")
        self._pace.step(event["step"], at, event.get("elapsed_s"))
        now.seconds_per_step = self._pace.seconds_per_step

    def _enter(self, phase: str, at: float) -> None:
        if phase != self._now.phase:
            self._now.phase, self._now.phase_since = phase, at
            self._now.waiting_for = self._now.waiting_since = None

    def _left(self) -> float | None:
        now = self._now
        if now.state != "running" or not now.total or now.step is None or now.total <= now.step:
            return None
        return self._pace.left(now.total, self._clock(), self._limit_s)


def process_started(number: int) -> int | None:
    """When a process of this host began, in clock ticks after the host's start; None: there is no such process."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])

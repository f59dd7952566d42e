"""`rlhf-ray serve`: a server, one line that says where it listens, and a clean end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rlhf_ray.config import Precision
from rlhf_ray.serving.config import Limits, Notes, ServedStage, checked_number
from rlhf_ray.serving.page.options import PageOptions
from rlhf_ray.serving.server import Server

DRAIN_S = 120.0


class Terminated(SystemExit):
    """SIGTERM has come."""


def serve(
    path: str | Path,
    *,
    more_models: Mapping[str, str | Path] | None = None,
    also: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    name: str | None = None,
    replicas: int = 1,
    gpus: float | None = None,
    threads: int | None = None,
    precision: Precision = "auto",
    engine: str | None = None,
    trust_remote_code: bool = False,
    allow_special_tokens: bool = False,
    limits: Limits = Limits(),
    allowed_hosts: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    page: PageOptions = PageOptions(),
    drain_s: float = DRAIN_S,
    stage: ServedStage = "policy",
    notes: Notes = Notes(),
    block: bool = True,
    say: Callable[[str], None] = print,
) -> Server:
    """Serve a model folder, or the policy of a run folder, over OpenAI's HTTP API.

    more_models: name -> folder of further models at the same endpoint, or of adapters on the first one.
    also: names of further models of the run folder (base, sft, dpo, ppo, best; or all), in the first one's replicas.
    stage: "reward" serves a run's reward model, or a reward model's folder, by OpenRLHF's protocol (POST /get_reward).
    port 0 takes a free one. `gpus` is per replica (None: one each where there are enough, else none); `threads` are
    torch's, per replica (None: an equal share of the cores). `engine` None: the run's, or torch (`serving.engine_choice`).
    `allow_special_tokens`: clients may write special tokens by their names, which are plain text otherwise.
    With `block` it ends only by KeyboardInterrupt (Ctrl-C; the command exits with 130) or SystemExit (SIGTERM: with 0, after what
    is running has been answered or `drain_s` have passed), and releases everything; without, the caller closes the server.

    Raises UserError for what the user can put right: no such model, a port in use, no API key beyond loopback.
    """
    checked_number("drain_s", drain_s, 0)
    server = Server(
        path, more_models=more_models or {}, also=also, host=host, port=port, api_key=api_key, name=name,
        replicas=replicas, gpus=gpus,
        threads=threads, precision=precision, engine=engine, trust_remote_code=trust_remote_code,
        allow_special_tokens=allow_special_tokens, limits=limits, allowed_hosts=allowed_hosts, cors_origins=cors_origins,
        stage=stage, notes=notes, page=page,
    )  # fmt: skip
    said = [note for model in server.models for note in (model.engine.note, model.note) if note is not None]
    for note in dict.fromkeys(said):
        say(note)
    if not block:
        try:
            server.start()
        except BaseException:  # fault boundary: whatever ended the start, Ctrl-C too, leaves no cluster behind
            server.close()
            raise
        return server
    _serve_until_stopped(server, drain_s, say)
    return server


def _serve_until_stopped(server: Server, drain_s: float, say: Callable[[str], None]) -> None:
    with _stopping_on_signals() as take_signals:
        try:
            for model in server.models:
                adapter = "" if model.adapter is None else f" and {model.adapter}"
                say(f"Loading '{model.name}' from {model.folder}{adapter} ...")
            server.start(when_ray_runs=take_signals)  # ray.init puts a handler of its own in place
            say(server.announcement())
            if server.note_problem is not None:
                say(f"`rlhf-ray publish` and `serve --stop` won't find this server: {server.note_problem}")
            server.wait(say)
        except Terminated:
            if not server.serving:
                raise
            server.drain(drain_s, say)
            raise SystemExit(0) from None
        finally:
            server.close()


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[Callable[[], None]]:
    """Ctrl-C raises KeyboardInterrupt, SIGTERM `Terminated`; a second signal of either kind stops at once.

    Ray's processes die with this one (it asks the kernel for that), so stopping at once leaves none behind. Yields the
    function that installs the handlers (again).
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    seen: list[int] = []

    def handle(number: int, frame: object) -> None:
        seen.append(number)
        if len(seen) > 1:
            os._exit(128 + number)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(128 + number)

    def take() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    take()
    try:
        yield take
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

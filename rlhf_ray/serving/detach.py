"""`serve --detach`: the same command in a session of its own, which outlives the terminal; `serve --stop` ends it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.publish.servers import ServerNote, find_server, running_servers, servers_folder, stop_server

START_S = 900.0
AFTER_DRAIN_S = 30.0  # for Ray to end


def detach(arguments: Sequence[str], say: Callable[[str], None] = print) -> ServerNote:
    """Start `rlhf-ray ARGUMENTS` and return when it answers requests. Its words go to a log beside its note.

    UserError with its own words where it does not start.
    """
    folder = servers_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = folder / f"serve-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10_000:04d}.log"
        with open(log, "w") as out:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "rlhf_ray", *arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        raise UserError(f"the server could not be started with its log in {folder} ({error})") from None
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        note = next((each for each in running_servers() if each.pid == process.pid), None)
        if note is not None and _answers(note):
            said = _said(log).replace(" (Ctrl-C stops it)", "")  # not from here
            say(f"{said}\nIt runs as process {process.pid}; its words go to {log}.")
            say(f"End it: rlhf-ray serve --stop --port {note.port}")
            return note
        code = process.poll()
        if code is not None:
            raise (UserError if code == 2 else RunFailed)(f"the server did not start: {_said(log) or f'it ended with {code}'}")
        time.sleep(0.2)
    process.terminate()
    raise RunFailed(f"the server did not start within {START_S:g} s; its words are in {log}")


def stop(port: int | None, path: str | Path | None, drain_s: float, say: Callable[[str], None] = print) -> None:
    """End a server of this machine's as SIGTERM does: what is running is answered first."""
    note = find_server(port, path)
    say(f"Ending the server at {note.url} (process {note.pid}); running requests are answered first, for at most {drain_s:g} s.")
    stop_server(note, drain_s + AFTER_DRAIN_S)
    say("It has ended.")


def _answers(note: ServerNote) -> bool:
    try:
        return httpx.get(f"{note.url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _said(log: Path) -> str:
    return log.read_text(errors="replace").strip()

"""The servers that run on this machine: each leaves a note in its user's state folder, for `publish` and `serve --stop`.

A note holds the token that controls its server, so folder and file are their owner's alone.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlhf_ray.config.user_paths import expanded
from rlhf_ray.errors import UserError

FOLDER_VARIABLE = "RLHF_RAY_SERVERS"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerNote:
    """One server."""

    pid: int
    started: str  # when, as the kernel counts it: another process may get the number later
    url: str
    port: int
    served: dict[str, str]  # name of a model -> the folder that was given
    stage: str  # policy or reward
    log: str | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(24), repr=False)

    @property
    def names(self) -> str:
        """Of its models: "ppo and sft"."""
        return " and ".join(self.served)

    @property
    def runs(self) -> bool:
        return started_at(self.pid) == self.started


def servers_folder() -> Path:
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return expanded(given)
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return expanded(state) / "rlhf_ray" / "servers"


def note_of(port: int) -> Path:
    return servers_folder() / f"{port}.json"


def write_note(note: ServerNote) -> Path:
    """UserError where the state folder can't be written."""
    path = note_of(note.port)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(note), file)
        temporary.rename(path)
    except OSError as error:
        raise UserError(
            f"the note of this server can't be written to {path} ({error.strerror}); set {FOLDER_VARIABLE} to a folder of yours"
        ) from None
    return path


def running_servers() -> list[ServerNote]:
    """Notes that a killed server left behind are passed over."""
    found: list[ServerNote] = []
    for path in sorted(servers_folder().glob("[0-9]*.json")):
        try:
            note = ServerNote(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):  # it ended meanwhile, or another version of this package wrote it
            continue
        if note.runs:
            found.append(note)
    return found


def find_server(port: int | None = None, source: str | Path | None = None) -> ServerNote:
    """The server at `port`; without one, that which serves `source`; else the only one. UserError where that is not clear."""
    running = running_servers()
    if port is not None:
        running = [note for note in running if note.port == port]
    elif source is not None:
        running = _serving(running, source) or running
    if len(running) == 1:
        return running[0]
    if not running:
        where, others = ("", []) if port is None else (f" at port {port}", running_servers())
        remedy = f"there is {_told(others)}" if others else "start one: rlhf-ray serve RUN"
        raise UserError(f"no server of yours runs on this machine{where}; {remedy}")
    raise UserError(f"several servers run here; say which: {_told(running)}")


def _told(notes: list[ServerNote]) -> str:
    return ", ".join(f"--port {note.port} ({note.names})" for note in notes)


def server_of(run: str | Path) -> ServerNote | None:
    """The server that serves this run or a model in it; None where there is none. UserError where there are several."""
    own = _serving(running_servers(), run)
    if len(own) > 1:
        raise UserError(f"several servers serve {run}: {', '.join(f'--port {note.port}' for note in own)}; stop all but one")
    return own[0] if own else None


def _serving(notes: list[ServerNote], source: str | Path) -> list[ServerNote]:
    place = expanded(source).resolve()
    return [note for note in notes if any(_within(place, Path(given)) for given in note.served.values())]


def _within(place: Path, given: Path) -> bool:
    """Whether one holds the other: a run folder and a model of it belong together."""
    return place == given or given in place.parents or place in given.parents


def stop_server(note: ServerNote, longest_s: float) -> None:
    """Ask it to end, as SIGTERM does, and wait. UserError where it still runs after longest_s."""
    os.kill(note.pid, signal.SIGTERM)
    deadline = time.monotonic() + longest_s
    while note.runs:
        if time.monotonic() > deadline:
            raise UserError(
                f"the server {note.pid} still answers requests after {longest_s:g} s; wait, or end it at once: kill -9 {note.pid}"
            )
        time.sleep(0.1)
    note_of(note.port).unlink(missing_ok=True)


def started_at(pid: int) -> str:
    """Of a process, in the kernel's ticks; "" where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]

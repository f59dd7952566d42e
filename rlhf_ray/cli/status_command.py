"""`rlhf-ray status`: a run as its folder tells of it, once or again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.text import Text

from rlhf_ray.cli.command_errors import console
from rlhf_ray.cli.display import duration
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.errors import UserError
from rlhf_ray.runs.contents import to_tell
from rlhf_ray.runs.remote import local_copy
from rlhf_ray.runs.remote_store import is_url
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.status import Status, as_json, read_status
from rlhf_ray.runs.status_file import Written

WATCH_S = 1.0
STORE_WATCH_S = 5.0  # each look asks the store a few times, and the run writes there every 10 s
STYLES = {"running": "", "finished": "green", "stopped": "yellow"}


def status(
    run_dir: Annotated[str, typer.Argument(help="a run folder, or its URL")],
    watch: Annotated[bool, typer.Option("--watch", help="until the run has ended")] = False,
    json: Annotated[bool, typer.Option("--json", help="for scripts")] = False,
):
    """What a run is doing, from any host that sees its folder. Returns the run's exit code once it has ended."""
    if not is_url(run_dir) and not Path(run_dir).is_dir():
        raise UserError(f"'{run_dir}' is not a folder; name a run folder, for example runs/demo")

    def look() -> Status:
        return read_status(RunFolder(local_copy(run_dir, to_tell).absolute()))

    now = look()
    if json:
        console.print(as_json(now), highlight=False, markup=False, soft_wrap=True)
    elif watch:
        now = (_watch if console.is_terminal else _follow)(look, now, STORE_WATCH_S if is_url(run_dir) else WATCH_S)
    else:
        _print(lines(now))
    raise typer.Exit(now.exit_code or 0)


def _print(words: list[str]) -> None:
    console.print("\n".join(words), highlight=False, markup=False, soft_wrap=True)


def _follow(look: Callable[[], Status], now: Status, every_s: float = WATCH_S) -> Status:
    """Without a terminal: all there is, then a line per step, then all there is at the end."""
    _print(lines(now))
    while not now.ended:
        time.sleep(every_s)
        before, now = now, look()
        if now.ended:
            _print(lines(now))
        elif now.written is not None and (before.written is None or _place(now.written) != _place(before.written)):
            _print([_step(now.written)])
    return now


def _place(written: Written) -> tuple[str | None, int | None]:
    return written.stage, written.step


def _watch(look: Callable[[], Status], now: Status, every_s: float = WATCH_S) -> Status:
    """One block that is renewed in place."""
    with Live(console=console, refresh_per_second=4) as live:
        while True:
            live.update(Text("\n".join(lines(now)), style=STYLES.get(now.state, "red")))
            if now.ended:
                return now
            time.sleep(every_s)
            now = look()


def lines(now: Status) -> list[str]:
    """The state; the step; what is waited for; what is done; restarts; the last checkpoint; the last event."""
    written = now.written
    found = [_state(now)]
    if written is not None and written.stage is not None and not now.ended:
        found += [_step(written), _phase(written, now.silent_s or 0.0)]
    found.append(_stages(now))
    if now.restarts:
        found.append("restarts    " + ", ".join(f"{role} {count}" for role, count in sorted(now.restarts.items())))
    if now.checkpoint is not None:
        found.append(f"checkpoint  {now.checkpoint}, {duration(now.checkpoint_age_s or 0)} old")
    if written is not None and written.metrics is not None and not now.ended:
        found.append(f"metrics     {written.metrics}")
    if now.last_event is not None:
        what, done = (" ".join(str(now.last_event.get(key, "")).split()) for key in ("what", "done"))
        found.append(f"last event  {what}: {done}")
    return found


def _state(now: Status) -> str:
    words, written = now.state, now.written
    if written is not None and not now.ended:
        words += f" for {duration(written.written - written.started)}, process {written.process} on {written.host}"
    elif written is not None and now.silent_s is not None:
        words += f" {duration(now.silent_s)} ago"
    if now.exit_code is not None:
        words += f", exit code {now.exit_code}"
    return words + (f": {now.words}" if now.words else "")


def _step(written: Written) -> str:
    stage = written.stage or ""
    words = f"{(STAGES[stage].words if stage in STAGES else stage):<11} "
    if written.step is None:
        return words + "before its first step"
    words += f"step {written.step}"
    if written.total:
        words += f" of {'about ' if written.total_is_estimate else ''}{written.total}"
    if written.samples_per_s is not None:
        words += f", {written.samples_per_s:.3g} samples per second"
    elif written.tokens_per_s is not None:
        words += f", {written.tokens_per_s:.3g} tokens per second"
    if written.seconds_per_step is not None:
        words += f", {written.seconds_per_step:.3g} s per step"
    if written.left_s is not None:
        end = time.strftime("%H:%M:%S", time.localtime(written.written + written.left_s))
        words += f", {duration(written.left_s)} left (about {end})"
    return words


def _phase(written: Written, age_s: float) -> str:
    at = written.written + age_s
    words = f"phase       {written.phase or 'start'}"
    if written.phase_since is not None:
        words += f", for {duration(at - written.phase_since)}"
    if written.waiting_for is not None and written.waiting_since is not None:
        words += f"; waits {duration(at - written.waiting_since)} for {written.waiting_for}"
    return words


def _stages(now: Status) -> str:
    done, to_do = ", ".join(now.done) or "none", ", ".join(now.to_do) or "none"
    return f"stages      done: {done}; to do: {to_do}"

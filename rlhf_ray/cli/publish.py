"""The command `rlhf-ray publish`: a version of a model into a server that runs, or out of it."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_ray.cli.command_errors import console, in_words
from rlhf_ray.errors import UserError

if TYPE_CHECKING:
    from rlhf_ray.publish.version import Version

SHELF = "published"  # folder of the versions of a run


@in_words
def publish(
    source: Annotated[
        str | None, typer.Argument(help="a run folder (its policy), a PPO checkpoint, a model folder or an adapter; or its URL")
    ] = None,
    canary: Annotated[str, typer.Option(help="share of the requests that it takes, e.g. 10%")] = "100%",
    model: Annotated[str | None, typer.Option(help="its name at the server; default: the first one")] = None,
    port: Annotated[int | None, typer.Option(help="of the server; default: that which serves this run")] = None,
    watch_s: Annotated[float, typer.Option(help="seconds in which a version with all requests may still be rolled back")] = 600.0,
    max_failed: Annotated[
        float, typer.Option(help="rolled back if 3 or more answers failed, by this much more of all than of the old version's")
    ] = 0.05,
    max_slower: Annotated[float, typer.Option(help="rolled back if a token takes more than this many times as long")] = 2.0,
    max_worse: Annotated[
        float, typer.Option(help="rolled back if the judge's mean score is lower by more than this many standard errors")
    ] = 3.0,
    rollback: Annotated[bool, typer.Option("--rollback", help="back to the version before; no SOURCE")] = False,
    history: Annotated[bool, typer.Option("--history", help="print which versions there are and were")] = False,
):
    """Swap a new version into the running server: its replicas load it, check its log-probs, and it takes its share."""
    from rlhf_ray.config.user_paths import expanded
    from rlhf_ray.publish import client
    from rlhf_ray.publish.servers import find_server
    from rlhf_ray.runs.contents import to_export
    from rlhf_ray.runs.remote import local_copy, reading_copy

    here = None if source is None else reading_copy(source)
    if rollback or history:
        note = find_server(port, here)
        state = client.roll_back(note, model=model, why="asked for") if rollback else _state(note.url, model)
        _tell(state, entries=len(state["history"]) if history else 1)
        return
    if source is None:
        raise UserError("publish needs a version: rlhf-ray publish RUN; or --rollback, or --history")
    share = client.share_of(canary)
    note = find_server(port, here)
    place = expanded(local_copy(source, to_export("ppo"))).resolve()
    console.print(f"Publishing {source} to {note.url} ...", highlight=False, soft_wrap=True)
    since = time.time() - 1  # file systems keep coarse times
    version = _version(place, note.served, _shelf_of(source))
    with client.dropped_if_refused(Path(version.adapter or version.folder), since):
        state = client.publish(
            note, version, model=model, share=share, watch_s=watch_s,
            thresholds={"failed_share": max_failed, "slower": max_slower, "worse": max_worse},
        )  # fmt: skip
    _tell(state, entries=1)


def _version(place: Path, served: dict[str, str], shelf: Path | None) -> Version:
    """A copy of what `place` holds, on the shelf; None: that beside its run."""
    from rlhf_ray.publish.client import kept_copy
    from rlhf_ray.serving.model_folder import find_model, is_adapter

    if (place / "state.json").exists():
        from rlhf_ray.ppo.export_model import export_model

        shelf = _made(shelf or place.parents[2] / SHELF)
        with tempfile.TemporaryDirectory(dir=shelf) as folder:
            return kept_copy(export_model(place, Path(folder) / "model", "ppo", "float32", None), shelf)
    if is_adapter(place):
        base = find_model(next(iter(served.values())))
        return kept_copy(place, _made(shelf or place.parent / SHELF), base)
    folder = find_model(place)
    return kept_copy(folder, _made(shelf or (place if folder != place else place.parent) / SHELF))


def _shelf_of(source: str) -> Path | None:
    """Where the versions of a run in a store are: not beside its copy here, which holds what the store holds and nothing else."""
    from rlhf_ray.runs.remote_store import is_url
    from rlhf_ray.runs.run_folder import working_copy

    return working_copy(source, SHELF) if is_url(source) else None


def _made(shelf: Path) -> Path:
    try:
        shelf.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{shelf} can't be made ({error.strerror}): a published version is copied there, so that it stays"
        ) from None
    return shelf


def _state(url: str, model: str | None) -> dict[str, Any]:
    import httpx

    key = os.environ.get("RLHF_RAY_API_KEY")
    try:
        answer = httpx.get(
            f"{url}/versions", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=10, trust_env=False
        )
        states = answer.json()["data"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise UserError(
            f"the server at {url} did not say which versions it has ({error}); set RLHF_RAY_API_KEY if it has a key"
        ) from None
    found = next((state for state in states if model in (None, state["model"])), None)
    if found is None:
        raise UserError(f"this server has no model '{model}'; it has {', '.join(state['model'] for state in states)}")
    return found


def _tell(state: dict[str, Any], entries: int) -> None:
    for entry in state["history"][-entries:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
        more = "".join(
            f", {words} {entry[name]:.3g}" for name, words in (("share", "share"), ("logprob_gap", "gap of log-probs"))
            if entry.get(name) is not None
        )  # fmt: skip
        why = f": {entry['why']}" if "why" in entry else ""
        _say(f"{when}  {state['model']} {entry['version']} {entry['what']}{more}{why}")
    for version in state["versions"]:
        seen = f"{version['answers']} answers, {version['failed']} failed"
        pace = "" if version["ms_per_token"] is None else f", {version['ms_per_token']:.3g} ms per token"
        score = "" if version["score"] is None else f", judge {version['score']:.3g} ({version['scored']} answers)"
        _say(f"{version['id']}  {version['share']:.0%} of the requests  {seen}{pace}{score}  {version['folder']}")


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)

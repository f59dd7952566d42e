"""The port of a server, and what it says of itself: where it listens, a request to try, why it could not start."""

from __future__ import annotations

import errno
import json
import re
import shlex
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_ray.errors import UserError
from rlhf_ray.publish.servers import running_servers
from rlhf_ray.serving.config import API_KEY_VARIABLE, ServedStage, addresses_of

if TYPE_CHECKING:
    from ray.serve.schema import ServeStatus

    from rlhf_ray.votes.records import Prompt


def listening(host: str, port: int) -> tuple[socket.socket, int]:
    """The port, ours from now on: who connects while the model loads waits for it. -> and its number"""
    family = addresses_of(host)[0][0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()  # a port that is bound only, others can bind too
    except OSError as error:
        bound.close()
        owner = _owner(port) if error.errno == errno.EADDRINUSE else ""
        raise UserError(f"can't listen on {host}:{port} ({error.strerror}{owner}); choose another with --port") from None
    return bound, bound.getsockname()[1]


def _owner(port: int) -> str:
    """Which server of this user's has the port, in words; "" for somebody else's."""
    found = next((note for note in running_servers() if note.port == port), None)
    return "" if found is None else f" by your server of {found.names}, which `rlhf-ray serve --stop --port {port}` ends"


def url_of(host: str, port: int) -> str:
    """As a client on this machine writes it."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announced(
    url: str, models: Sequence[str], stage: ServedStage, *, has_key: bool, votes: str | None, prompts: Sequence[Prompt] = ()
) -> str:
    """votes: the name of their database, if people may vote. prompts: those that are compared."""
    key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if has_key else ""
    names = " and ".join(f"'{name}'" for name in models)
    if stage == "reward":
        body, what, path = {"query": ["Hello, world."], "prompts": ["Hello"]}, f"the reward model {names}", "get_reward"
        where = f"{url}/{path}"
    else:
        body, what, path = {"model": models[0], "prompt": _example(prompts), "max_tokens": 40}, names, "v1/completions"
        where = f"{url}/v1"
    told = "chat and playground" if votes is None else f"chat, votes ({votes}) and results"
    page = "" if stage == "reward" else f" In a browser, {told}: {url}/"
    if votes is not None and not prompts:
        page += "\nThere are no prompts to compare answers to: raters write their own, or --prompts FILE gives a list."
    return (
        f"Serving {what} at {where} (Ctrl-C stops it).{page}\nTry:\n"
        f"  curl {url}/{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}"
    )


def _example(prompts: Sequence[Prompt]) -> str:
    """A prompt to try, of those that the model knows."""
    return next((each for each in prompts if isinstance(each, str) and len(each) <= 100), "Once upon a time")


def start_failure(status: ServeStatus, error: RuntimeError) -> Exception:
    """What the replica said, without the tracebacks of the layers around it."""
    messages = [deployment.message for app in status.applications.values() for deployment in app.deployments.values()]
    found = re.findall(r"UserError: (.+)", "\n".join(messages))
    if found:
        return UserError(found[-1].strip())
    return RuntimeError("the model could not be started: " + ("\n".join(messages) or str(error)))

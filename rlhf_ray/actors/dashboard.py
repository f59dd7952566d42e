"""The client of a Ray dashboard, which takes jobs: where it is, this machine's token, and deadlines for its answers."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from rlhf_ray.errors import UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the dashboard at `address` (http://HEAD:8265), with this machine's token."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    if "://" not in address:
        address = f"http://{address}"
    try:
        url = urlsplit(address)
        port, host = url.port or {"https": 443}.get(url.scheme, 80), url.hostname
    except ValueError:  # a port that is none, half of an IPv6 address
        url, port, host = urlsplit(""), 0, None
    if url.scheme not in ("http", "https") or not host:
        raise UserError(f"--address '{address}' is not a dashboard address; give http://HEAD:8265")
    try:
        socket.create_connection((host, port), timeout=10).close()
    except (OSError, UnicodeError) as error:  # the latter: a label of over 63 letters
        words = error.strerror if isinstance(error, OSError) else None
        raise UserError(
            f"no Ray dashboard answers at {address} ({words or error}); is the cluster up, and is "
            "this port open to you (ssh -N -L 8265:127.0.0.1:8265 HEAD)?"
        ) from None
    headers = {**_given_headers(), **_token_header()}
    # Ray lets these two override the address that it is given; an --address that means another cluster must win.
    logging.getLogger("ray").setLevel(logging.WARNING)  # this file reports the upload; closed sockets are harmless
    logging.getLogger("ray.dashboard.modules").setLevel(logging.WARNING)
    for module in ("dashboard_sdk", "job.sdk"):  # these set a level of their own
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    hidden = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        return within(60, f"the dashboard at {address}", lambda: JobSubmissionClient(address, headers=headers))
    finally:
        os.environ.update(hidden)


def _given_headers() -> dict[str, str]:
    given = os.environ.get("RAY_JOB_HEADERS") or "{}"
    try:
        return dict(json.loads(given))
    except (ValueError, TypeError) as error:
        raise UserError(f"RAY_JOB_HEADERS is {given[:60]!r}, which is no JSON object; correct or unset it") from error


def _token_header() -> dict[str, str]:
    """The token from where Ray looks for it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    if os.environ.get("RAY_AUTH_MODE", "token") == "disabled":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and file.is_file():
        try:
            token = file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Ray's token can't be read from {file} ({error}); mend that, or set RAY_AUTH_TOKEN") from error
    return {"Authorization": f"Bearer {token}"} if token else {}


def within(deadline_s: float, what: str, call: Callable):
    """call(), or a sentence naming what was waited for: Ray's client sets no time-outs of its own."""
    outcome: list = []

    def work() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:  # fault boundary: this thread; the caller's raises it again
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if not outcome:
        raise UserError(f"waited {deadline_s:.0f} s for {what}; look at the dashboard's log on the head node")
    value, error = outcome[0]
    if isinstance(error, AuthenticationError):
        raise UserError(
            "the cluster refused this machine's token; copy the head's (`ray get-auth-token` there) into "
            "~/.ray/auth_token or set RAY_AUTH_TOKEN"
        ) from None
    if isinstance(error, ConnectionError):
        raise UserError(f"lost {what}: {error}") from None
    if error is not None:
        raise error
    return value

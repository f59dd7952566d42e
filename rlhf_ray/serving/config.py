"""The options of a server. They are checked before anything starts."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rlhf_ray.config import Precision
from rlhf_ray.config.threads import ALONE_ENVIRONMENT
from rlhf_ray.config.user_paths import expanded
from rlhf_ray.errors import UserError

logger = logging.getLogger(__name__)

ServedStage = Literal["policy", "reward"]
API_KEY_VARIABLE = "RLHF_RAY_API_KEY"
# Before torch loads: OpenMP threads that spin for long when idle take the cores from Ray's and the proxy's.
REPLICA_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def replica_environment(threads: float, cores: float) -> dict[str, str]:
    """The environment of replicas that together compute with `threads` threads on `cores` cores."""
    return REPLICA_ENVIRONMENT | (ALONE_ENVIRONMENT if threads <= cores else {})


def checked_number(name: str, value: Any, least: float, *, whole: bool = False) -> float:
    """UserError for what is no finite number, or less. value: a number or its text, as `serve run` gives it."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < least or (whole and not number.is_integer()):
        raise UserError(f"{name} is {value!r}; give {'a whole' if whole else 'a'} number of at least {least:g}")
    return number


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that one request, or all requests together, may ask for."""

    max_prompt_tokens: int | None = None
    """Longest prompt; None: the model's positions minus one."""
    max_tokens: int | None = None
    """Longest completion; None: the model's positions minus the prompt."""
    max_n: int = 16
    """Choices per prompt."""
    max_prompts: int = 64
    """Prompts per completion request."""
    max_body_bytes: int = 1 << 20
    max_rows: int = 32
    """Choices decoded together in one batch, per replica."""
    max_cache_tokens: int | None = None
    """Choices decoded together times tokens of the longest, per replica; others wait. None: what half of the free memory holds."""
    max_connections: int = 512
    """Open connections. For a new one beyond them one that waits for its client is closed; if all are busy, it gets 503."""
    max_waiting_rows: int = 128
    """Choices that wait for a place in the batch, per replica. The server refuses more with status 429."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            smallest = 0 if name == "max_waiting_rows" else 1
            if value is not None:
                checked_number(name, value, smallest, whole=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How one replica runs the model."""

    model: str
    """Absolute path of a Hugging Face model folder."""
    adapter: str | None = None
    """Absolute path of an adapter on it in peft's format."""
    precision: Precision = "auto"
    device: str = "cpu"
    threads: int = 1
    """torch threads; more is not faster for a model of a few million parameters."""
    trust_remote_code: bool = False
    allow_special_tokens: bool = False
    """Whether clients may write special tokens by their names; else these names are plain text, as they are in training."""
    engine: str = "torch"
    """A name of `tables.engines` that is continuous."""
    critic: str | None = None
    """Absolute path of a run folder whose PPO has left a critic, for /v1/values."""
    plugins: tuple[str, ...] = ()
    """Modules that are imported first, of which one may have registered it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AppConfig:
    """What the HTTP app needs to know besides the model."""

    name: str
    """The model's id in requests and in /v1/models."""
    others: tuple[str, ...] = ()
    """The ids of the other models of this server."""
    version: str | None = None
    """Of the model, as answers name it (`system_fingerprint`)."""
    keep_texts: bool = False
    """Whether texts of prompts and responses are told to the front: for its log, and for the judge."""
    api_key: str | None = field(default=None, repr=False)
    """None: no authentication."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names that a request's Host header may have, beside loopback addresses; None: any."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may use the server from a browser."""
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """What a server notes of its answers."""

    request_log: Path | None = None
    """A file that a line of JSON is appended to for each answer."""
    log_texts: bool = False
    """Prompts and responses too."""
    judge: str | None = None
    """Address of a reward server that scores answers, so that versions can be compared by it."""

    def __post_init__(self) -> None:
        if self.log_texts and self.request_log is None:
            raise UserError("--log-texts without --request-log FILE has nowhere to write; give the file")

    @property
    def keep_texts(self) -> bool:
        return self.log_texts or self.judge is not None


def addresses_of(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """What `host`, a name or an address, stands for; "" is every interface. UserError where it stands for nothing."""
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # ValueError: an empty label, one of over 63 letters, a NUL
        raise UserError(
            f"host {host!r} does not resolve ({error}); use 127.0.0.1 or an address of this machine"
        ) from None
    return [(info[0], str(info[4][0])) for info in found]


def is_loopback(host: str) -> bool:
    """True if `host` (a name or an address) can be reached from this machine alone."""
    addresses = {address for _, address in addresses_of(host)}
    return all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses)


def read_api_key(path: str | Path) -> str:
    """The key that a file holds in its only line."""
    try:
        key = expanded(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the API key can't be read from '{path}' ({error}); give a text file with the key") from None
    if not key:
        raise UserError(f"'{path}' is empty; write the API key into it")
    mode = stat.S_IMODE(expanded(path).stat().st_mode)
    if mode & 0o077:
        logger.warning("%s can be read by others (mode %03o), and the API key with it; its owner should run: chmod 600 %s",
                       path, mode, path)  # fmt: skip
    return key


def given_key(on_command_line: str | None, path: str | Path | None) -> str | None:
    """The key of a command's options: that of the file, if one is given."""
    if on_command_line is not None:
        raise UserError(
            "--api-key would show the key to everybody who lists this machine's processes; "
            f"write it into a file and give --api-key-file, or set {API_KEY_VARIABLE}"
        )
    return None if path is None else read_api_key(path)


def resolve_allowed_hosts(host: str, more: Sequence[str]) -> tuple[str, ...] | None:
    """For `AppConfig.allowed_hosts`: beyond loopback any name is right unless some are given."""
    if not more and not is_loopback(host):
        return None
    for name in more:
        if not name or not name.isascii() or any(mark in name for mark in "/:* "):
            raise UserError(f"allowed host {name!r} is no host name; write it without scheme, port and wildcard")
    return ("localhost", host, *more)


def check_cors_origins(origins: Sequence[str], api_key: str | None) -> tuple[str, ...]:
    for origin in origins:
        if origin == "*" and api_key is None:
            raise UserError("any web page could use the model with the CORS origin '*' and no API key; name the origins")
        parts = urlsplit(origin)
        if origin != "*" and (parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query):
            raise UserError(f"CORS origin {origin!r} is none; write it as the browser does: https://NAME or http://NAME:PORT")
    return tuple(origins)


def resolve_api_key(host: str, api_key: str | None) -> str | None:
    """The key to require: the one given, else the environment's, else none, which only a loopback address allows."""
    if api_key is None:
        api_key = os.environ.get(API_KEY_VARIABLE) or None
    if api_key is not None and (
        not api_key.strip() or not api_key.isascii() or not api_key.isprintable() or " " in api_key
    ):
        raise UserError("the API key must be one or more printable ASCII characters without spaces; choose another")
    if api_key is None and not is_loopback(host):
        raise UserError(
            f"host {host!r} can be reached from other machines, and no API key is set; "
            f"set {API_KEY_VARIABLE} or give --api-key-file, or bind 127.0.0.1"
        )
    return api_key

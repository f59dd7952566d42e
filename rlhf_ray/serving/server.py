"""A Ray cluster of its own, the replicas on it by Serve, and the HTTP server in front of them, in this process.

Ray is imported inside the functions: Serve reads its environment when it is imported, and the plain app needs no Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.config import Precision
from rlhf_ray.errors import UserError
from rlhf_ray.serving.config import (
    API_KEY_VARIABLE,
    AppConfig,
    EngineOptions,
    Limits,
    addresses_of,
    check_cors_origins,
    checked_number,
    replica_environment,
    resolve_allowed_hosts,
    resolve_api_key,
)
from rlhf_ray.serving.served import served_models
from rlhf_ray.serving.server_ray import check_ray, start_ray

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle
    from ray.serve.schema import ServeStatus

    from rlhf_ray.serving.front import Front
    from rlhf_ray.serving.http_server import HttpServer


class Server:
    """One served model, or several at one endpoint.

    What can be checked is checked when it is made; `start` takes seconds, `close` releases it all.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        more_models: Mapping[str, str | Path],
        host: str,
        port: int,
        api_key: str | None,
        name: str | None,
        replicas: int,
        gpus: float | None,
        threads: int | None,
        precision: Precision,
        engine: str | None,
        trust_remote_code: bool,
        allow_special_tokens: bool,
        limits: Limits,
        allowed_hosts: Sequence[str],
        cors_origins: Sequence[str],
    ):
        if not 0 <= port < 65536:
            raise UserError(f"port {port} does not exist; choose one from 1 to 65535, or 0 for any free one")
        checked_number("replicas", replicas, 1, whole=True)
        if threads is not None:
            checked_number("threads", threads, 1, whole=True)
        if gpus is not None:
            checked_number("gpus", gpus, 0)
        self.models = served_models(path, name, more_models, engine=engine, gpus=gpus or 0.0)
        self.host, self.port = host, port
        key = resolve_api_key(host, api_key)
        self.config = AppConfig(
            name=self.models[0].name,
            api_key=key,
            allowed_hosts=resolve_allowed_hosts(host, allowed_hosts),
            cors_origins=check_cors_origins(cors_origins, key),
            limits=limits,
        )
        self.replicas, self.gpus = replicas * len(self.models), gpus
        self.precision: Precision = precision
        self.trust_remote_code, self.allow_special_tokens = trust_remote_code, allow_special_tokens
        cores = len(os.sched_getaffinity(0))
        self.threads = threads or max(1, cores // self.replicas)
        self._environment = replica_environment(self.replicas * self.threads, cores)
        self._bound: socket.socket | None = None
        self._http: HttpServer | None = None
        self._front: Front | None = None
        self._logs = ""
        self._started = False
        self._stack = contextlib.ExitStack()  # of what ends after Ray

    @property
    def serving(self) -> bool:
        return self._http is not None

    @property
    def url(self) -> str:
        """Base URL as a client on this machine writes it; append /v1 for OpenAI's clients."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def announcement(self) -> str:
        """Where it listens, and a request to try."""
        key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if self.config.api_key else ""
        body = json.dumps({"model": self.config.name, "prompt": "Once upon a time", "max_tokens": 40})
        names = " and ".join(f"'{model.name}'" for model in self.models)
        return (
            f"Serving {names} at {self.url}/v1 (Ctrl-C stops it). Try:\n"
            f"  curl {self.url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
        )

    def start(self) -> None:
        """Start Ray, Serve and the replicas; returns when requests are answered."""
        self._bound = self._bind()
        check_ray()
        self._started = True
        self._logs = start_ray(self.replicas, self._stack, self._environment)
        import ray
        from ray import serve as ray_serve

        gpus = self._gpus_each(ray.cluster_resources().get("GPU", 0))
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        ray_serve.start(proxy_location="Disabled", logging_config=quiet)
        from rlhf_ray.serving.deployment import replicas_of

        options = EngineOptions(
            model=str(self.models[0].folder),
            precision=self.precision,
            device="cuda" if gpus else "cpu",
            threads=self.threads,
            trust_remote_code=self.trust_remote_code,
            allow_special_tokens=self.allow_special_tokens,
        )
        each_has = self.replicas // len(self.models)
        found = replicas_of(
            self.models, options, self.config, replicas=each_has, cpus=1, gpus=gpus, environment=self._environment
        )
        targets = [
            ray_serve.RunTarget(target=each.target, name=name, route_prefix=None, logging_config=quiet)
            for name, each in found.items()
        ]
        try:
            handles = ray_serve.run_many(targets)
        except RuntimeError as error:
            raise _start_failure(ray_serve.status(), error) from None
        self._open_front([(name, handle, each.model) for (name, each), handle in zip(found.items(), handles, strict=True)])

    def _open_front(self, replicas: Sequence[tuple[str, DeploymentHandle, str]]) -> None:
        """replicas: (name, handle, id of the model)."""
        from rlhf_ray.serving.front import Front
        from rlhf_ray.serving.guard import guarded
        from rlhf_ray.serving.http_limits import HttpLimits
        from rlhf_ray.serving.http_server import HttpServer
        from rlhf_ray.serving.links import ReplicaLink, watch

        links = [ReplicaLink(*each) for each in replicas]
        self._front = Front(links, lambda: watch(links))
        assert self._bound is not None
        self._http = HttpServer(
            guarded(self._front, self.config),
            self._bound,
            HttpLimits(connections=self.config.limits.max_connections),
        )
        self._http.start()

    def wait(self, say: Callable[[str], None] = print) -> None:
        """Until interrupted. UserError if no replica is left and the model's folder is not usable any more.

        Serve replaces a failed replica itself, and a slow one is not dead, so nothing else ends this.
        """
        assert self._front is not None and self._http is not None
        told: set[str] = set()
        while True:
            time.sleep(1)
            if not self._http.alive:
                raise RuntimeError(f"the HTTP server has ended; Ray's logs are in {self._logs}")
            down = {link.name for link in self._front.links if not link.up}
            for name in sorted(down - told):
                say(f"{name} has ended; Serve starts it again. Ray's logs are in {self._logs}")
            for name in sorted(told - down):
                say(f"{name} runs again.")
            told = down
            if len(down) == len(self._front.links):
                self._check_models()

    def _check_models(self) -> None:
        try:
            for model in self.models:
                model.check()
        except UserError as error:
            raise UserError(f"no replica runs, and none can start again: {error}") from None

    def drain(self, longest_s: float, say: Callable[[str], None] = print) -> None:
        """Answer 503 to what is new, and wait until what is running has been answered."""
        if self._front is None:
            return
        self._front.draining = True
        deadline = time.monotonic() + longest_s
        if self._front.ongoing:
            say(f"Ending: {self._front.ongoing} requests are still being answered (at most {longest_s:g} s).")
        while (self._front.ongoing or (self._http and self._http.unsent)) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.1)  # the last bytes are with the event loop

    def close(self) -> None:
        """Stop the replicas, Serve and Ray; safe to call twice."""
        if self._http is not None:
            self._http.close()
            self._http = None
        if self._bound is not None:
            self._bound.close()
            self._bound = None
        if not self._started:
            return
        self._started = False
        import ray

        # The cluster is ours and ends here, Serve with it. (serve.shutdown() first would take seconds more, and Ray
        # would then complain on the terminal that Serve's controller has gone.)
        try:
            ray.shutdown()
        finally:
            self._stack.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _bind(self) -> socket.socket:
        """The port, ours from now on: who connects while the model loads waits for it."""
        family = addresses_of(self.host)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((self.host, self.port))
            bound.listen()  # a port that is bound only, others can bind too
        except OSError as error:
            bound.close()
            raise UserError(
                f"can't listen on {self.host}:{self.port} ({error.strerror}); choose another with --port"
            ) from None
        self.port = bound.getsockname()[1]
        return bound

    def _gpus_each(self, available: float) -> float:
        if self.gpus is None:
            return 1.0 if available >= self.replicas else 0.0
        if self.gpus * self.replicas > available:
            raise UserError(
                f"{self.replicas} replicas with {self.gpus:g} GPUs each need {self.gpus * self.replicas:g}, this "
                f"machine has {available:g}; lower --gpus or --replicas"
            )
        return self.gpus


def _start_failure(status: ServeStatus, error: RuntimeError) -> Exception:
    """What the replica said, without the tracebacks of the layers around it."""
    messages = [deployment.message for app in status.applications.values() for deployment in app.deployments.values()]
    found = re.findall(r"UserError: (.+)", "\n".join(messages))
    if found:
        return UserError(found[-1].strip())
    return RuntimeError("the model could not be started: " + ("\n".join(messages) or str(error)))

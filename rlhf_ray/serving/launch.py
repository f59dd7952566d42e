"""`rlhf-ray serve`: a Ray cluster of its own, Serve on it, one line that says where it listens, and a clean end.

Ray is imported inside the functions: Serve reads its environment when it is imported, and the plain app needs no Ray.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.actors.worker_start import fork_server
from rlhf_ray.config import Precision
from rlhf_ray.errors import UserError
from rlhf_ray.serving.config import (
    API_KEY_VARIABLE,
    AppConfig,
    EngineOptions,
    Limits,
    replica_environment,
    resolve_api_key,
)
from rlhf_ray.serving.engine_choice import choose_engine
from rlhf_ray.serving.model_folder import find_model, model_name

if TYPE_CHECKING:
    from ray.serve.schema import ServeStatus

OBJECT_STORE_BYTES = 100 << 20  # no tensors pass through it; Ray's default is 30 % of the memory
_LOST_AFTER_S = 60

# Settings of Serve that would move its HTTP server or open further ports on every interface.
_FOREIGN_SETTINGS = (
    "RAY_SERVE_ENABLE_HA_PROXY",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
)


def serve(
    path: str | Path,
    *,
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
    block: bool = True,
    say: Callable[[str], None] = print,
) -> Server:
    """Serve a model folder, or the policy of a run folder, over OpenAI's HTTP API.

    port 0 takes a free one. `gpus` is per replica (None: one each where there are enough, else none); `threads` are
    torch's, per replica (None: an equal share of the cores). `engine` None: the run's, or torch (`serving.engine_choice`).
    `allow_special_tokens`: clients may write special tokens by their names, which are plain text otherwise.
    With `block` it ends only by KeyboardInterrupt (Ctrl-C; the command exits with 130) or SystemExit (SIGTERM), and
    releases everything; without, the caller closes the server.

    Raises UserError for what the user can put right: no such model, a port in use, no API key beyond loopback.
    """
    server = Server(
        path,
        host=host,
        port=port,
        api_key=api_key,
        name=name,
        replicas=replicas,
        gpus=gpus,
        threads=threads,
        precision=precision,
        engine=engine,
        trust_remote_code=trust_remote_code,
        allow_special_tokens=allow_special_tokens,
        limits=limits,
    )
    if server.engine.note is not None:
        say(server.engine.note)
    if not block:
        try:
            server.start()
        except BaseException:  # fault boundary: whatever ended the start, Ctrl-C too, leaves no cluster behind
            server.close()
            raise
        return server
    with _stopping_on_signals() as take_signals:
        try:
            say(f"Loading '{server.config.name}' from {server.model} ...")
            server.start()
            take_signals()  # ray.init has put a handler of its own in place
            say(server.announcement())
            server.wait()
        finally:
            server.close()
    return server


class Server:
    """One served model. What can be checked is checked here; `start` takes seconds, `close` releases it all."""

    def __init__(
        self,
        path: str | Path,
        *,
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
    ):
        if not 0 <= port < 65536:
            raise UserError(f"port {port} does not exist; choose one from 1 to 65535, or 0 for any free one")
        if replicas < 1:
            raise UserError(f"replicas={replicas} serves nothing; give at least 1")
        self.model = find_model(path)
        self.engine = choose_engine(engine, path, gpus or 0.0)
        self.host, self.port = host, port
        self.config = AppConfig(
            name=name or model_name(path, self.model), api_key=resolve_api_key(host, api_key), limits=limits
        )
        self.replicas, self.gpus = replicas, gpus
        self.precision: Precision = precision
        self.trust_remote_code, self.allow_special_tokens = trust_remote_code, allow_special_tokens
        cores = len(os.sched_getaffinity(0))
        self.threads = threads or max(1, cores // replicas)
        self._environment = replica_environment(replicas * self.threads, cores)
        self._reserved: socket.socket | None = None
        self._started = False
        self._stack = contextlib.ExitStack()  # of what ends after Ray

    @property
    def url(self) -> str:
        """Base URL as a client on this machine writes it; append /v1 for OpenAI's clients."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def announcement(self) -> str:
        """Where it listens, and a request to try."""
        key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if self.config.api_key else ""
        body = json.dumps({"model": self.config.name, "prompt": "Once upon a time", "max_tokens": 40})
        return (
            f"Serving '{self.config.name}' at {self.url}/v1 (Ctrl-C stops it). Try:\n"
            f"  curl {self.url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
        )

    def start(self) -> None:
        """Start Ray, Serve and the replicas; returns when requests are answered."""
        self._reserve_port()
        for variable in _FOREIGN_SETTINGS:
            os.environ.pop(variable, None)
        import ray
        from ray import serve as ray_serve

        if ray.is_initialized():
            raise UserError(
                "this process is connected to a Ray cluster already; run the server in a process of its own"
            )
        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
        self._started = True
        python = self._stack.enter_context(fork_server(("serving",), self._environment))
        ray.init(
            address="local",
            runtime_env=None if python is None else {"py_executable": python, "env_vars": self._environment},
            num_cpus=self.replicas,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        gpus = self._gpus_each(ray.cluster_resources().get("GPU", 0))
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        ray_serve.start(
            proxy_location="HeadOnly",
            logging_config=quiet,
            http_options={"host": self.host, "port": self.port, "keep_alive_timeout_s": 75},
        )
        from rlhf_ray.serving.deployment import application

        options = EngineOptions(
            model=str(self.model),
            precision=self.precision,
            device="cuda" if gpus else "cpu",
            threads=self.threads,
            trust_remote_code=self.trust_remote_code,
            allow_special_tokens=self.allow_special_tokens,
            engine=self.engine.name,
            plugins=self.engine.plugins,
        )
        try:
            ray_serve.run(
                application(
                    options, self.config, replicas=self.replicas, cpus=1, gpus=gpus, environment=self._environment
                ),
                name="rlhf_ray",
                route_prefix="/",
                logging_config=quiet,
            )
        except RuntimeError as error:
            raise _start_failure(ray_serve.status(), error) from None

    def wait(self) -> None:
        """Until interrupted. RuntimeError if it stops answering for good (Serve replaces a failed replica itself)."""
        answered = time.monotonic()
        while True:
            time.sleep(5)
            if self._answers():
                answered = time.monotonic()
            elif time.monotonic() - answered > _LOST_AFTER_S:
                raise RuntimeError(
                    f"the server at {self.url} has not answered for {_LOST_AFTER_S} s; Ray's logs are in "
                    "/tmp/ray/session_latest/logs"
                )

    def close(self) -> None:
        """Stop the replicas, Serve and Ray; safe to call twice."""
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
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

    def _reserve_port(self) -> None:
        """Hold the port from now on, and learn its number if it was 0.

        Serve's proxy binds with SO_REUSEPORT, so two servers would share a port without an error. The first bind
        finds out whether anyone has it; the second socket is kept, never listens, and keeps others from it.
        """
        family = socket.getaddrinfo(self.host or "0.0.0.0", self.port, type=socket.SOCK_STREAM)[0][0]
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((self.host, self.port))
                self.port = probe.getsockname()[1]
            self._reserved = socket.socket(family, socket.SOCK_STREAM)
            self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._reserved.bind((self.host, self.port))
        except OSError as error:
            raise UserError(
                f"can't listen on {self.host}:{self.port} ({error.strerror}); choose another with --port"
            ) from None

    def _gpus_each(self, available: float) -> float:
        if self.gpus is None:
            return 1.0 if available >= self.replicas else 0.0
        if self.gpus * self.replicas > available:
            raise UserError(
                f"{self.replicas} replicas with {self.gpus:g} GPUs each need {self.gpus * self.replicas:g}, this "
                f"machine has {available:g}; lower --gpus or --replicas"
            )
        return self.gpus

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10):
                return True
        except (urllib.error.URLError, OSError):
            return False


def _start_failure(status: ServeStatus, error: RuntimeError) -> Exception:
    """What the replica said, without the tracebacks of the layers around it."""
    messages = [deployment.message for app in status.applications.values() for deployment in app.deployments.values()]
    found = re.findall(r"UserError: (.+)", "\n".join(messages))
    if found:
        return UserError(found[-1].strip())
    return RuntimeError("the model could not be started: " + ("\n".join(messages) or str(error)))


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[Callable[[], None]]:
    """SIGTERM releases everything like Ctrl-C (exit status 143); a second signal of either kind stops at once.

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
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

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

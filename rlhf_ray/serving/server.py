"""A Ray cluster of its own, the replicas on it by Serve, and the HTTP server in front of them, in this process.

Ray is imported inside the functions: Serve reads its environment when it is imported, and the plain app needs no Ray.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.config import Precision
from rlhf_ray.config.user_paths import expanded
from rlhf_ray.errors import UserError
from rlhf_ray.publish.servers import ServerNote, servers_folder, started_at, write_note
from rlhf_ray.serving.config import (
    AppConfig,
    EngineOptions,
    Limits,
    Notes,
    ServedStage,
    check_cors_origins,
    checked_number,
    replica_environment,
    resolve_allowed_hosts,
    resolve_api_key,
)
from rlhf_ray.serving.critic_values import keeps_critic
from rlhf_ray.serving.listening import announced, listening, start_failure, url_of
from rlhf_ray.serving.page.build import PageParts
from rlhf_ray.serving.page.options import PageOptions
from rlhf_ray.serving.passing import LOOK_EVERY_S
from rlhf_ray.serving.served import ServedModel, groups_of, served_models, served_reward_model
from rlhf_ray.serving.server_ray import check_ray, start_ray

if TYPE_CHECKING:
    from ray.serve import RunTarget

    from rlhf_ray.publish.version import Version
    from rlhf_ray.serving.deployment import Bound
    from rlhf_ray.serving.front import Front
    from rlhf_ray.serving.http_server import HttpServer
    from rlhf_ray.serving.links import SocketLink


class Server:
    """One served model, or several at one endpoint.

    What can be checked is checked when it is made; `start` takes seconds, `close` releases it all.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        more_models: Mapping[str, str | Path],
        also: Sequence[str] = (),
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
        stage: ServedStage = "policy",
        notes: Notes = Notes(),
        page: PageOptions = PageOptions(),
    ):
        if not 0 <= port < 65536:
            raise UserError(f"port {port} does not exist; choose one from 1 to 65535, or 0 for any free one")
        checked_number("replicas", replicas, 1, whole=True)
        if threads is not None:
            checked_number("threads", threads, 1, whole=True)
        if gpus is not None:
            checked_number("gpus", gpus, 0)
        if stage == "reward" and (more_models or also):
            raise UserError("--stage reward serves one reward model; leave --model and --also out")
        if stage == "reward" and page != PageOptions():
            raise UserError("--stage reward has no page; leave --votes and the other options of the page out")
        self.stage: ServedStage = stage
        self.models: tuple[ServedModel, ...] = (
            served_reward_model(path, name)
            if stage == "reward"
            else served_models(path, name, more_models, also=also, engine=engine, gpus=gpus or 0.0)
        )
        self.host, self.port = host, port
        key = resolve_api_key(host, api_key)
        self.config = AppConfig(
            name=self.models[0].name,
            api_key=key,
            allowed_hosts=resolve_allowed_hosts(host, allowed_hosts),
            cors_origins=check_cors_origins(cors_origins, key),
            keep_texts=notes.keep_texts,
            limits=limits,
        )
        self.notes = notes
        self._replicas_each = replicas
        self.replicas, self.gpus = replicas * len(groups_of(self.models)), gpus
        self.precision: Precision = precision
        self.trust_remote_code, self.allow_special_tokens = trust_remote_code, allow_special_tokens
        cores = len(os.sched_getaffinity(0))
        self.threads = threads or max(1, cores // self.replicas)
        self._environment = replica_environment(self.replicas * self.threads, cores)
        self._bound: socket.socket | None = None
        self._http: HttpServer | None = None
        self._front: Front | None = None
        self._logs = ""
        self.note_problem: str | None = None
        """Why `publish` and `serve --stop` can't find this server."""
        self._stack = contextlib.ExitStack()  # Ray, and what ends before and after it
        self._page = None if stage == "reward" else PageParts.opened(page, expanded(path).resolve())

    @property
    def serving(self) -> bool:
        return self._http is not None

    @property
    def url(self) -> str:
        """Base URL as a client on this machine writes it; append /v1 for OpenAI's clients."""
        return url_of(self.host, self.port)

    def announcement(self) -> str:
        """Where it listens, and a request to try."""
        votes = None if self._page is None or self._page.store is None else self._page.store.database.name
        return announced(
            self.url, [model.name for model in self.models], self.stage, has_key=self.config.api_key is not None, votes=votes,
            prompts=() if self._page is None else self._page.prompts,
        )  # fmt: skip

    def start(self, when_ray_runs: Callable[[], None] = lambda: None) -> None:
        """Start Ray, Serve and the replicas; returns when requests are answered."""
        self._bound, self.port = listening(self.host, self.port)
        check_ray()
        self._logs = start_ray(self.replicas, self._stack, self._environment)
        when_ray_runs()
        import ray
        from ray import serve as ray_serve

        gpus = self._gpus_each(ray.cluster_resources().get("GPU", 0))
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        ray_serve.start(proxy_location="Disabled", logging_config=quiet)
        from rlhf_ray.serving.deployment import Deployed

        options = EngineOptions(
            model=str(self.models[0].folder),
            precision=self.precision,
            device="cuda" if gpus else "cpu",
            threads=self.threads,
            trust_remote_code=self.trust_remote_code,
            allow_special_tokens=self.allow_special_tokens,
            critic=self.models[0].given if self.stage == "policy" and keeps_critic(Path(self.models[0].given)) else None,
        )
        deployed = Deployed(
            models=self.models, options=options, config=self.config, replicas=self._replicas_each, cpus=1, gpus=gpus,
            environment=self._environment, stage=self.stage,
            sockets=self._stack.enter_context(tempfile.TemporaryDirectory(prefix="rlhf_ray_", ignore_cleanup_errors=True)),
        )  # fmt: skip

        def targets(bound: Mapping[str, Bound]) -> list[RunTarget]:
            return [
                ray_serve.RunTarget(target=each.target, name=name, route_prefix=None, logging_config=quiet)
                for name, each in bound.items()
            ]

        def deploy(held: Mapping[str, Sequence[Version]]) -> None:
            ray_serve.run_many(targets(deployed.bound(held)), wait_for_applications_running=False)

        versions, began = {model.name: model.version() for model in self.models}, time.monotonic()
        found = deployed.bound({name: [version] for name, version in versions.items()})
        try:
            handles = ray_serve.run_many(targets(found))
        except RuntimeError as error:
            raise start_failure(ray_serve.status(), error) from None
        from rlhf_ray.serving.links import SocketLink

        took_s = time.monotonic() - began
        links = [
            SocketLink(name, handle, each.models, each.socket or "", start_s=took_s)
            for (name, each), handle in zip(found.items(), handles, strict=True)
        ]
        self._open_front(links, versions, deploy)

    def _open_front(
        self,
        links: Sequence[SocketLink],
        versions: Mapping[str, Version],
        deploy: Callable[[Mapping[str, Sequence[Version]]], None],
    ) -> None:
        """versions: of each model, the one that it starts with."""
        from rlhf_ray.serving.front_parts import whole_front
        from rlhf_ray.serving.http_limits import HttpLimits
        from rlhf_ray.serving.http_server import HttpServer

        note = self._write_note()
        self._front, app = whole_front(
            links, self.config, versions, self.notes,
            deploy=deploy if self.stage == "policy" else None, token=note.token,
            history=servers_folder() / f"{self.port}.versions.jsonl", page=self._page,
        )  # fmt: skip
        assert self._bound is not None
        self._http = HttpServer(app, self._bound, HttpLimits(connections=self.config.limits.max_connections))
        self._http.start()

    def _write_note(self) -> ServerNote:
        """Tell this machine's `publish` and `serve --stop` where the server is."""
        note = ServerNote(
            pid=os.getpid(), started=started_at(os.getpid()), url=self.url, port=self.port, stage=self.stage,
            served={model.name: model.given for model in self.models},
        )  # fmt: skip
        try:
            self._stack.callback(write_note(note).unlink, missing_ok=True)
        except UserError as error:
            self.note_problem = str(error)
        return note

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
        assert self._front is not None
        try:
            for model in self.models:
                stable = self._front.tables[model.name].stable
                adapter = None if stable.adapter is None else Path(stable.adapter)
                replace(model, folder=Path(stable.folder), adapter=adapter).check()
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
        if self._front is not None and self._http is not None and self._front.ongoing:
            self._front.ending = True  # who waits for another replica is told so before the connection ends
            time.sleep(3 * LOOK_EVERY_S)
        if self._http is not None:
            self._http.close()
            self._http = None
        if self._bound is not None:
            self._bound.close()
            self._bound = None
        if self._page is not None:
            self._page.close()
        # The cluster is ours and ends here, Serve with it. (serve.shutdown() first would take seconds more, and Ray
        # would then complain on the terminal that Serve's controller has gone.)
        self._stack.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _gpus_each(self, available: float) -> float:
        if self.gpus is None:
            return 1.0 if available >= self.replicas else 0.0
        if self.gpus * self.replicas > available:
            raise UserError(
                f"{self.replicas} replicas with {self.gpus:g} GPUs each need {self.gpus * self.replicas:g}, this "
                f"machine has {available:g}; lower --gpus or --replicas"
            )
        return self.gpus

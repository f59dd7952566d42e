"""The Ray Serve shell around app and front. `build_application` is the import path for Serve configs (KubeRay RayService)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from rlhf_ray.config import Precision
from rlhf_ray.errors import UserError
from rlhf_ray.publish.version import Version
from rlhf_ray.serving.config import (
    AppConfig,
    EngineOptions,
    Limits,
    ServedStage,
    check_cors_origins,
    checked_number,
    replica_environment,
    resolve_api_key,
)
from rlhf_ray.serving.front import Front
from rlhf_ray.serving.guard import guarded
from rlhf_ray.serving.links import ReplicaLink, watch
from rlhf_ray.serving.relay import NOT_HERE, Piece, Put, Relayed, is_opening, pieces_of, write_answer
from rlhf_ray.serving.replica_socket import Listening
from rlhf_ray.serving.served import ServedModel, groups_of, served_models
from rlhf_ray.serving.versions import VersionTable

# The app refuses what is too much (429), never Serve.
_NO_LIMIT = 100_000


_REPLICA: dict[str, Any] = {
    "max_ongoing_requests": _NO_LIMIT,
    "health_check_period_s": 2,
    "health_check_timeout_s": 60,
    "graceful_shutdown_wait_loop_s": 0.2,
    "graceful_shutdown_timeout_s": 60,
    "max_constructor_retry_count": 1,
}


@serve.deployment(**_REPLICA)
class Replica:
    """Versions of one model, and of the adapters on it, each with an engine in its own thread and its app in the event loop."""

    def __init__(self, options: EngineOptions, configs: dict[str, AppConfig], socket: str | None = None):
        """socket: where it also answers, for a front on this machine (`serving.replica_socket`)."""
        # Imported here: a process that only deploys this class (the command's) needs neither torch nor transformers.
        from rlhf_ray.serving.held import HeldVersions

        self.held = HeldVersions(options, configs)
        self._listening = Listening(socket, self.write)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's: at the start, and when the versions to hold have changed, while requests are answered."""
        wanted = user_config["versions"]
        await self.held.hold(
            {model: [Version.from_json(one) for one in versions] for model, versions in wanted.items()}
        )
        await self._listening.begin()

    async def write(self, request: Relayed, put: Put) -> None:
        found = self.held.app(request.model, request.version)
        if found is None:
            put([NOT_HERE, [], b"", False])
        else:
            await _write_named(*found, request, put)

    async def answer(self, request: Relayed) -> AsyncGenerator[Piece]:
        async with aclosing(pieces_of(lambda put: self.write(request, put))) as answer:
            async for piece in answer:
                yield piece

    async def stats(self) -> dict[str, int]:
        return self.held.stats()

    async def states(self) -> dict[str, dict[str, dict[str, Any]]]:
        return self.held.states()

    def check_health(self) -> None:
        if not self.held.healthy:
            raise RuntimeError("the generation engine has failed")


@serve.deployment(**_REPLICA)
class RewardReplica:
    """One reward model, or an ensemble, which scores in a thread of its own."""

    def __init__(self, options: EngineOptions, configs: dict[str, AppConfig], socket: str | None = None):
        (self.config,), self.options = configs.values(), options
        self.app: ASGIApp | None = None
        self._listening = Listening(socket, self.write)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's, at the start: which version to load. A reward model stays for as long as its server."""
        from rlhf_ray.serving.reward_app import build_reward_routes
        from rlhf_ray.serving.reward_loading import load_reward

        ((stable,),) = user_config["versions"].values()
        version = Version.from_json(stable)
        version.check()
        self.runner = await asyncio.to_thread(load_reward, replace(self.options, model=version.folder), self.config.limits)
        self.version, self.app = version.id, build_reward_routes(self.runner, self.config.name)
        await self._listening.begin()

    async def write(self, request: Relayed, put: Put) -> None:
        assert self.app is not None
        await _write_named(self.app, self.version, request, put)

    async def answer(self, request: Relayed) -> AsyncGenerator[Piece]:
        async with aclosing(pieces_of(lambda put: self.write(request, put))) as answer:
            async for piece in answer:
                yield piece

    async def stats(self) -> dict[str, int]:
        return asdict(self.runner.stats)


async def _write_named(app: ASGIApp, version: str, request: Relayed, put: Put) -> None:
    """The app's answer, with the version that wrote it in its headers."""

    def put_named(piece: Piece) -> None:
        if is_opening(piece):
            piece[1].append([b"x-model-version", version.encode()])
        put(piece)

    await write_answer(app, request, put_named)


# On the head, whose end is the cluster's: another node's end costs no connection.
_ON_THE_HEAD = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}


@serve.deployment(name="gateway", max_ongoing_requests=_NO_LIMIT, graceful_shutdown_timeout_s=60, ray_actor_options=_ON_THE_HEAD)
@serve.ingress()
class Gateway:
    """The front as a deployment, for clusters whose HTTP servers are Serve's own."""

    def __init__(
        self,
        config: AppConfig,
        handles: dict[str, DeploymentHandle],
        models: dict[str, list[str]],
        versions: dict[str, Version],
    ):
        """handles, models: by the replica's name, its handle and the ids of the models that it has. versions: of the models."""
        links = [ReplicaLink(name, handle, models[name]) for name, handle in handles.items()]
        tables = {model: VersionTable(version) for model, version in versions.items()}
        self._guarded = guarded(Front(links, lambda: watch(links), tables), config)  # Serve's wrapper has an `app` of its own

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._guarded


@dataclass(frozen=True, slots=True)
class Bound:
    """A replica to be started."""

    models: list[str]  # the ids of those that it has
    target: Application
    socket: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """How all replicas of a server run."""

    models: Sequence[ServedModel]
    options: EngineOptions
    config: AppConfig
    replicas: int  # of each model; the adapters on a model are in its replicas
    cpus: float
    gpus: float
    environment: Mapping[str, str]
    stage: ServedStage = "policy"
    sockets: str | None = None
    """A folder of this machine, for those of the replicas; None: they are reached by Serve's handles."""

    def bound(self, held: Mapping[str, Sequence[Version]]) -> dict[str, Bound]:
        """Name -> each replica's deployment, which reserves `cpus` and `gpus` and has these variables in its process.

        held: of each model, the versions to hold, the stable one first. Only they may change while it runs: Serve hands
        them to the replicas that there are (user_config), because all else, and `version`, stay as they were.
        """
        resources = {"num_cpus": self.cpus, "num_gpus": self.gpus, "runtime_env": {"env_vars": dict(self.environment)}}
        names = tuple(model.name for model in self.models)
        found: dict[str, Bound] = {}
        for group in groups_of(self.models):
            own = replace(
                self.options, engine=group[0].engine.name, plugins=group[0].engine.plugins,
                critic=self.options.critic if group[0] is self.models[0] else None,  # the other models are not its run's
            )  # fmt: skip
            # The front checks the key.
            apps = {
                model.name: replace(
                    self.config,
                    name=model.name,
                    others=tuple(name for name in names if name != model.name),
                    api_key=None,
                )
                for model in group
            }
            wanted = {"versions": {model.name: [one.to_json() for one in held[model.name]] for model in group}}
            for _ in range(self.replicas):
                name = f"replica-{len(found) + 1}"
                # _internal: without a version of our own Serve takes every deployment for new code, and starts the replicas again.
                deployment = (RewardReplica if self.stage == "reward" else Replica).options(
                    name=name, ray_actor_options=resources, user_config=wanted, version="1", _internal=True
                )
                socket = None if self.sockets is None else f"{self.sockets}/{name}"
                found[name] = Bound([model.name for model in group], deployment.bind(own, apps, socket), socket)
        return found


def build_application(args: dict[str, Any]) -> Application:
    """For `serve run rlhf_ray.serving.deployment:build_application model=...` and for RayService.

    args: model (a folder that every node sees), and optionally name, models (further ones, name -> folder), replicas (of each),
    cpus, gpus, threads, precision, engine, trust_remote_code, allow_special_tokens, api_key, cors_origins and the fields of
    `Limits`. The API key (or the environment's RLHF_RAY_API_KEY) is required.
    """
    given = dict(args)
    path = given.pop("model", None)
    if path is None:
        raise UserError("args of build_application have no 'model'; give the folder to serve")
    known = {name: given.pop(name) for name in Limits.__slots__ if name in given}
    replicas = int(checked_number("replicas", given.pop("replicas", 1), 1, whole=True))
    cpus, gpus = checked_number("cpus", given.pop("cpus", 1), 0), checked_number("gpus", given.pop("gpus", 0), 0)
    threads = int(checked_number("threads", given.pop("threads", max(1, int(cpus))), 1, whole=True))
    more, precision = given.pop("models", None) or {}, given.pop("precision", "auto")
    if not isinstance(more, dict):
        raise UserError(f"models is {more!r}; give a mapping of names to folders")
    if precision not in get_args(Precision):
        raise UserError(f"precision is {precision!r}; give {', '.join(get_args(Precision))}")
    models = served_models(path, given.pop("name", None), more, engine=given.pop("engine", None), gpus=gpus)
    options = EngineOptions(
        model=str(models[0].folder),
        precision=precision,
        device="cuda" if gpus else "cpu",
        threads=threads,
        trust_remote_code=_truth("trust_remote_code", given.pop("trust_remote_code", False)),
        allow_special_tokens=_truth("allow_special_tokens", given.pop("allow_special_tokens", False)),
    )
    origins, key = given.pop("cors_origins", ()), resolve_api_key("0.0.0.0", given.pop("api_key", None))
    config = AppConfig(
        name=models[0].name,
        api_key=key,
        cors_origins=check_cors_origins((origins,) if isinstance(origins, str) else tuple(origins), key),
        limits=Limits(**{name: _whole(name, value) for name, value in known.items() if value is not None}),
    )
    if given:
        raise UserError(f"args of build_application have the unknown key {sorted(given)[0]!r}; see its documentation")
    environment = replica_environment(options.threads, cpus)
    deployed = Deployed(
        models=models, options=options, config=config, replicas=replicas, cpus=cpus, gpus=gpus, environment=environment
    )
    versions = {model.name: model.version() for model in models}
    found = deployed.bound({name: [version] for name, version in versions.items()})
    targets = {name: each.target for name, each in found.items()}
    return Gateway.bind(config, targets, {name: each.models for name, each in found.items()}, versions)


def _whole(name: str, value: Any) -> int:
    return int(checked_number(name, value, 0, whole=True))


def _truth(name: str, value: Any) -> bool:
    """`serve run` gives texts, and the text "false" is true to Python."""
    told = {"true": True, "false": False}.get(str(value).lower())
    if told is None:
        raise UserError(f"{name} is {value!r}; give true or false")
    return told

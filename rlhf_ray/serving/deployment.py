"""The Ray Serve shell around app and front. `build_application` is the import path for Serve configs (KubeRay RayService)."""

from __future__ import annotations

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
from rlhf_ray.serving.config import (
    AppConfig,
    EngineOptions,
    Limits,
    check_cors_origins,
    checked_number,
    replica_environment,
    resolve_api_key,
)
from rlhf_ray.serving.front import Front
from rlhf_ray.serving.guard import guarded
from rlhf_ray.serving.links import ReplicaLink, watch
from rlhf_ray.serving.relay import Piece, Relayed, pieces
from rlhf_ray.serving.served import ServedModel, served_models

# The app refuses what is too much (429), never Serve.
_NO_LIMIT = 100_000


@serve.deployment(
    max_ongoing_requests=_NO_LIMIT,
    health_check_period_s=2,
    health_check_timeout_s=60,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=60,
    max_constructor_retry_count=1,
)
class Replica:
    """One engine in its own thread, and its app in the replica's event loop."""

    def __init__(self, options: EngineOptions, config: AppConfig):
        # Imported here: a process that only deploys this class (the command's) needs neither torch nor transformers.
        from rlhf_ray.serving.app import build_routes
        from rlhf_ray.serving.loading import load

        self.runner, reader = load(options, config.limits)
        self.app = build_routes(self.runner, reader, config)

    async def answer(self, request: Relayed) -> AsyncGenerator[Piece]:
        async with aclosing(pieces(self.app, request)) as answer:
            async for piece in answer:
                yield piece

    async def stats(self) -> dict[str, int]:
        return asdict(self.runner.stats())

    def check_health(self) -> None:
        if not self.runner.healthy:
            raise RuntimeError("the generation engine has failed")


@serve.deployment(name="gateway", max_ongoing_requests=_NO_LIMIT, graceful_shutdown_timeout_s=60, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class Gateway:
    """The front as a deployment, for clusters whose HTTP servers are Serve's own."""

    def __init__(self, config: AppConfig, handles: dict[str, DeploymentHandle], models: dict[str, str]):
        """Both by the replica's name: its handle, and the id of the model that it has."""
        links = [ReplicaLink(name, handle, models[name]) for name, handle in handles.items()]
        self.app = guarded(Front(links, lambda: watch(links)), config)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self.app


@dataclass(frozen=True, slots=True)
class Bound:
    """A replica to be started."""

    model: str  # the id of the model that it has
    target: Application


def replicas_of(
    models: Sequence[ServedModel],
    options: EngineOptions,
    config: AppConfig,
    *,
    replicas: int,
    cpus: float,
    gpus: float,
    environment: Mapping[str, str],
) -> dict[str, Bound]:
    """Name -> each engine's deployment, which reserves `cpus` and `gpus` and has these variables in its process.

    options, config: what all models share; each has `replicas` engines.
    """
    resources = {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": dict(environment)}}
    names = tuple(model.name for model in models)
    found: dict[str, Bound] = {}
    for model in models:
        own = replace(
            options, model=str(model.folder), adapter=None if model.adapter is None else str(model.adapter),
            engine=model.engine.name, plugins=model.engine.plugins,
        )  # fmt: skip
        # The front checks the key.
        app = replace(config, name=model.name, others=tuple(name for name in names if name != model.name), api_key=None)
        for _ in range(replicas):
            name = f"replica-{len(found) + 1}"
            target = Replica.options(name=name, ray_actor_options=resources).bind(own, app)
            found[name] = Bound(model.name, target)
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
    found = replicas_of(models, options, config, replicas=replicas, cpus=cpus, gpus=gpus, environment=environment)
    targets = {name: each.target for name, each in found.items()}
    return Gateway.bind(config, targets, {name: each.model for name, each in found.items()})


def _whole(name: str, value: Any) -> int:
    return int(checked_number(name, value, 0, whole=True))


def _truth(name: str, value: Any) -> bool:
    """`serve run` gives texts, and the text "false" is true to Python."""
    told = {"true": True, "false": False}.get(str(value).lower())
    if told is None:
        raise UserError(f"{name} is {value!r}; give true or false")
    return told

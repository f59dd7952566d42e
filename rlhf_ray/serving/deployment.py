"""The Ray Serve shell around the app. `build_application` is the import path for Serve configs (KubeRay RayService)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from rlhf_ray.errors import UserError
from rlhf_ray.serving.config import AppConfig, EngineOptions, Limits, replica_environment, resolve_api_key
from rlhf_ray.serving.engine_choice import choose_engine
from rlhf_ray.serving.model_folder import find_model, model_name


@serve.deployment(
    name="rlhf_ray",
    health_check_period_s=5,
    health_check_timeout_s=60,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=5,
    max_constructor_retry_count=1,
)
@serve.ingress()
class Replica:
    """One engine in its own thread, and the app in the replica's event loop."""

    def __init__(self, options: EngineOptions, config: AppConfig):
        # Imported here: a process that only deploys this class (the command's) needs neither torch nor transformers.
        from rlhf_ray.serving.loading import load

        self.config = config
        self.runner, self.reader = load(options, config.limits)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from rlhf_ray.serving.app import build_app

        return build_app(self.runner, self.reader, self.config)

    def check_health(self) -> None:
        if not self.runner.healthy:
            raise RuntimeError("the generation engine has failed")


def application(
    options: EngineOptions,
    config: AppConfig,
    *,
    replicas: int,
    cpus: float,
    gpus: float,
    environment: Mapping[str, str],
) -> Application:
    """The deployment of `replicas` engines, each reserving `cpus` and `gpus`, in processes with these variables."""
    limits = config.limits
    # Serve's default of 5 requests at once would cap the batch. The app refuses (429) before this limit is reached.
    ongoing = 2 * (limits.max_rows + limits.max_waiting_rows) + 64
    return Replica.options(
        num_replicas=replicas,
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": environment}},
    ).bind(options, config)


def build_application(args: dict[str, Any]) -> Application:
    """For `serve run rlhf_ray.serving.deployment:build_application model=...` and for RayService.

    args: model (a folder that every node sees), and optionally name, replicas, cpus, gpus, threads, precision, engine,
    trust_remote_code, allow_special_tokens, api_key and the fields of `Limits`. The API key (or the environment's
    RLHF_RAY_API_KEY) is required.
    """
    given = dict(args)
    path = given.pop("model", None)
    if path is None:
        raise UserError("args of build_application have no 'model'; give the folder to serve")
    model = find_model(path)
    known = {name: given.pop(name) for name in Limits.__slots__ if name in given}
    replicas, cpus, gpus = int(given.pop("replicas", 1)), float(given.pop("cpus", 1)), float(given.pop("gpus", 0))
    engine = choose_engine(given.pop("engine", None), path, gpus)
    options = EngineOptions(
        model=str(model),
        precision=given.pop("precision", "auto"),
        device="cuda" if gpus else "cpu",
        threads=int(given.pop("threads", max(1, int(cpus)))),
        trust_remote_code=bool(given.pop("trust_remote_code", False)),
        allow_special_tokens=bool(given.pop("allow_special_tokens", False)),
        engine=engine.name,
        plugins=engine.plugins,
    )
    config = AppConfig(
        name=given.pop("name", None) or model_name(Path(path), model),
        api_key=resolve_api_key("0.0.0.0", given.pop("api_key", None)),
        limits=Limits(**{name: int(value) for name, value in known.items()}),
    )
    if given:
        raise UserError(f"args of build_application have the unknown key {sorted(given)[0]!r}; see its documentation")
    environment = replica_environment(options.threads, cpus)
    return application(options, config, replicas=replicas, cpus=cpus, gpus=gpus, environment=environment)

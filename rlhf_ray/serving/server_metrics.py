"""GET /metrics: Prometheus' text, from the front's answers and the engines' own counters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rlhf_ray.serving.answered import Answered

if TYPE_CHECKING:
    from rlhf_ray.serving.front import Front

_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/get_reward", "/version", "/openapi.json")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAUGES = ("running_rows", "waiting_rows", "waiting")  # of an engine's numbers; the others only grow


class Metrics:
    """A page of the front's, and a listener. One registry per server."""

    def __init__(self, front: Front):
        self._front = front
        registry = self._registry = CollectorRegistry(auto_describe=False)
        self._requests = Counter(
            "rlhf_ray_requests", "Answers, by status.", ["method", "path", "status", "model", "version"], registry=registry
        )
        self._seconds = Histogram(
            "rlhf_ray_request_seconds", "From a request to the end of its answer.", ["path"], registry=registry, buckets=_SECONDS
        )
        self._first = Histogram(
            "rlhf_ray_first_part_seconds", "From a request to the first part of its answer.", ["path"], registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self._failed = Counter(
            "rlhf_ray_failed_answers", "Status 5xx, or cut off.", ["model", "version"], registry=registry
        )
        self._taken_over = Counter(
            "rlhf_ray_taken_over_answers", "Whose replica ended, and another took over.", ["model", "version"], registry=registry
        )
        self._tokens = Counter(
            "rlhf_ray_tokens", "Tokens of answered requests.", ["kind", "model", "version"], registry=registry
        )
        self._stats: dict[str, Any] = {"replicas": []}
        registry.register(_Collected(self))

    def ended(self, answer: Answered) -> None:
        path = answer.path if answer.path in _PATHS else "other"
        whose = (answer.model, answer.version)
        self._requests.labels(_method(answer.method), path, str(answer.status), *whose).inc()
        self._seconds.labels(path).observe(answer.seconds)
        if answer.first_s is not None:
            self._first.labels(path).observe(answer.first_s)
        if answer.failed:
            self._failed.labels(*whose).inc()
        if answer.taken_over:
            self._taken_over.labels(*whose).inc()
        for kind, number in (("prompt", answer.prompt_tokens), ("completion", answer.completion_tokens)):
            if number:
                self._tokens.labels(kind, *whose).inc(number)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._stats = await self._front.stats()
        await Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)(scope, receive, send)

    def families(self) -> Iterator[Metric]:
        """What is as it is now, and is not counted here."""
        replicas: list[Mapping[str, Any]] = self._stats["replicas"]
        up = GaugeMetricFamily("rlhf_ray_replica_up", "Whether the replica answers.", labels=["replica", "model"])
        for each in replicas:
            up.add_metric([each["name"], each["model"]], float(each["up"]))
        yield up
        names = dict.fromkeys(name for each in replicas for name in each if name not in ("name", "model", "up"))
        for name in names:
            family = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            metric = family(
                f"rlhf_ray_engine_{name}", f"{name.replace('_', ' ')} of the engine.", labels=["replica", "model"]
            )
            for each in replicas:
                if name in each:
                    metric.add_metric([each["name"], each["model"]], float(each[name]))
            yield metric
        ongoing = GaugeMetricFamily("rlhf_ray_ongoing_requests", "Requests that are being answered.")
        ongoing.add_metric([], float(self._front.ongoing))
        yield ongoing
        share = GaugeMetricFamily("rlhf_ray_version_share", "Of new requests, by version.", labels=["model", "version"])
        for model, table in self._front.tables.items():
            share.add_metric([model, table.stable.id], 1 - table.share)
            if table.candidate is not None:
                share.add_metric([model, table.candidate.id], table.share)
        yield share


class _Collected:
    """As the registry asks for it."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.families()


def _method(given: str) -> str:
    return given if given in ("GET", "POST") else "other"

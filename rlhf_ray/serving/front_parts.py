"""The front with all that belongs to it: versions and their publisher, metrics, log, judge, and the guard before it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from starlette.types import ASGIApp

from rlhf_ray.publish.version import Version
from rlhf_ray.rewards.http_reward import KEY_VARIABLE
from rlhf_ray.serving.config import AppConfig, Notes
from rlhf_ray.serving.control import VERSIONS, Control, versions_page
from rlhf_ray.serving.front import Front
from rlhf_ray.serving.guard import guarded
from rlhf_ray.serving.judge import Judge
from rlhf_ray.serving.links import ReplicaLink, reconnect, watch
from rlhf_ray.serving.page.build import PageParts, build_page, is_of_page
from rlhf_ray.serving.publication import Publisher
from rlhf_ray.serving.request_log import RequestLog
from rlhf_ray.serving.server_metrics import Metrics
from rlhf_ray.serving.versions import VersionTable

METRICS = "/metrics"


def whole_front(
    links: Sequence[ReplicaLink],
    config: AppConfig,
    versions: Mapping[str, Version],
    notes: Notes,
    *,
    deploy: Callable[[Mapping[str, Sequence[Version]]], None] | None,
    token: str,
    history: Path,
    page: PageParts | None,
) -> tuple[Front, ASGIApp]:
    """-> the front, and the app to serve. versions: of each model, the one that it starts with.

    deploy: tells replicas which versions to hold; None: they can't change. token: of the server's owner.
    page: to chat, compare and vote; None: none is there.
    """
    tables = {model: VersionTable(version) for model, version in versions.items()}
    tasks: list[Callable] = [lambda: watch(links), lambda: reconnect(links)]
    stack = ExitStack()

    async def beside() -> None:
        with stack:
            await asyncio.gather(*(task() for task in tasks))

    front = Front(links, beside, tables)
    metrics = Metrics(front)
    front.pages[METRICS] = metrics
    front.listeners.append(metrics.ended)
    if notes.request_log is not None:
        log = RequestLog(notes.request_log, texts=notes.log_texts)
        stack.callback(log.close)
        front.listeners.append(log.ended)
    app = guarded(front, config) if page is None else guarded(build_page(front, config, page), config, is_of_page)
    if deploy is None:
        return front, app
    publisher = Publisher(tables, links, deploy, history)
    tasks.append(publisher.watch)
    front.pages[VERSIONS] = versions_page(publisher)
    front.listeners.append(publisher.ended)
    if notes.judge is not None:
        judge = Judge(notes.judge, publisher, os.environ.get(KEY_VARIABLE))
        tasks.append(judge.run)
        front.listeners.append(judge.ended)
    return front, Control(app, publisher, token)

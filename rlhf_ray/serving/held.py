"""The versions that one replica has in memory: each with its own engine and app, so no answer mixes two.

Wanted versions are loaded beside those that answer; one that is not wanted any more ends its rows first. No Ray here.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from starlette.types import ASGIApp

from rlhf_ray.errors import UserError
from rlhf_ray.publish.checked_rows import check_rows, read_rows
from rlhf_ray.publish.version import Version
from rlhf_ray.serving.app import build_routes
from rlhf_ray.serving.config import AppConfig, EngineOptions
from rlhf_ray.serving.critic_values import CriticRunner
from rlhf_ray.serving.loading import LOADING, Bases, load
from rlhf_ray.serving.runner import EngineRunner, RunnerStats

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.2


@dataclass(slots=True)
class _Held:
    version: Version
    state: str = "loading"  # then ready, or failed
    why: str | None = None  # it failed
    gap: float | None = None  # of its log-probs to training's, where training has written any
    runner: EngineRunner | None = None
    app: ASGIApp | None = None
    stays: bool = field(default=True)  # False: it ends when it has no rows


class HeldVersions:
    """Of each model, the wanted versions. The first one of a model is the stable one: the replica is no use without it."""

    def __init__(self, options: EngineOptions, configs: Mapping[str, AppConfig]):
        """configs: of each model, whose `version` is filled in here."""
        self.options, self.configs = options, configs
        self._held: dict[str, dict[str, _Held]] = {model: {} for model in configs}
        self._stable: dict[str, str] = {}
        self._bases: Bases = Bases()
        self._critic = None if options.critic is None else CriticRunner(options.critic)
        self._tasks: set[asyncio.Task] = set()
        self._ended: Counter[str] = Counter()  # what the engines that are gone have counted

    async def hold(self, wanted: Mapping[str, Sequence[Version]]) -> None:
        """Returns at once; the first time when the stable versions answer. UserError then where one can't."""
        first = not self._stable
        self._stable = {model: versions[0].id for model, versions in wanted.items()}
        new: list[tuple[str, _Held]] = []
        for model, versions in wanted.items():
            held, ids = self._held[model], {version.id for version in versions}
            for version in versions:
                if version.id not in held or held[version.id].state == "failed":
                    held[version.id] = _Held(version)
                    new.append((model, held[version.id]))
                held[version.id].stays = True
            for each in [each for each in held.values() if each.version.id not in ids]:
                each.stays = False
                self._in_background(self._end_when_idle(model, each))
        stable = [(model, each) for model, each in new if first and each.version.id == self._stable[model]]
        for model, each in stable:
            await asyncio.to_thread(self._load, model, each)
            if each.state == "failed":
                raise UserError(each.why or "it can't be loaded")
        for model, each in new:
            if (model, each) not in stable:
                self._in_background(asyncio.to_thread(self._load, model, each))

    def app(self, model: str, version: str) -> tuple[ASGIApp, str] | None:
        """What answers, and the id of the version that it is; None where that is not here, or not ready."""
        held = self._held.get(model, {}).get(version or self._stable.get(model, ""))
        return None if held is None or held.app is None or not held.stays else (held.app, held.version.id)

    def states(self) -> dict[str, dict[str, dict[str, Any]]]:
        """model -> version -> state, why, gap."""
        return {
            model: {name: {"state": each.state, "why": each.why, "gap": each.gap} for name, each in held.items()}
            for model, held in self._held.items()
        }

    @property
    def healthy(self) -> bool:
        """Whether the stable versions answer. Another one whose engine has failed is told of by its answers."""
        stable = [self._held[model].get(name) for model, name in self._stable.items()]
        return all(each is not None and each.runner is not None and each.runner.healthy for each in stable)

    def stats(self) -> dict[str, int]:
        """The engines' counters, summed; those of engines that are gone are in them, so none ever falls."""
        each = [asdict(runner.stats()) for runner in self._runners()]
        return {name: self._ended[name] + sum(one[name] for one in each) for name in RunnerStats.__slots__}

    def _runners(self) -> list[EngineRunner]:
        return [each.runner for held in self._held.values() for each in held.values() if each.runner is not None]

    def _in_background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _load(self, model: str, held: _Held) -> None:
        """In a thread. What goes wrong is held's state, for the publisher to read."""
        version, config = held.version, self.configs[model]
        with LOADING:
            try:
                version.check()
                options = replace(self.options, model=version.folder, adapter=version.adapter)
                beside = any(runner.healthy for runner in self._runners())
                runner, reader = load(options, config.limits, self._bases, beside=beside)
                try:
                    held.gap = _gap(version, runner)
                except BaseException:  # fault boundary: whatever it was, the engine's thread ends
                    runner.close()
                    raise
                held.app = build_routes(runner, reader, replace(config, version=version.id), self._critic)
                held.runner, held.state = runner, "ready"
            except UserError as error:
                held.state, held.why = "failed", str(error)
            except Exception as error:  # fault boundary: one version; those that answer go on
                logger.exception("version %s could not be loaded", version.id)
                held.state, held.why = "failed", f"{type(error).__name__}: {error}"

    async def _end_when_idle(self, model: str, held: _Held) -> None:
        while held.state == "loading" or (held.runner is not None and _busy(held.runner)):
            await asyncio.sleep(_LOOK_EVERY_S)
        if held.stays:  # it is wanted again
            return
        if self._held[model].get(held.version.id) is held:
            del self._held[model][held.version.id]
        runner, held.runner, held.app = held.runner, None, None
        if runner is not None:
            self._ended.update(asdict(runner.stats()))  # it is idle: no rows are in them
            await asyncio.to_thread(runner.close)
            del runner
        gc.unfreeze()  # Serve freezes what there is at a replica's start, the first version with it
        gc.collect()


def _busy(runner: EngineRunner) -> bool:
    stats = runner.stats()
    return stats.running_rows + stats.waiting_rows > 0


def _gap(version: Version, runner: EngineRunner) -> float | None:
    """Compare with what training says. Before the runner has requests, so its engine may be asked from here."""
    rows = read_rows(version.own_folder)
    if rows is None:
        return None
    computed = [
        [one.logprob for one in runner.engine.score(ids, 0) if one is not None] for ids in rows.ids
    ]  # fmt: skip
    return check_rows(rows, computed, runner.precision)

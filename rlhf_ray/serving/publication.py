"""New versions into a server that answers requests: load, compare, share the requests out, watch, go back.

    publish --> replicas load it beside the stable one (Serve's user_config) and compare its log-probs with training's
            --> it takes its share --> watched: rolled back where it is worse, kept where it is not

Runs in the event loop of the front. Of Ray it knows what it is given: `deploy`, and links that say what replicas hold.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlhf_ray.errors import UserError
from rlhf_ray.publish.version import Version
from rlhf_ray.serving.answered import Answered
from rlhf_ray.serving.passing import Link, ReplicaLost
from rlhf_ray.serving.rollback import Record, Thresholds, reason_to_roll_back
from rlhf_ray.serving.versions import VersionTable

logger = logging.getLogger(__name__)

LOAD_S = 900.0  # for all replicas to load a version
_LOOK_EVERY_S = 0.2
_WATCH_EVERY_S = 1.0
KEPT_ENTRIES = 200  # of the history, in memory

Deploy = Callable[[Mapping[str, Sequence[Version]]], None]


class VersionedLink(Link, Protocol):
    async def states(self) -> dict[str, dict[str, dict[str, Any]]]: ...


@dataclass(slots=True, kw_only=True)
class CandidateWatch:
    """Over the candidate of one model."""

    thresholds: Thresholds
    ends_at: float | None
    """On the event loop's clock; None: it is a canary until somebody says more."""
    records: dict[str, Record] = field(default_factory=dict)


class Publisher:
    """Of all models of one server. `history`: a file that entries are appended to."""

    def __init__(
        self,
        tables: Mapping[str, VersionTable],
        links: Sequence[VersionedLink],
        deploy: Deploy,
        history: Path | None = None,
    ):
        self.tables, self.links, self.deploy, self.history = tables, links, deploy, history
        self.records: dict[str, dict[str, Record]] = {
            model: {table.stable.id: Record()} for model, table in tables.items()
        }
        self.entries: list[dict[str, Any]] = []
        self._watches: dict[str, CandidateWatch] = {}
        self._one_at_a_time = asyncio.Lock()
        for model, table in tables.items():
            self._note(model, table.stable, "served")

    # -- what is asked of it

    async def publish(
        self,
        model: str,
        version: Version,
        share: float,
        *,
        watch_s: float = 600.0,
        thresholds: Thresholds = Thresholds(),
    ) -> dict[str, Any]:
        """Returns when it takes `share` of the model's requests. UserError where it can't, and nothing has changed."""
        table = self.table(model)
        if not 0 < share <= 1:
            raise UserError(f"the share of a version is {share:g}; give more than 0 % and at most 100 %")
        async with self._one_at_a_time:
            if version.id == table.stable.id:
                raise UserError(f"version {version.id} is the stable one of {model} already")
            gaps = await self._load(model, version)
            table.admit(version, share)
            self.records[model].setdefault(version.id, Record())
            ends_at = None if share < 1 else asyncio.get_running_loop().time() + watch_s
            self._watches[model] = CandidateWatch(thresholds=thresholds, ends_at=ends_at)
            gap = max((each for each in gaps if each is not None), default=None)
            self._note(model, version, "takes requests", share=share, logprob_gap=gap)
        return self.state(model)

    async def roll_back(self, model: str, why: str) -> dict[str, Any]:
        """To the stable version where there is a candidate, else to the stable version before it."""
        table = self.table(model)
        async with self._one_at_a_time:
            if table.candidate is not None:
                self._drop(model, why)
                return self.state(model)
            if not table.earlier:
                raise UserError(f"{model} has had no version before {table.stable.id}; publish one")
            before, left = table.earlier[-1], table.stable
            await self._load(model, before)
            table.admit(before, 1.0)
            table.promote()
            table.earlier = [each for each in table.earlier if each not in (before, left)]
            self._note(model, left, "rolled back", why=why, to=before.id)
        return self.state(model)

    def table(self, model: str) -> VersionTable:
        if model not in self.tables:
            raise UserError(f"this server has no model '{model}'; it has {', '.join(self.tables)}")
        return self.tables[model]

    def state(self, model: str) -> dict[str, Any]:
        """Which versions there are, their shares, and what was seen of them."""
        table = self.table(model)
        shares = {table.stable.id: 1 - table.share} | ({table.candidate.id: table.share} if table.candidate else {})
        return {
            "model": model,
            "stable": table.stable.id,
            "candidate": None if table.candidate is None else table.candidate.id,
            "versions": [
                {
                    "id": version.id,
                    "folder": str(version.own_folder),
                    "share": shares[version.id],
                    **self._record(model, version.id),
                }
                for version in table.taking
            ],
            "earlier": [version.id for version in table.earlier],
            "history": [entry for entry in self.entries if entry["model"] == model],
        }

    # -- what it does by itself

    def ended(self, answer: Answered) -> None:
        """A listener of the front's."""
        record = self.records.get(answer.model, {}).get(answer.version)
        if record is not None and answer.method == "POST" and (answer.status == 200 or answer.failed):
            record.answered(failed=answer.failed, seconds=answer.seconds, tokens=answer.completion_tokens)

    def scored(self, model: str, version: str, score: float) -> None:
        """Of one answer, by the judge."""
        record = self.records.get(model, {}).get(version)
        if record is not None:
            record.scored(score)

    async def watch(self) -> None:
        """Until cancelled: roll back what is worse, keep what was not for long enough, let go of what is not needed."""
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            try:
                await self.look()
            except Exception:  # fault boundary: one look; the next may see more
                logger.exception("the versions could not be looked after")

    async def look(self) -> None:
        if self._one_at_a_time.locked():
            return
        async with self._one_at_a_time:
            for model, table in self.tables.items():
                self._judge(model, table)
            gone = [version for table in self.tables.values() for version in table.forget_idle()]
            if gone:
                await asyncio.to_thread(self.deploy, self._wanted())

    def _judge(self, model: str, table: VersionTable) -> None:
        watch = self._watches.get(model)
        if table.candidate is None or watch is None:
            return
        new, old = self._record_of(model, table.candidate.id), self._record_of(model, table.stable.id)
        reason = reason_to_roll_back(new, old, watch.thresholds)
        if reason is not None:
            self._drop(model, reason)
        elif watch.ends_at is not None and asyncio.get_running_loop().time() >= watch.ends_at:
            self._note(model, table.candidate, "stable")
            table.promote()

    def _drop(self, model: str, why: str) -> None:
        table = self.tables[model]
        assert table.candidate is not None
        self._note(model, table.candidate, "rolled back", why=why, to=table.stable.id)
        # What was seen of it is forgotten: published again, it is a new trial.
        self.records[model].pop(table.candidate.id, None)
        table.drop_candidate()

    # -- replicas

    def _wanted(self, more: Mapping[str, Version] | None = None) -> dict[str, list[Version]]:
        wanted = {model: list(table.held) for model, table in self.tables.items()}
        for model, version in (more or {}).items():
            if version not in wanted[model]:
                wanted[model].append(version)
        return wanted

    async def _load(self, model: str, version: Version) -> list[float | None]:
        """Until every replica that runs has it. -> the gaps of its log-probs to training's."""
        await asyncio.to_thread(version.check)
        await asyncio.to_thread(self.deploy, self._wanted({model: version}))
        try:
            return await self._until_ready(model, version)
        except UserError as error:
            self._note(model, version, "refused", why=str(error))
            await asyncio.to_thread(self.deploy, self._wanted())
            raise

    async def _until_ready(self, model: str, version: Version) -> list[float | None]:
        deadline = asyncio.get_running_loop().time() + LOAD_S
        while True:
            states = [state for state in await self._states(model, version) if state is not None]
            for state in states:
                if state["state"] == "failed":
                    raise UserError(f"version {version.id} takes no requests: {state['why']}")
            if states and all(state["state"] == "ready" for state in states):
                return [state["gap"] for state in states]
            if asyncio.get_running_loop().time() > deadline:
                raise UserError(
                    f"version {version.id} was not loaded by all replicas of {model} within {LOAD_S:g} s; "
                    "look at /stats and the server's terminal, then publish it again"
                )
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _states(self, model: str, version: Version) -> list[dict[str, Any] | None]:
        """Of each replica of the model that runs; one that has not heard of it is loading, one that is lost counts no more."""

        async def of(link: VersionedLink) -> dict[str, Any] | None:
            try:
                states = await link.states()
            except ReplicaLost:
                return None
            return states[model].get(version.id, {"state": "loading"})

        return await asyncio.gather(*(of(link) for link in self.links if link.up and model in link.models))

    # -- notes

    def _record_of(self, model: str, version: str) -> Record:
        return self.records[model].setdefault(version, Record())

    def _record(self, model: str, version: str) -> dict[str, Any]:
        return self._record_of(model, version).summary()

    def _note(self, model: str, version: Version, what: str, **more: Any) -> None:
        entry = {"time": time.time(), "model": model, "version": version.id, "what": what, **more}
        self.entries = [*self.entries, entry][-KEPT_ENTRIES:]
        if self.history is not None:
            try:
                with open(self.history, "a") as file:
                    file.write(json.dumps(entry | {"folder": str(version.own_folder)}) + "\n")
            except OSError as error:
                logger.warning("the history of versions can't be written: %s", error)

"""The front's way to the replicas, by Serve's handles, and a watch over them.

Each replica is a deployment of its own, so that a request goes to the one that was chosen.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview

from rlhf_ray.serving.front import ReplicaLost
from rlhf_ray.serving.relay import Piece, Relayed

logger = logging.getLogger(__name__)

WATCH_EVERY_S = 2.0
# Serve's controller, which looks every two seconds, may call a replica running for so long after it has ended.
_STALE_S = 10.0
_ANSWERING = frozenset({"RUNNING", "UPDATING"})  # updating: it takes a new user_config while it answers


class ReplicaLink:
    """One replica."""

    def __init__(self, name: str, handle: DeploymentHandle, models: Sequence[str]):
        self.name, self.models = name, models
        self.place = (handle.app_name, name)  # in Serve: another application has replicas of the same names
        self.up = True
        self.ongoing = 0
        self._answers = handle.options(method_name="answer", stream=True)
        self._stats = handle.options(method_name="stats")
        self._states = handle.options(method_name="states")
        self._down = asyncio.Event()
        self._ended_at: float | None = None
        """When a request has found out that the replica has ended, until Serve knows it too."""

    async def answer(self, request: Relayed) -> AsyncGenerator[Piece]:
        self.ongoing += 1
        complete = False
        response: Any = None
        try:
            response = self._answers.remote(request)  # a generator: the handle streams
            yield await self._first(response)
            async for piece in response:
                yield piece
            complete = True
        except (RayError, RayServeException) as error:
            if isinstance(error, RayActorError):
                self._ended()
            logger.info("%s was lost while it answered: %s", self.name, error)
            raise ReplicaLost(self.name) from error
        except StopAsyncIteration:
            return
        finally:
            self.ongoing -= 1
            if not complete and response is not None:
                response.cancel()

    async def _first(self, response: Any) -> Piece:
        """The first piece. Serve would let the request wait for a replica that may never come back."""
        first, down = asyncio.ensure_future(response.__anext__()), asyncio.ensure_future(self._down.wait())
        try:
            await asyncio.wait({first, down}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                raise ReplicaLost(self.name)
            return first.result()
        finally:
            first.cancel()
            down.cancel()
            await asyncio.gather(first, down, return_exceptions=True)

    async def stats(self) -> dict[str, Any]:
        return await self._ask(self._stats)

    async def states(self) -> dict[str, dict[str, dict[str, Any]]]:
        """As `HeldVersions.states`."""
        return await self._ask(self._states)

    async def _ask(self, handle: DeploymentHandle) -> Any:
        try:
            return await handle.remote()
        except (RayError, RayServeException) as error:
            raise ReplicaLost(self.name) from error

    def note(self, up: bool) -> None:
        """What Serve says."""
        if up and self._ended_at is not None and time.monotonic() - self._ended_at < _STALE_S:
            return
        self._ended_at = None
        self._set(up)

    def _ended(self) -> None:
        self._ended_at = time.monotonic()
        self._set(False)

    def _set(self, up: bool) -> None:
        self.up = up
        if up:
            self._down.clear()
        else:
            self._down.set()


async def watch(links: Sequence[ReplicaLink]) -> None:
    """Ask Serve again and again which replicas run, until cancelled."""
    while True:
        try:
            found = await asyncio.to_thread(deployments)
        except (RayError, RayServeException, ConnectionError, TimeoutError) as error:
            # Serve's controller is busy or starts again; the replicas answer without it.
            logger.info("Serve's controller did not answer: %s", error)
        except Exception:  # fault boundary: one look; the next may see more
            logger.exception("Serve's controller could not be asked")
        else:
            for link in links:
                one = found.get(link.place)
                states = [] if one is None else [state for state, number in one.replica_states.items() if number]
                link.note(not _ANSWERING.isdisjoint(states))
        await asyncio.sleep(WATCH_EVERY_S)


def deployments() -> dict[tuple[str, str], DeploymentStatusOverview]:
    """By application and name."""
    applications = serve.status().applications
    return {(app, name): one for app, found in applications.items() for name, one in found.deployments.items()}

"""The front's way to the replicas, by Serve's handles, and a watch over them.

Each replica is a deployment of its own, so that a request goes to the one that was chosen.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview

from rlhf_ray.serving.front import ReplicaLost
from rlhf_ray.serving.relay import Piece, Relayed

logger = logging.getLogger(__name__)

WATCH_EVERY_S = 2.0


class ReplicaLink:
    """One replica."""

    def __init__(self, name: str, handle: DeploymentHandle):
        self.name = name
        self.up = True
        self.ongoing = 0
        self.message = ""
        """What Serve says of it."""
        self._answers = handle.options(method_name="answer", stream=True)
        self._stats = handle.options(method_name="stats")
        self._down = asyncio.Event()

    async def answer(self, request: Relayed) -> AsyncGenerator[Piece]:
        self.ongoing += 1
        response: Any = self._answers.remote(request)  # a generator: the handle streams
        try:
            yield await self._first(response)
            async for piece in response:
                yield piece
        except (RayError, RayServeException) as error:
            logger.warning("%s was lost while it answered: %s", self.name, error)
            raise ReplicaLost(self.name) from error
        except StopAsyncIteration:
            return
        finally:
            self.ongoing -= 1
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

    async def stats(self) -> dict[str, int]:
        try:
            return await self._stats.remote()
        except (RayError, RayServeException) as error:
            raise ReplicaLost(self.name) from error

    def note(self, up: bool, message: str) -> None:
        """What the watch has found."""
        self.up, self.message = up, message
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
            logger.warning("Serve's controller did not answer: %s", error)
        else:
            for link in links:
                one = found.get(link.name)
                running = [] if one is None else [state for state, number in one.replica_states.items() if number]
                link.note("RUNNING" in running, "" if one is None else one.message)
        await asyncio.sleep(WATCH_EVERY_S)


def deployments() -> dict[str, DeploymentStatusOverview]:
    """By name."""
    return {name: one for app in serve.status().applications.values() for name, one in app.deployments.items()}

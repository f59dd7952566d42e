"""The front's way to the replicas, by Serve's handles or by their sockets, and a watch over them.

Each replica is a deployment of its own, so that a request goes to the one that was chosen.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview

from rlhf_ray.serving.absence import Absence
from rlhf_ray.serving.passing import ReplicaLost
from rlhf_ray.serving.relay import Piece, Relayed
from rlhf_ray.serving.replica_socket import FrontEnd, WireLost, connect

logger = logging.getLogger(__name__)

WATCH_EVERY_S = 2.0
START_S = 15.0
_RECONNECT_EVERY_S = 0.2
# Serve's controller, which looks every two seconds, may call a replica running for so long after it has ended.
_STALE_S = 10.0
_ANSWERING = frozenset({"RUNNING", "UPDATING"})  # updating: it takes a new user_config while it answers


class ReplicaLink:
    """One replica. start_s: about how long it takes to start, until it has started again once."""

    def __init__(self, name: str, handle: DeploymentHandle, models: Sequence[str], *, start_s: float = START_S):
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
        self._absence = Absence(start_s)

    @property
    def back_in_s(self) -> float:
        return self._absence.left_s(time.monotonic())

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
        self._absence.note(up, time.monotonic())
        if up:
            self._down.clear()
        else:
            self._down.set()


class SocketLink(ReplicaLink):
    """One replica of this machine, whose socket the requests pass; Serve's handle is left to what is not urgent.

    The connection ends with the replica, and one that listens again answers, so Serve's word on either is not waited for.
    """

    def __init__(self, name: str, handle: DeploymentHandle, models: Sequence[str], socket: str, *, start_s: float = START_S):
        super().__init__(name, handle, models, start_s=start_s)
        self._socket = socket
        self._wire: FrontEnd | None = None
        self._connecting = asyncio.Lock()

    async def answer(self, request: Relayed) -> AsyncGenerator[Piece]:
        self.ongoing += 1
        try:
            if self._wire is None and not await self.connect():
                self._ended()
                raise ReplicaLost(self.name)
            assert self._wire is not None
            async with aclosing(self._wire.answer(request)) as answer:
                async for piece in answer:
                    yield piece
        except WireLost as error:
            raise ReplicaLost(self.name) from error
        finally:
            self.ongoing -= 1

    async def connect(self) -> bool:
        """Whether there is a connection now."""
        async with self._connecting:
            if self._wire is None:
                self._wire = await connect(self._socket, self._lost)
            if self._wire is not None and self._ended_at is not None:
                self._ended_at = None
                self._set(True)
            return self._wire is not None

    def _lost(self) -> None:
        self._wire = None
        self._ended()

    @property
    def waits_for_its_replica(self) -> bool:
        return self._ended_at is not None

    def note(self, up: bool) -> None:
        if not self.waits_for_its_replica:
            self._set(up)

    def _set(self, up: bool) -> None:
        super()._set(up)
        if not up and self._wire is not None:
            self._wire.end_unanswered()  # Serve has found that it hangs


async def reconnect(links: Sequence[ReplicaLink]) -> None:
    """Look again and again whether replicas that have ended are back, until cancelled."""
    while True:
        for link in links:
            if isinstance(link, SocketLink) and link.waits_for_its_replica:
                await link.connect()
        await asyncio.sleep(_RECONNECT_EVERY_S)


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

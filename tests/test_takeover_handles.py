"""On a cluster the front reaches its replicas by Serve's handles: there, too, another one answers what a killed one had in hand.

`build_application` on a Ray of two nodes, a replica on each, behind Serve's own HTTP server. Expected is what the same requests get
undisturbed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from gateway_on_two_nodes import KEY
from processes import descendants
from served_app import save_tiny
from streamed_texts import TAKEN_OVER, text_of

from rlhf_ray.bench.served_process import free_port

pytestmark = [pytest.mark.ray, pytest.mark.thorough]

START_S, BACK_S = 240, 120


class Gateway:
    def __init__(self, folder: Path, log: Path):
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        script = Path(__file__).with_name("gateway_on_two_nodes.py")
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(script), str(folder), str(port)], stdin=subprocess.PIPE, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            self.wait_for(lambda: "\nready 2" in "\n" + log.read_text(), START_S)
            self.wait_for(self.is_whole, BACK_S)
        except BaseException:
            self.end()
            raise

    def client(self):
        return httpx.AsyncClient(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)

    def replicas(self) -> dict[str, int]:
        """Name -> process id."""
        found = {}
        for pid in descendants(self.process.pid):
            try:
                name = re.search(rb":(replica-\d)", (Path("/proc") / str(pid) / "cmdline").read_bytes())
            except OSError:
                continue
            if name:
                found[name[1].decode()] = pid
        return found

    def other_node(self) -> set[int]:
        """The processes of the node that is not the cluster's head."""
        for pid in descendants(self.process.pid):
            command = (Path("/proc") / str(pid) / "cmdline").read_bytes()
            if b"raylet/raylet" in command and b"--head" not in command:
                return {pid} | descendants(pid)
        raise AssertionError("there is one node only")

    def stats(self) -> dict[str, dict]:
        """Of each replica, by its name."""
        found = httpx.get(f"{self.url}/stats", headers={"Authorization": f"Bearer {KEY}"}, timeout=10).json()
        return {each["name"]: each for each in found["replicas"]}

    def is_whole(self) -> bool:
        """Whether the gateway, too, knows that both replicas run."""
        return len(self.replicas()) == 2 and all(each["up"] for each in self.stats().values())

    def wait_for(self, condition, seconds):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)

    def end(self):
        self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            for pid in descendants(self.process.pid) | {self.process.pid}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("served") / "model", positions=4096)
    gateway = Gateway(folder, tmp_path_factory.mktemp("log") / "log")
    yield gateway
    gateway.end()


@pytest.fixture(scope="module")
def expected(gateway):
    async def each():
        async with gateway.client() as client:
            return {way: await text_of(client, way) for way in TAKEN_OVER}

    return asyncio.run(each())


def test_what_a_killed_replica_had_in_hand_is_answered_as_if_nothing_had_happened(gateway, expected):
    async def talk():
        async with gateway.client() as client:
            held = []

            async def kill():
                """Note what a replica has in hand, and end it."""
                one = (await client.get("/stats")).json()["replicas"][0]
                os.kill(gateway.replicas()[one["name"]], signal.SIGKILL)
                held.append((one["running_rows"], one["waiting_rows"]))

            asking = []
            for way in ("sampled whole", "greedy stream", "sampled stream"):
                for _ in range(2):  # one goes to each replica
                    once = kill if len(asking) == 5 else None
                    asking.append((way, asyncio.ensure_future(text_of(client, way, once))))
                    await asyncio.sleep(0.05)
            return [(way, await one) for way, one in asking], held

    answers, held = asyncio.run(talk())
    assert held == [(4, 0)], "two choices of a whole answer and two streams"
    for way, answer in answers:
        assert answer == expected[way], way


def test_a_node_that_is_lost_costs_nobody_an_answer_and_who_asks_before_serve_knows_does_not_wait_for_it(
    gateway, expected
):
    gateway.wait_for(gateway.is_whole, BACK_S)
    lost = gateway.other_node()
    (stays,) = (name for name, pid in gateway.replicas().items() if pid not in lost)
    before = gateway.stats()[stays]["requests"]
    for pid in lost:
        os.kill(pid, signal.SIGKILL)

    async def talk():
        async with gateway.client() as client:
            return await asyncio.gather(*(text_of(client, way) for way in [*TAKEN_OVER] * 2))

    assert asyncio.run(talk()) == [*expected.values()] * 2
    assert gateway.stats()[stays]["requests"] == before + 6

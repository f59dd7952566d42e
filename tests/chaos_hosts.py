"""The Rays of `chaos`: on this machine alone, of several nodes on it, or of hosts in networks of their own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import ray
from chaos_cells import CARD
from processes import wait_for
from ranks import free_port

from rlhf_ray.actors import faults
from rlhf_ray.actors.ray_start import prepare_home
from rlhf_ray.actors.session import OBJECT_STORE_BYTES, ray_session

START_S = 600
STARTS = 5
SETTLED_S = 20  # of a head whose processes have started: one may end for want of another


@contextmanager
def session_with_faults(path: Path) -> Iterator[None]:
    """A Ray whose actors read their faults from a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faults.VARIABLE, str(path))
        with ray_session(None, start_timeout_s=START_S):
            yield


class SameAddress:
    """Nodes of Ray on this machine's own address: a Ray on loopback has one node."""

    def __init__(self):
        self.address = ray.util.get_node_ip_address()

    def start(self, *options: str) -> subprocess.Popen:
        """A head or another host, which ends when its Ray has ended."""
        return start_node(*options)

    def close(self) -> None:
        """There is nothing to take down."""


class Network:
    """Hosts with a network of their own each (a namespace), on one bridge of this machine: their links can go down. As root, on
    Linux."""

    @staticmethod
    def refused() -> str | None:
        """Why there can be none here."""
        for needed in (["unshare", "--net", "ip", "link", "add", "one", "type", "bridge"], ["nsenter", "--version"]):
            with suppress(OSError):
                if subprocess.run(needed, capture_output=True, check=False).returncode == 0:
                    continue
            return "no right to make a network namespace, or no ip or nsenter command"
        return None

    def __init__(self):
        self.bridge, self._hosts = f"chaos{os.getpid()}"[:15], list[str]()
        self._numbers = itertools.count(2)
        self._network = f"10.231.{os.getpid() % 254 + 1}"
        self.address = f"{self._network}.1"
        ip(f"link add {self.bridge} type bridge")
        ip(f"addr add {self.address}/24 dev {self.bridge}")
        ip(f"link set {self.bridge} up")

    def start(self, *options: str) -> subprocess.Popen:
        """The head is this machine, where nothing is cut off."""
        if "--head" in options:
            return start_node(f"--node-ip-address={self.address}", *options)
        number = next(self._numbers)
        host = f"{self.bridge}-{number}"
        ip(f"netns add {host}")
        self._hosts.append(host)
        ip(f"link add {self.bridge[-10:]}v{number} type veth peer name {CARD} netns {host}")
        ip(f"link set {self.bridge[-10:]}v{number} master {self.bridge} up")
        ip(f"-n {host} addr add {self._network}.{number}/24 dev {CARD}")
        for card in (CARD, "lo"):
            ip(f"-n {host} link set {card} up")
        where = [f"--node-ip-address={self._network}.{number}"]
        return start_node(
            *where, *options, inside=["ip", "netns", "exec", host], environment={"GLOO_SOCKET_IFNAME": CARD}
        )

    def close(self) -> None:
        for host in self._hosts:
            ip(f"netns del {host}")
        ip(f"link del {self.bridge}")


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True, timeout=60)


def start_node(*options: str, inside: list[str] | None = None, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """What it says goes to its `stdout`."""
    ray_command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    options = (f"--object-store-memory={OBJECT_STORE_BYTES}", *options)
    command = [*(inside or []), *ray_command, *options]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {})
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)


def start_head(place: SameAddress | Network) -> tuple[subprocess.Popen, str]:
    """(its process, its address). On a busy machine Ray's own processes may not find each other in time: then once more."""
    for _ in range(STARTS):
        address = f"{place.address}:{free_port()}"
        port = address.partition(":")[2]
        head = place.start("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")
        if has_started(head):
            with suppress(subprocess.TimeoutExpired):
                head.wait(SETTLED_S)
            if head.poll() is None:
                return head, address
        end_node(head)
    raise AssertionError(f"no head of Ray has started in {STARTS} tries")


@contextmanager
def hosts_with_faults(path: Path, *, network: bool) -> Iterator[Callable[[], None]]:
    """A Ray of a head, which runs no rank, and two hosts, of which one would do; for each that dies another one comes -> what waits
    for both to be there.

    network: each host has a network of its own.
    """
    over, started = threading.Event(), list[subprocess.Popen]()
    prepare_home(makes_token=True)
    place = Network() if network else SameAddress()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faults.VARIABLE, str(path))
        keeper = None
        try:
            head, address = start_head(place)
            started.append(head)
            keeper = threading.Thread(target=keep_two, args=(place, address, started, over))
            keeper.start()
            with ray_session(address, start_timeout_s=START_S):
                yield lambda: wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 3, seconds=START_S)
        finally:
            over.set()
            if keeper is not None:
                keeper.join()
            for host in reversed(started):
                end_node(host)
            place.close()


def end_node(host: subprocess.Popen) -> None:
    host.terminate()
    try:
        host.wait(60)
    except subprocess.TimeoutExpired:  # it waits for a head that is gone, or was never reached
        host.kill()
        host.wait(60)


def keep_two(
    place: SameAddress | Network, address: str, started: list[subprocess.Popen], over: threading.Event
) -> None:
    """started: the head, and then hosts of one core. One after the other: two that start at once may choose the same socket in the
    session's folder, and then one of their raylets ends."""
    while not over.wait(1.0):
        if sum(host.poll() is None for host in started[1:]) < 2:
            started.append(place.start(f"--address={address}", "--num-cpus=1"))
            has_started(started[-1])


def has_started(node: subprocess.Popen) -> bool:
    """Once it says so, or has ended."""
    assert node.stdout is not None
    return any("Ray runtime started" in line for line in node.stdout)

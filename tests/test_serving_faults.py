"""`serve` with two replicas on real Ray Serve while processes are killed, folders vanish and hostile clients connect."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import streamed_texts
from served_app import save_tiny
from streamed_texts import TAKEN_OVER, text_of

pytestmark = [pytest.mark.ray, pytest.mark.thorough]

START_S, STOP_S = 180, 60
BODY = streamed_texts.BODY | {"max_tokens": 2000}


class Served:
    """The command in a session of its own, as a terminal would start it."""

    def __init__(self, folder: Path, log: Path, *options):
        self.log = log
        command = [sys.executable, "-u", "-m", "rlhf_ray.serving", str(folder), "--name", "model", "--port", "0",
                   "--precision", "float32"]  # fmt: skip
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                [*command, *map(str, options)], stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env={name: value for name, value in os.environ.items() if name != "RLHF_RAY_API_KEY"},
            )  # fmt: skip
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"at (http://127\.0\.0\.1:(\d+))/v1", log.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        self.url, self.port = found[1], int(found[2])

    def post(self, timeout=60, **fields):
        return httpx.post(f"{self.url}/v1/completions", json=BODY | fields, timeout=timeout)

    def get(self, path):
        return httpx.get(self.url + path, timeout=2)

    def replicas(self):
        """Process ids of the replicas."""
        found = []
        for pid in below(self.process.pid):
            with contextlib.suppress(OSError):
                if b"ServeReplica" in (Path("/proc") / str(pid) / "cmdline").read_bytes():
                    found.append(pid)
        return found

    def wait_for(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_S)


def below(pid):
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found, level = set(), {pid}
    while level := {child for child, parent in parents.items() if parent in level}:
        found |= level
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("served") / "model", positions=4096)


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    requests = tmp_path_factory.mktemp("requests") / "requests.jsonl"
    served = Served(
        folder, tmp_path_factory.mktemp("log") / "log", "--replicas", 2, "--max-rows", 8, "--max-waiting-rows", 8,
        "--max-connections", 200, "--request-log", requests,
    )  # fmt: skip
    served.requests = requests
    yield served
    served.end()


def is_unavailable(response):
    assert response.status_code == 503 and set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert int(response.headers["retry-after"]) > 0


def test_as_many_requests_as_both_replicas_hold_are_all_taken(served):
    before = served.get("/stats").json()
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        responses = list(pool.map(lambda seed: served.post(max_tokens=40, seed=seed), range(32)))
    assert [response.status_code for response in responses] == [200] * 32
    after = served.get("/stats").json()
    tokens = sum(response.json()["usage"]["completion_tokens"] for response in responses)
    assert after["tokens"] - before["tokens"] == tokens == 32 * 40
    assert sum(each["tokens"] for each in after["replicas"]) == after["tokens"]


def test_hostile_connections_stop_neither_health_nor_others(served):
    held, big = [], socket.create_connection(("127.0.0.1", served.port))

    def send_much():
        with contextlib.suppress(OSError):
            big.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 134_000_000)

    sending = threading.Thread(target=send_much)
    sending.start()
    try:
        for number in range(384):
            one = socket.create_connection(("127.0.0.1", served.port))
            one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
            held.append(one)
            if number % 50 == 0:
                assert served.get("/health").json() == {"status": "ok"}
        assert served.post(max_tokens=3).status_code == 200
        assert served.get("/health").json() == {"status": "ok"}
    finally:
        sending.join()
        for one in (big, *held):
            one.close()
    assert served.process.poll() is None


def test_all_ports_but_one_of_each_replica_listen_on_loopback(served):
    inside, replicas = set(), served.replicas()
    for pid in {served.process.pid, *below(served.process.pid)}:
        with contextlib.suppress(psutil.Error):
            for one in psutil.Process(pid).net_connections("inet"):
                if one.status == psutil.CONN_LISTEN and one.laddr.ip.removeprefix("::ffff:") != "127.0.0.1":
                    inside.add((pid, one.laddr))
    assert sorted(pid for pid, _ in inside) == sorted(replicas), inside


def test_another_host_name_is_refused(served):
    for host, status in (("evil.example", 403), ("localhost:1", 200)):
        response = httpx.get(f"{served.url}/v1/models", headers={"Host": host})
        assert response.status_code == status


def test_a_client_that_leaves_frees_its_row(served):
    before = served.get("/stats").json()
    with httpx.stream("POST", f"{served.url}/v1/completions", json=BODY | {"stream": True}, timeout=60) as response:
        next(response.iter_lines())
    served.wait_for(lambda: not served.get("/stats").json()["running_rows"], 20)
    after = served.get("/stats").json()
    assert after["cancelled_rows"] - before["cancelled_rows"] == 1 and after["tokens"] - before["tokens"] < 2000


def test_what_a_killed_replica_had_in_hand_is_answered_as_if_nothing_had_happened(served):
    async def talk():
        async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
            expected = {way: await text_of(client, way) for way in TAKEN_OVER}
            victim, killed = served.replicas()[0], []

            async def kill():
                killed.append(os.kill(victim, signal.SIGKILL))

            asking = []
            for way in ("sampled whole", "greedy stream", "sampled stream"):
                for _ in range(2):  # one goes to each replica
                    once = kill if len(asking) == 5 else None
                    asking.append((way, asyncio.ensure_future(text_of(client, way, once))))
                    await asyncio.sleep(0.02)
            return expected, [(way, await one) for way, one in asking], len(killed)

    expected, answers, killed = asyncio.run(talk())
    assert killed == 1
    for way, answer in answers:
        assert answer == expected[way], way
    lines = [json.loads(line) for line in served.requests.read_text().splitlines()]
    assert [line["taken_over"] for line in lines[-6:]].count(1) == 3 and not any(line["failed"] for line in lines[-6:])
    assert 'rlhf_ray_taken_over_answers_total{model="model"' in served.get("/metrics").text
    served.wait_for(lambda: all(each["up"] for each in served.get("/stats").json()["replicas"]))


def test_sigterm_ends_what_runs_and_refuses_what_is_new(served):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        whole = [pool.submit(served.post, max_tokens=1500) for _ in range(2)]
        streams = [pool.submit(served.post, max_tokens=1500, stream=True) for _ in range(2)]
        served.wait_for(lambda: served.get("/stats").json()["running_rows"] == 4)
        served.process.send_signal(signal.SIGTERM)
        served.wait_for(lambda: served.get("/health").status_code == 503, 5)
        is_unavailable(served.get("/health"))
        is_unavailable(served.post(max_tokens=1))
        assert [each.result().json()["usage"]["completion_tokens"] for each in whole] == [1500] * 2
        assert all(each.result().text.endswith("data: [DONE]\n\n") and "error" not in each.result().text for each in streams)
    assert served.process.wait(STOP_S) == 0
    assert "Traceback" not in served.log.read_text(), served.log.read_text()


def test_a_model_folder_that_is_gone_is_said_in_words(folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    served = Served(copy, tmp_path / "log")
    try:
        shutil.rmtree(copy)
        [replica] = served.replicas()
        os.kill(replica, signal.SIGKILL)
        started = time.monotonic()
        with contextlib.suppress(httpx.HTTPError):  # it may end while we ask
            is_unavailable(served.post(max_tokens=3, timeout=10))
        assert served.process.wait(30) == 2 and time.monotonic() - started < 20
        said = served.log.read_text()
        assert str(copy) in said.splitlines()[-1] and "Traceback" not in said
    finally:
        served.end()


def test_a_second_signal_ends_at_once(folder, tmp_path):
    served = Served(folder, tmp_path / "log")
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(served.post, max_tokens=4000)
            served.wait_for(lambda: served.get("/stats").json()["running_rows"] == 1)
            served.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert served.process.poll() is None
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(5) == 128 + signal.SIGTERM
            assert running.exception() is not None
    finally:
        served.end()

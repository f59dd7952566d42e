"""A real server takes new versions while requests are answered: none is dropped, and none is written by two versions.

Expected values are transformers' own `generate`, greedy, of each version.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from served_app import save_tiny
from swapping import Asked, greedy, variant

from rlhf_ray.errors import UserError
from rlhf_ray.publish.client import publish, roll_back
from rlhf_ray.publish.servers import find_server, stop_server
from rlhf_ray.publish.version import ROWS_FILE, version_id

pytestmark = [pytest.mark.ray, pytest.mark.thorough, pytest.mark.timeout(1500)]

START_S, CLIENTS = 600, 4


class Served:
    """The command as a user starts it."""

    def __init__(self, folder, place, *options):
        self.log = place / "log"
        environment = os.environ | {"RLHF_RAY_SERVERS": str(place / "servers")}
        environment.pop("RLHF_RAY_API_KEY", None)
        with open(self.log, "w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "rlhf_ray.serving", str(folder), "--name", "m", "--port", "0", "--precision",
                 "float32", *options], stdout=out, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"at (http://127\.0\.0\.1:\d+)", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)
        self.url = found[1]


class Client(threading.Thread):
    """Asks again and again."""

    def __init__(self, url, expected, number):
        super().__init__(daemon=True)
        self.url, self.asked = url, Asked(expected, number)

    def run(self):
        with httpx.Client(timeout=300, trust_env=False) as client:
            while not self.asked.over:
                try:
                    self.asked.take(client.post(f"{self.url}/v1/completions", json=self.asked.body()))
                except httpx.HTTPError as error:
                    self.asked.failed(error)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    place = tmp_path_factory.mktemp("swap")
    first = save_tiny(place / "first")
    versions = [variant(first, place / f"weights_{seed}", seed) for seed in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_RAY_SERVERS", str(place / "servers"))
        served = Served(first, place)
        served.first, served.versions, served.place = first, versions, place
        yield served
        served.process.kill()
        served.process.wait()


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.1)


def state(served):
    return httpx.get(f"{served.url}/versions", timeout=60, trust_env=False).json()["data"][0]


def test_three_swaps_drop_nothing_and_mix_nothing(served):
    first = version_id(served.first)
    expected = {first: greedy(served.first)} | {version.id: greedy(version.folder) for version in served.versions}
    assert len({json.dumps(texts) for texts in expected.values()}) == 4
    note = find_server(source=served.first)
    clients = [Client(served.url, expected, number) for number in range(CLIENTS)]
    asked = [client.asked for client in clients]
    for client in clients:
        client.start()
    try:
        for version in served.versions:
            seen = sum(one.answers for one in asked)
            until(lambda seen=seen: sum(one.answers for one in asked) >= seen + CLIENTS)
            told = publish(note, version, watch_s=0.0)
            assert told["history"][-1]["logprob_gap"] < 1e-4
        last = served.versions[-1].id
        until(lambda: all(one.versions[-1:] == [last] for one in asked))
        until(lambda: state(served)["stable"] == last)
    finally:
        for one in asked:
            one.over = True
        for client in clients:
            client.join(300)
    assert [wrong for one in asked for wrong in one.wrong] == []
    order = [first, *(version.id for version in served.versions)]
    assert {version for one in asked for version in one.versions} >= {first, last}
    for one in asked:  # none goes back
        places = [order.index(version) for version in one.versions]
        assert places == sorted(places)
    assert state(served)["earlier"] == order[:-1]


def test_a_version_that_is_not_what_training_says_takes_no_request(served, tmp_path):
    damaged = variant(served.first, tmp_path / "damaged", 9)
    rows = json.loads((Path(damaged.folder) / ROWS_FILE).read_text())
    rows["logprobs"][0][3] -= 1.0
    (Path(damaged.folder) / ROWS_FILE).write_text(json.dumps(rows))
    before = state(served)["stable"]
    with pytest.raises(UserError, match="log-probs differ from training's"):
        publish(find_server(source=served.first), damaged)
    now = state(served)
    assert (now["stable"], now["candidate"], now["history"][-1]["what"]) == (before, None, "refused")


def test_a_canary_takes_its_share_is_pinned_and_goes_back_by_hand(served, tmp_path):
    canary, note = variant(served.first, tmp_path / "canary", 10), find_server(source=served.first)
    stable = state(served)["stable"]
    publish(note, canary, share=0.25)

    def asked(**headers):
        body = {"model": "m", "prompt": "the", "max_tokens": 1}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=120, trust_env=False)
        return answer.headers["x-model-version"]

    versions = [asked() for _ in range(8)]
    assert sorted(versions) == sorted([canary.id] * 2 + [stable] * 6)
    assert [asked(**{"X-Model-Version": each}) for each in (canary.id, stable)] == [canary.id, stable]
    assert roll_back(note, why="asked for")["candidate"] is None and asked() == stable
    metrics = httpx.get(f"{served.url}/metrics", timeout=60, trust_env=False).text
    assert f'rlhf_ray_tokens_total{{kind="completion",model="m",version="{canary.id}"}} 3.0' in metrics
    assert f'rlhf_ray_version_share{{model="m",version="{stable}"}} 1.0' in metrics


def test_stop_ends_it_and_its_note_goes(served):
    note = find_server(source=served.first)
    stop_server(note, 120)
    assert served.process.wait(60) == 0
    with pytest.raises(UserError, match="no server of yours"):
        find_server()

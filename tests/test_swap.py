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
import torch
from safetensors.torch import load_file
from swapping import PROMPTS, TOKENS, Asked, greedy, variant
from tiny import tiny_recipe, write_start
from transformers import AutoModelForCausalLM

from rlhf_ray.actors.ppo_stage import run_ppo
from rlhf_ray.errors import UserError
from rlhf_ray.publish.client import publish, roll_back
from rlhf_ray.publish.servers import find_server, stop_server
from rlhf_ray.publish.version import ROWS_FILE, version_id
from rlhf_ray.runs.run_folder import RunFolder

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


def sharpen(folder):
    """Random weights give flat distributions, whose greedy token may change with the last bit."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.wte.weight *= 5
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    place = tmp_path_factory.mktemp("swap")
    run = write_start(tiny_recipe(), RunFolder(place / "run"))
    first = run.stage("sft").model
    sharpen(first)
    versions = [variant(first, place / f"weights_{seed}", seed) for seed in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_RAY_SERVERS", str(place / "servers"))
        served = Served(first, place)
        served.first, served.versions, served.place, served.run = first, versions, place, run
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


class Reader(threading.Thread):
    """Asks until `over`; keeps what it read, with the version that each answer names."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url, self.over, self.read = url, threading.Event(), []

    def run(self):
        with httpx.Client(timeout=300, trust_env=False) as client:
            while not self.over.is_set():
                prompt, length = PROMPTS[len(self.read) % len(PROMPTS)], {"max_tokens": TOKENS, "min_tokens": TOKENS}
                body = {"model": "m", "prompt": prompt, "temperature": 0, "ignore_eos": True} | length
                answer = client.post(f"{self.url}/v1/completions", json=body)
                version, told = answer.headers["x-model-version"], answer.json()
                self.read.append((version, told["system_fingerprint"], prompt, told["choices"][0]["text"]))


def test_a_training_publishes_into_the_server_of_its_run(served, session):
    """ppo.publish_every: two steps, a version after each, while somebody reads. Each answer is what the version it names writes."""
    published, reader, before = [], Reader(served.url), state(served)["stable"]

    def progress(event):
        if "published" in event:
            published.append(event["published"])
        if event.get("step") == 2 and "metrics" in event:  # a version that is on its way would leave the next one out
            until(lambda: len(published) == 1, 300)

    reader.start()
    try:
        run_ppo(tiny_recipe(ppo={"steps": 2, "publish_every": 1, "learning_rate": 0.01}), served.run, progress)
        seen = len(reader.read)
        until(lambda: len(reader.read) >= seen + 2 * len(PROMPTS))
    finally:
        reader.over.set()
        reader.join(300)
    failures = served.run.events.read_text() if served.run.events.exists() else ""
    assert (len(published), failures) == (2, "")
    shelf = served.run.path / "published"
    folders = {version.id: version.folder for version in served.versions} | {each: shelf / each for each in published}
    folders[version_id(served.first)] = served.first
    expected = {version: greedy(folders[version]) for version in {before, *published}}
    assert len({json.dumps(texts) for texts in expected.values()}) == 3
    for header, fingerprint, prompt, text in reader.read:
        assert header == fingerprint and text == expected[header][prompt]
    assert reader.read[-1][0] == published[-1]
    ours, final = (load_file(folder / "model.safetensors") for folder in (shelf / published[-1], served.run.stage("ppo").model))
    assert all(torch.equal(ours[name], final[name]) for name in final)


def test_stop_ends_it_and_its_note_goes(served):
    note = find_server(source=served.first)
    stop_server(note, 120)
    assert served.process.wait(60) == 0
    with pytest.raises(UserError, match="no server of yours"):
        find_server()

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
from served_app import save_tiny
from transformers import AutoModelForCausalLM

from rlhf_ray.errors import UserError
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.publish.client import kept_copy, publish, roll_back
from rlhf_ray.publish.servers import find_server, stop_server
from rlhf_ray.publish.version import ROWS_FILE, version_id

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

START_S, TOKENS, CLIENTS = 600, 24, 4
PROMPTS = ["the cat", "the dog sat on", "then they"]


def variant(folder, target, seed):
    """The same tokenizer and shape, other weights; its version in `target`'s parent."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 * parameter.std())
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(target)
    return kept_copy(target, target.parent)


def greedy(folder):
    """prompt -> the text that the model writes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    found = {}
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        out = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        found[prompt] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=False)
    return found


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
    """Asks again and again, every second time for a stream, and keeps what is wrong with an answer."""

    def __init__(self, url, expected, number):
        super().__init__(daemon=True)
        self.url, self.expected, self.number = url, expected, number
        self.wrong, self.answers, self.versions, self.over = [], 0, [], False

    def run(self):
        with httpx.Client(timeout=300, trust_env=False) as client:
            while not self.over:
                prompt, stream = PROMPTS[(self.answers + self.number) % len(PROMPTS)], self.answers % 2 == 0
                try:
                    self.check(prompt, *self.ask(client, prompt, stream))
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                self.answers += 1

    def ask(self, client, prompt, stream):
        body = {"model": "m", "prompt": prompt, "max_tokens": TOKENS, "min_tokens": TOKENS, "temperature": 0, "stream": stream}
        answer = client.post(f"{self.url}/v1/completions", json=body | {"ignore_eos": True})
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code} {answer.text[:300]}")
        if not stream:
            chunks = [answer.json()]
        else:
            lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
            if lines[-1] != "[DONE]":
                raise ValueError(f"a stream ended with {lines[-1]}")
            chunks = [json.loads(line) for line in lines[:-1]]
        named = {chunk["system_fingerprint"] for chunk in chunks} | {answer.headers["x-model-version"]}
        return "".join(chunk["choices"][0]["text"] for chunk in chunks), named

    def check(self, prompt, text, named):
        if len(named) != 1:
            self.wrong.append(f"several versions in one answer: {named}")
            return
        (version,) = named
        self.versions.append(version)
        if text != self.expected[version][prompt]:
            self.wrong.append(f"{version} on {prompt!r}: {text!r}, not {self.expected[version][prompt]!r}")


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
    for client in clients:
        client.start()
    try:
        for version in served.versions:
            seen = sum(client.answers for client in clients)
            until(lambda seen=seen: sum(client.answers for client in clients) >= seen + CLIENTS)
            told = publish(note, version, watch_s=0.0)
            assert told["history"][-1]["logprob_gap"] < 1e-4
        last = served.versions[-1].id
        until(lambda: all(client.versions[-1:] == [last] for client in clients))
        until(lambda: state(served)["stable"] == last)
    finally:
        for client in clients:
            client.over = True
        for client in clients:
            client.join(300)
    assert [wrong for client in clients for wrong in client.wrong] == []
    seen = {version for client in clients for version in client.versions}
    assert seen >= {first, last} and seen <= set(expected)
    for client in clients:  # none goes back
        order = [[first, *(version.id for version in served.versions)].index(version) for version in client.versions]
        assert order == sorted(order)
    held = [set(each) for each in (state(served)["earlier"],)]
    assert held == [{first, served.versions[0].id, served.versions[1].id}]


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

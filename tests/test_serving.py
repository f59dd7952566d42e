"""`serve` as a process of its own, on real Ray Serve, HTTP and OpenAI's client. One start for all tests."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch
from processes import without_waiting

from rlhf_ray.config import FromScratch, ModelConfig
from rlhf_ray.models.load import build_causal_lm, load_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.ray

KEY = "a-key-for-tests"
START_S, STOP_S = 180, 60


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder with a tiny random policy, and an older SFT model that must not be served."""
    run = tmp_path_factory.mktemp("runs") / "tiny-run"
    tokenizer = train_tokenizer(["the cat sat on the mat and the dog sat on the log. café 漢字 🙂 "] * 8, 300)
    for stage, seed in (("sft", 1), ("ppo", 0)):
        shape = FromScratch(layers=2, width=32, heads=2, positions=4096, vocab_size=300)
        model = build_causal_lm(ModelConfig(from_scratch=shape), tokenizer, seed=seed)
        with torch.no_grad():
            model.transformer.wte.weight *= 5
        (run / stage).mkdir(parents=True)
        save_model(model, tokenizer, run / stage / "model", "tiny")
    return run


def command(*arguments):
    return [sys.executable, "-u", "-m", "rlhf_ray.serving", *map(str, arguments)]


class ServerProcess:
    """The served run in a session of its own, as a terminal would start it."""

    def __init__(self, run_folder: Path, log: Path):
        self.log = log
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                command(run_folder, "--port", 0, "--precision", "float32", "--max-body-bytes", 100_000),
                env=os.environ | {"RLHF_RAY_API_KEY": KEY},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"at (http://127\.0\.0\.1:(\d+))/v1", log.read_text())):
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"not serving after {START_S} s: {log.read_text()}"
            time.sleep(0.2)
        self.url, self.port = found[1], int(found[2])

    def client(self, key=KEY):
        without_tls = httpx.Client(verify=False)  # else it reads all certificates of this machine, for 50 ms
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, http_client=without_tls)

    def http(self, method, path, **kwargs):
        return httpx.request(method, self.url + path, headers={"Authorization": f"Bearer {KEY}"}, timeout=60, **kwargs)

    def stats(self):
        return self.http("GET", "/stats").json()


@pytest.fixture(scope="module")
def server(run_folder, tmp_path_factory):
    server = ServerProcess(run_folder, tmp_path_factory.mktemp("log") / "serve.log")
    yield server
    if server.process.poll() is None:
        server.process.kill()
        server.process.wait(STOP_S)


def test_the_policy_of_the_run_answers_the_openai_client(server, run_folder):
    model, tokenizer = load_causal_lm(run_folder / "ppo" / "model"), load_tokenizer(run_folder / "ppo" / "model")
    prompt_ids = torch.tensor([tokenizer("the cat").input_ids])
    expected = model.generate(prompt_ids, do_sample=False, max_new_tokens=24)[0, prompt_ids.shape[1] :]
    client = server.client()
    assert [model.id for model in client.models.list().data] == ["tiny-run"]
    result = client.completions.create(model="tiny-run", prompt="the cat", max_tokens=24, temperature=0)
    assert result.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert result.usage.completion_tokens == len(expected)


def test_seed_n_stop_and_stream_agree(server):
    client = server.client()
    request = {"model": "tiny-run", "prompt": "the dog", "max_tokens": 30, "seed": 5, "n": 2}
    whole = client.completions.create(**request)
    again = client.completions.create(**request)
    texts = [choice.text for choice in whole.choices]
    assert texts == [choice.text for choice in again.choices] and texts[0] != texts[1]
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    for index in range(2):
        pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert len(pieces) > 3 and "".join(pieces) == texts[index]
    assert chunks[-1].usage == whole.usage
    # Half a character, which a decoder shows as U+FFFD, is no text to stop at.
    stop = next(text for i in range(4, 28) if "\N{REPLACEMENT CHARACTER}" not in (text := texts[0][i : i + 3]))
    stopped = client.completions.create(**request | {"n": 1, "stop": stop})
    assert stopped.choices[0].text == texts[0].split(stop)[0] and stopped.choices[0].finish_reason == "stop"


def test_chat_whole_and_streamed(server):
    client = server.client()
    request = {"model": "tiny-run", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "seed": 1}
    chat = client.chat.completions.create(**request, logprobs=True)
    assert chat.usage.completion_tokens == len(chat.choices[0].logprobs.content)
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat.choices[0].message.content


def test_errors_are_the_clients_own_classes(server):
    with pytest.raises(openai.AuthenticationError) as wrong_key:
        server.client("wrong").models.list()
    assert wrong_key.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as wrong_model:
        server.client().completions.create(model="gpt-17", prompt="x")
    assert wrong_model.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_many:
        server.client().completions.create(model="tiny-run", prompt="x", n=17)
    assert too_many.value.param == "n"
    with pytest.raises(openai.BadRequestError):
        server.client().chat.completions.create(model="tiny-run", messages=[{"role": "user"}])
    for method, path, kwargs, status in (
        ("GET", "/v1/nothing", {}, 404),
        ("GET", "/v1/completions", {}, 405),
        ("POST", "/v1/completions", {"content": b"x" * 5_000_000}, 413),
    ):
        response = server.http(method, path, **kwargs)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{server.url}/health", timeout=30).json() == {"status": "ok"}


def test_concurrent_requests_share_steps(server):
    before = server.stats()

    def one(index):
        return server.client().completions.create(
            model="tiny-run", prompt="the mat", max_tokens=80, seed=index, temperature=0.7 + index / 20)  # fmt: skip

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        results = list(pool.map(one, range(16)))
    after = server.stats()
    tokens = sum(result.usage.completion_tokens for result in results)
    assert after["tokens"] - before["tokens"] == tokens
    assert tokens > 2.5 * (after["steps"] - before["steps"]), "one by one it is a step a token"


def test_a_client_that_leaves_frees_its_rows(server):
    before = server.stats()
    body = {"model": "tiny-run", "prompt": "the", "n": 8, "max_tokens": 4000, "top_k": 1, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60,
                      headers={"Authorization": f"Bearer {KEY}"}) as response:  # fmt: skip
        first = next(response.iter_lines())
        assert json.loads(first.removeprefix("data: "))["object"] == "text_completion"
    deadline = time.monotonic() + 30
    while (stats := server.stats())["running_rows"]:
        assert time.monotonic() < deadline, stats
        time.sleep(0.05)
    assert stats["cancelled_rows"] - before["cancelled_rows"] == 8
    assert stats["tokens"] - before["tokens"] < 8 * 4000


def test_a_taken_port_and_an_open_address_without_a_key_are_refused(server, run_folder):
    without_key = {name: value for name, value in os.environ.items() if name != "RLHF_RAY_API_KEY"}
    for arguments, words in ((("--port", server.port), f"{server.port}"), (("--host", "0.0.0.0"), "API key")):
        refused = subprocess.run(
            command(run_folder, *arguments), capture_output=True, text=True, timeout=60, env=without_key)  # fmt: skip
        assert refused.returncode == 2 and words in refused.stderr
        assert "Traceback" not in refused.stderr and refused.stderr.count("\n") == 1


def descendants(pid):
    """Process id -> start time, of all processes below `pid`."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(folder.name)] = (int(fields[1]), int(fields[19]))
    found, level = {}, {pid}
    while level := {child for child, (parent, _) in parents.items() if parent in level}:
        found |= {child: parents[child][1] for child in level}
    return found


def test_all_ports_but_one_of_the_replica_listen_on_loopback(server):
    """Which Serve gives each replica, behind the token."""
    outside = set()
    for pid in {server.process.pid, *descendants(server.process.pid)}:
        with contextlib.suppress(psutil.Error):
            for one in psutil.Process(pid).net_connections("inet"):
                if one.status == psutil.CONN_LISTEN and one.laddr.ip.removeprefix("::ffff:") != "127.0.0.1":
                    outside.add((" ".join(psutil.Process(pid).cmdline()), one.laddr))
    assert len(outside) == 1 and "ServeReplica" in next(iter(outside))[0], outside


def test_ctrl_c_releases_everything_and_exits_130(server):
    """Last: it ends the server."""
    below = descendants(server.process.pid)
    assert len(below) > 5
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(STOP_S) == 130
    deadline = time.monotonic() + 20
    while left := {pid for pid, start in below.items() if (Path("/proc") / str(pid)).exists() and alive(pid, start)}:
        assert time.monotonic() < deadline, [(Path("/proc") / str(pid) / "cmdline").read_text() for pid in left]
        time.sleep(0.1)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health", timeout=5)
    said = server.log.read_text()
    assert "Traceback" not in said and len(without_waiting(said)) == 4, said
    assert KEY not in said


def alive(pid, start):
    try:
        fields = (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(fields[19]) == start and fields[0] != "Z"

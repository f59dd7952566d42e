"""What a server notes of its answers: request log, metrics, the judge's scores; and where servers are. No torch."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import socket
import stat

import httpx
import pytest
from fastapi import FastAPI, Request
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import JSONResponse
from test_http_reward import RewardServer

from rlhf_ray.errors import UserError
from rlhf_ray.publish.servers import (
    ServerNote,
    find_server,
    note_of,
    running_servers,
    server_of,
    started_at,
    stop_server,
    write_note,
)
from rlhf_ray.publish.version import Version
from rlhf_ray.serving.answered import TEXTS, USAGE, Answered
from rlhf_ray.serving.config import Notes
from rlhf_ray.serving.front import Front
from rlhf_ray.serving.judge import Judge
from rlhf_ray.serving.listening import announced, listening
from rlhf_ray.serving.passing import ReplicaLost
from rlhf_ray.serving.publication import Publisher
from rlhf_ray.serving.relay import pieces
from rlhf_ray.serving.request_log import RequestLog
from rlhf_ray.serving.server_metrics import Metrics
from rlhf_ray.serving.streaming import EventStream
from rlhf_ray.serving.versions import VersionTable

A = Version(id="a", folder="/a")


class Link:
    """A replica in this process, whose app tells what ours tells."""

    back_in_s = 0.0

    def __init__(self):
        self.name, self.models, self.up, self.ongoing, self.lost = "replica-1", ("m",), True, 0, False
        self.app = FastAPI()
        self.app.post("/v1/completions")(self.whole)
        self.app.post("/v1/chat/completions")(self.broken)

    async def whole(self, request: Request):
        request.scope["state"] |= {USAGE: {"prompt_tokens": 3, "completion_tokens": 5}, TEXTS: [["secret prompt", "an answer"]]}
        return JSONResponse({"ok": True})

    async def broken(self):
        async def events():
            yield {"number": 1}
            raise RuntimeError("the engine failed")

        return EventStream(events(), lambda: None)

    async def answer(self, request):
        if self.lost:
            raise ReplicaLost(self.name)
        async for piece in pieces(self.app, request):
            yield piece

    async def stats(self):
        return {"steps": 7, "tokens": 20, "running_rows": 2}

    async def states(self):
        return {}


def served(talk, link=None):
    async def inside():
        front = Front([link or Link()], None, {"m": VersionTable(A)})
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://localhost") as client:
            return await talk(front, client)

    return asyncio.run(inside())


def post(client, path="/v1/completions"):
    return client.post(path, json={}, headers={"X-Request-ID": "id-1", "Authorization": "Bearer key"})


# -- the request log


@pytest.mark.parametrize("texts", [False, True])
def test_a_line_for_each_answer_and_texts_only_if_asked(tmp_path, texts):
    async def talk(front, client):
        log = RequestLog(tmp_path / "log", texts=texts)
        front.listeners.append(log.ended)
        await post(client)
        await post(client, "/v1/chat/completions")
        front.links[0].lost = True
        await post(client)
        log.close()

    served(talk)
    raw = (tmp_path / "log").read_text()
    whole, cut, lost = map(json.loads, raw.splitlines())
    assert ("secret" in raw) == texts == ("texts" in whole) and "key" not in raw
    assert whole.items() >= {
        "id": "id-1", "path": "/v1/completions", "status": 200, "failed": False, "model": "m", "version": "a",
        "replica": "replica-1", "prompt_tokens": 3, "completion_tokens": 5,
    }.items()  # fmt: skip
    assert (cut["status"], cut["failed"], lost["status"], lost["failed"]) == (200, True, 503, True)
    assert 0 <= whole["first_s"] <= whole["seconds"] < 300 and whole["time"].endswith("Z")
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


def test_a_log_that_has_no_place_is_told(tmp_path):
    with pytest.raises(UserError, match="can't be written"):
        RequestLog(tmp_path / "none" / "log", texts=False)
    with pytest.raises(UserError, match="nowhere to write"):
        Notes(log_texts=True)


# -- metrics


def test_metrics_are_prometheus_text_with_the_counts():
    async def talk(front, client):
        front.pages["/metrics"] = metrics = Metrics(front)
        front.listeners.append(metrics.ended)
        for _ in range(3):
            await post(client)
        await post(client, "/v1/chat/completions")
        await post(client, "/nothing/of/ours")
        metrics.ended(Answered(method="POST", path="/v1/x", request_id="", status=503, taken_over=2))
        return await client.get("/metrics")

    answer = served(talk)
    assert answer.headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()) if name in ("path", "status", "kind"))):
        sample.value for family in text_string_to_metric_families(answer.text) for sample in family.samples
    }  # fmt: skip
    assert found["rlhf_ray_requests_total", "path=/v1/completions", "status=200"] == 3
    assert found["rlhf_ray_requests_total", "path=other", "status=404"] == 1
    assert found["rlhf_ray_failed_answers_total",] == found["rlhf_ray_taken_over_answers_total",] == 1
    assert (found["rlhf_ray_tokens_total", "kind=prompt"], found["rlhf_ray_tokens_total", "kind=completion"]) == (9, 15)
    assert found["rlhf_ray_request_seconds_count", "path=/v1/completions"] == 3
    assert (found["rlhf_ray_engine_tokens_total",], found["rlhf_ray_engine_running_rows",]) == (20, 2)
    assert (found["rlhf_ray_replica_up",], found["rlhf_ray_version_share",]) == (1, 1)


# -- the judge


def test_the_judge_scores_answers_for_the_comparison_and_costs_nothing_where_it_fails():
    with RewardServer((500, {}), (200, {"rewards": [2.5]})) as server:

        async def talk(front, client):
            publisher = Publisher(front.tables, front.links, lambda held: None)
            judge = Judge(server.url, publisher)
            front.listeners.append(judge.ended)
            task = asyncio.ensure_future(judge.run())
            try:
                for asked in (1, 2):
                    assert (await post(client)).status_code == 200
                    async with asyncio.timeout(60):
                        while len(server.bodies) < asked or (asked == 2 and not publisher.records["m"]["a"].scores):
                            await asyncio.sleep(0.01)
            finally:
                task.cancel()
            return publisher.state("m")

        state = served(talk)
    assert server.bodies[0][1]["query"] == ["secret promptan answer"]
    assert (state["versions"][0]["score"], state["versions"][0]["scored"]) == (2.5, 1)


# -- where servers are


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_RAY_SERVERS", str(tmp_path / "servers"))
    return tmp_path


def note(port, given, pid=None, started=None):
    pid = pid or os.getpid()
    return ServerNote(
        pid=pid, started=started or started_at(pid), url=f"http://127.0.0.1:{port}", port=port, served={"m": str(given)},
        stage="policy",
    )  # fmt: skip


def test_a_server_is_found_by_its_run_or_by_its_port_and_its_note_is_its_owners_alone(folder):
    for run in ("one", "two"):
        (folder / run / "ppo" / "model").mkdir(parents=True)
    path = write_note(note(8001, folder / "one"))
    write_note(note(8002, folder / "two" / "ppo" / "model"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert find_server(source=folder / "one" / "ppo" / "checkpoints" / "step_000001").port == 8001
    assert find_server(source=folder / "two").port == 8002 and find_server(8001).port == 8001
    # A training or a round publishes into a server of its own run alone, never into the only one that happens to run.
    assert server_of(folder / "one").port == 8001 and server_of(folder / "two").port == 8002
    assert server_of(folder / "three") is None and find_server(8001, folder / "three").port == 8001
    write_note(note(8003, folder / "one" / "sft"))
    with pytest.raises(UserError, match="several servers serve .*one: --port 8001, --port 8003; stop all but one"):
        server_of(folder / "one")
    with pytest.raises(UserError, match="several servers run here"):
        find_server()
    with pytest.raises(UserError, match=r"no server of yours .* at port 9; there is --port 8001 \(m\), --port 8002"):
        find_server(9)


def test_a_port_that_is_taken_is_said_to_be_whose(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf":{port} \(Address already in use\); choose another"):
            listening("127.0.0.1", port)
        write_note(note(port, folder))
        with pytest.raises(UserError, match=rf"in use by your server of m, which `rlhf-ray serve --stop --port {port}` ends\)"):
            listening("127.0.0.1", port)
    with pytest.raises(UserError, match="no server of yours runs on this machine; start one"):
        note_of(port).unlink()
        find_server()


def test_what_a_server_says_of_itself_fits_its_prompts():
    def said(**settings):
        return announced("http://h:1", ["m"], "policy", **{"has_key": False, "votes": "votes.db"} | settings).splitlines()

    where, none, _, curl = said()
    assert where.endswith("votes (votes.db) and results: http://h:1/") and "--prompts FILE" in none and "Once upon a time" in curl
    listed = [[{"role": "user", "content": "Hi"}], "long " * 100, "Who's there?\n"]
    where, _, curl = said(prompts=listed)
    body = json.loads(shlex.split(curl)[-1])
    assert body == {"model": "m", "prompt": "Who's there?\n", "max_tokens": 40}, "one that the model knows"
    assert len(said(votes=None)) == 3 and "Once upon a time" in said(prompts=listed[:2])[-1]


def test_notes_of_servers_that_were_killed_are_passed_over(folder):
    write_note(note(8001, folder, started="1"))  # another process has its number now
    write_note(note(8002, folder, pid=2**22 + 1, started="5"))
    note_of(8003).write_text("{")
    assert running_servers() == []


def test_stop_ends_a_process_and_waits_for_it(folder):
    import subprocess
    import sys

    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    found = note(8001, folder, pid=process.pid)
    write_note(found)
    stop_server(found, 60)
    assert process.wait(60) == -15 and not note_of(8001).exists()

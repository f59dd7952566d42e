"""The front over links to replicas that are full, lost or slow, by OpenAI's client and raw requests. No Ray."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse

from rlhf_ray.serving.api_errors import error_body
from rlhf_ray.serving.config import AppConfig
from rlhf_ray.serving.deployment import Gateway
from rlhf_ray.serving.front import Front
from rlhf_ray.serving.guard import guarded
from rlhf_ray.serving.passing import ReplicaLost
from rlhf_ray.serving.relay import pieces
from rlhf_ray.serving.streaming import EventStream


class AppLink:
    """A replica in this process that holds `room` requests, and is lost, with an error or without, after `pieces_left` pieces."""

    back_in_s = 3.0

    def __init__(self, name, room=100, pieces_left=1_000_000, says_so=True):
        self.name, self.models, self.up, self.ongoing = name, ("m",), True, 0
        self.says_so = says_so
        self.room, self.pieces_left, self.inside, self.served, self.ended = room, pieces_left, 0, 0, 0
        self.app = FastAPI()
        self.app.post("/v1/completions")(self.whole)
        self.app.post("/v1/stream")(self.stream)

    async def whole(self):
        if self.inside >= self.room:
            return JSONResponse(error_body(429, "full"), status_code=429, headers={"Retry-After": "1"})
        self.inside += 1
        try:
            await asyncio.sleep(0.05)
        finally:
            self.inside -= 1
        self.served += 1
        return {"id": self.name, "object": "text_completion", "created": 1, "model": "m", "choices": []}

    async def stream(self):
        async def events():
            try:
                for number in range(50):
                    yield {"number": number}
                    await asyncio.sleep(0.01)
            finally:
                self.ended += 1

        return EventStream(events(), lambda: None)

    async def answer(self, request):
        self.ongoing += 1
        try:
            async for piece in pieces(self.app, request):
                if self.pieces_left == 0 and not self.says_so:
                    return
                if self.pieces_left == 0:
                    raise ReplicaLost(self.name)
                self.pieces_left -= 1
                yield piece
        finally:
            self.ongoing -= 1

    async def stats(self):
        return {"steps": 3, "tokens": 10 if self.name == "a" else 5}


def run(links, talk):
    front = Front(links)
    app = guarded(front, AppConfig(name="m"))

    async def inside():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await talk(client, front)

    return asyncio.run(inside())


def post(client, path="/v1/completions"):
    return client.post(path, json={}, timeout=10)


def is_unavailable(response):
    error = response.json()["error"]
    assert response.status_code == 503 and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "server_error" and int(response.headers["retry-after"]) > 0


def test_no_request_is_refused_while_a_replica_has_room():
    links = [AppLink("a", room=16), AppLink("b", room=16)]

    async def talk(client, front):
        return await asyncio.gather(*(post(client) for _ in range(32)))

    assert [response.status_code for response in run(links, talk)] == [200] * 32
    assert links[0].served == links[1].served == 16


def test_uneven_rooms_are_filled_too_and_then_the_refusal_is_the_replicas():
    links = [AppLink("a", room=3), AppLink("b", room=9)]

    async def talk(client, front):
        return await asyncio.gather(*(post(client) for _ in range(15)))

    responses = run(links, talk)
    assert sorted(response.status_code for response in responses) == [200] * 12 + [429] * 3
    full = next(response for response in responses if response.status_code == 429)
    assert full.headers["retry-after"] == "1" and full.json()["error"]["type"] == "rate_limit_error"


def test_a_lost_replica_costs_nothing_while_another_runs_and_503_otherwise():
    async def talk(client, front):
        first = await post(client)
        front.links[1].up = False
        second = await post(client)
        front.links[0].up = False
        return first, second, await post(client), await client.get("/health")

    for lost in (AppLink("a", pieces_left=0), AppLink("a", pieces_left=0, room=0), AppLink("a", pieces_left=0, says_so=False)):
        first, second, third, health = run([lost, AppLink("b")], talk)
        assert first.json()["id"] == "b"
        for response in (second, third, health):
            is_unavailable(response)


@pytest.mark.parametrize("says_so", [True, False])
def test_a_stream_that_is_cut_ends_with_an_error_event(says_so):
    async def talk(client, front):
        return await post(client, "/v1/stream")

    response = run([AppLink("a", pieces_left=4, says_so=says_so)], talk)
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert response.status_code == 200 and events[-1] == "[DONE]"
    assert json.loads(events[0]) == {"number": 0}
    error = json.loads(events[-2])["error"]
    assert error["code"] == "unavailable" and error["type"] == "server_error"


def test_openais_client_reads_both_as_its_own_errors():
    async def talk(client, front):
        mine = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="x", max_retries=0, http_client=client)
        with pytest.raises(openai.InternalServerError) as lost:
            await mine.completions.create(model="m", prompt="x")
        return lost.value

    assert run([AppLink("a", pieces_left=0)], talk).status_code == 503


def test_a_client_that_leaves_ends_the_replicas_work():
    link = AppLink("a")
    front = Front([link])
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/v1/stream",
             "raw_path": b"/v1/stream", "query_string": b"", "root_path": "", "scheme": "http", "headers": []}  # fmt: skip

    async def inside():
        seen, messages = [], [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            while len(seen) < 5:
                await asyncio.sleep(0.005)
            return {"type": "http.disconnect"}

        async def send(message):
            seen.append(message)

        await asyncio.wait_for(front(scope, receive, send), 5)

    asyncio.run(inside())
    assert link.ended == 1 and link.ongoing == front.ongoing == 0


def test_stats_are_sums_and_say_whose_they_are():
    async def talk(client, front):
        both = (await client.get("/stats")).json()
        front.links[1].up = False
        return both, (await client.get("/stats")).json()

    both, one = run([AppLink("a"), AppLink("b")], talk)
    assert (both["steps"], both["tokens"]) == (6, 15)
    assert [(each["name"], each["up"], each.get("tokens")) for each in both["replicas"]] == [("a", True, 10), ("b", True, 5)]
    assert (one["tokens"], one["replicas"][1]) == (10, {"name": "b", "model": "m", "up": False})


def test_a_draining_server_ends_what_it_has_and_refuses_what_is_new():
    async def talk(client, front):
        old = asyncio.ensure_future(post(client, "/v1/stream"))
        while front.ongoing == 0:
            await asyncio.sleep(0.005)
        front.draining = True
        new, health = await post(client), await client.get("/health")
        assert front.ongoing == 1
        old = await old
        assert front.ongoing == 0
        return old, new, health

    old, new, health = run([AppLink("a")], talk)
    assert old.text.count("number") == 50 and old.text.endswith("data: [DONE]\n\n")
    is_unavailable(new)
    is_unavailable(health)


def test_the_gateway_of_a_cluster_starts_as_serve_starts_it(monkeypatch):
    """In the class that Serve wraps around it, which has attributes of its own."""
    wrapped = Gateway.func_or_class
    monkeypatch.setattr(wrapped, "__del__", lambda gateway: None)  # Serve's is a coroutine, which nobody would await

    async def health():
        gateway = wrapped.__new__(wrapped)
        await gateway.__init__(AppConfig(name="m", api_key="k"), {}, {}, {})
        transport = httpx.ASGITransport(gateway.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/health")

    is_unavailable(asyncio.run(health()))

"""What a replica had in hand when it ended is answered by another one, as if nothing had happened. The app on a real tiny engine
behind the front, links that are lost at a chosen piece, no Ray.

Expected is what the same request gets undisturbed.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json

import httpx
import numpy as np
import pytest
from served_app import LIMITS, served_tiny, tiny_folder  # noqa: F401 - fixtures

from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.errors import UserError
from rlhf_ray.publish.version import Version
from rlhf_ray.serving import passing
from rlhf_ray.serving.absence import Absence
from rlhf_ray.serving.app import build_routes
from rlhf_ray.serving.config import AppConfig
from rlhf_ray.serving.front import Front
from rlhf_ray.serving.handover import Begun, Drawn, Journal
from rlhf_ray.serving.passing import MOST_LOST, ReplicaLost
from rlhf_ray.serving.relay import JOURNAL, NOT_HERE, goes_on, is_opening, told, write_answer
from rlhf_ray.serving.versions import VersionTable

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = {"model": "tiny", "prompt": "the cat", "max_tokens": 24, "stream": True, "stream_options": {"include_usage": True}}
TALK = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 24, "stream": True}
SCHEMA = {"type": "array", "items": {"type": "string", "pattern": "^[a-d]{1,6}$"}, "minItems": 3, "maxItems": 3}
WAYS = {
    "greedy": (COMPLETIONS, LONG | {"temperature": 0, "ignore_eos": True}),
    "sampled": (COMPLETIONS, LONG | {"seed": 3, "logprobs": 2}),
    "no seed": (COMPLETIONS, LONG | {"top_p": 0.9, "ignore_eos": True}),
    "choices that end apart": (COMPLETIONS, LONG | {"prompt": ["the cat", "they both"], "n": 2, "seed": 5, "logprobs": 0,
                                                    "stop": ["888", ":::["]}),
    "rules": (COMPLETIONS, LONG | {"seed": 1, "frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.3,
                                   "min_tokens": 12, "logit_bias": {"7": 3}}),
    "echo": (COMPLETIONS, LONG | {"seed": 2, "echo": True, "logprobs": 1}),
    "json": (COMPLETIONS, LONG | {"seed": 4, "max_tokens": 60, "response_format": {
        "type": "json_schema", "json_schema": {"name": "words", "schema": SCHEMA}}}),
    "chat": (CHAT, TALK | {"seed": 6, "n": 2, "logprobs": True, "top_logprobs": 2}),
}  # fmt: skip


END = 1_000_000


class Replica:
    """Over an app of this process. It is lost when the front has so many tokens of its answer (more, where several were put at
    once): -1, before it has the head; END, when only the last piece is missing; None, never."""

    back_in_s = 7.2

    def __init__(self, app, name="replica", lost_after=None, versions=("",)):
        self.app, self.name, self.models, self.up, self.ongoing = app, name, ("tiny",), True, 0
        self.lost_after, self.versions = lost_after, versions
        self.asked, self.journal = [], b""

    async def answer(self, request):
        self.asked.append(request)
        if request.version not in self.versions:
            yield [NOT_HERE, [], b"", False]
            return
        found: asyncio.Queue = asyncio.Queue()  # of pieces, each as the app has put it
        writing = asyncio.ensure_future(write_answer(self.app, request, found.put_nowait))
        try:
            more = True
            while more:
                piece = await found.get()
                more = goes_on(piece)
                if self._is_lost(first=is_opening(piece), last=not more):
                    self.up = False
                    raise ReplicaLost(self.name)
                self.journal += told(piece)[1].get(JOURNAL, b"")
                yield piece
        finally:
            writing.cancel()

    def _is_lost(self, first, last):
        if self.lost_after is None or first:
            return self.lost_after == -1
        return last or sum(map(len, Begun(self.journal).drawn.values())) >= self.lost_after

    async def stats(self):
        return {}


@pytest.fixture(scope="module")
def app(served):
    runner, reader = served
    return build_routes(runner, reader, AppConfig(name="tiny", limits=LIMITS, version="v"))


def ask(links, path, body, *, tables=None, meanwhile=None):
    """-> the response, and what the front notes of it."""
    noted = []

    async def inside():
        front = Front(links, tables=tables)
        front.listeners.append(noted.append)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://localhost") as client:
            asking = asyncio.ensure_future(client.post(path, json=body, timeout=60))
            if meanwhile is not None:
                await meanwhile()
            return await asking

    return asyncio.run(inside()), noted[0]


def events(response):
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]" and lines.count("[DONE]") == 1
    return [json.loads(line) for line in lines[:-1]]


def read(response):
    """What a client reads from a stream, however its tokens were put into chunks: heads, texts, tokens, log-probs, usage."""
    chunks = events(response)
    heads = {(each["id"], each["created"], each["system_fingerprint"]) for each in chunks}
    texts, tokens, numbers, ends, roles, usage = {}, {}, {}, {}, [], []
    for each in chunks:
        if each.get("usage"):
            usage.append(each["usage"])
        for choice in each["choices"]:
            index, delta = choice["index"], choice.get("delta", {})
            if "role" in delta:
                roles.append(index)
            texts[index] = texts.get(index, "") + choice.get("text", delta.get("content") or "")
            if choice["finish_reason"]:
                ends.setdefault(index, []).append(choice["finish_reason"])
            for token, logprob, at in of_logprobs(choice["logprobs"]):
                tokens.setdefault(index, []).append((token, at))
                numbers.setdefault(index, []).append(logprob)
    return len(heads), texts, tokens, ends, roles, usage, numbers


def of_logprobs(found):
    if found is None:
        return []
    if "content" in found:
        return [(each["token"], each["logprob"], tuple(top["token"] for top in each["top_logprobs"])) for each in found["content"]]
    return zip(found["tokens"], found["token_logprobs"], found["text_offset"], strict=True)


def same(first, second):
    *first, logprobs = first
    *second, again = second
    assert first == second
    assert logprobs.keys() == again.keys()
    for index, numbers in logprobs.items():  # a prefix is read at once and not token by token: other roundings
        np.testing.assert_allclose(np.array(again[index], float), np.array(numbers, float), rtol=0, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_whose_replicas_end_is_the_undisturbed_one(app, way):
    if way == "json" and importlib.util.find_spec("llguidance") is None:
        pytest.skip("the package llguidance (extra 'json') is not installed")
    path, body = WAYS[way]
    response, undisturbed = ask([Replica(app)], path, body)
    within_a_stop = [(58, 4), (62, 4)] if way == "choices that end apart" else []
    for first, second in [(0, 0), (2, 3), (9, 1), *within_a_stop, (END, END)]:
        links = [Replica(app, "a", first), Replica(app, "b", second), Replica(app, "c")]
        broken, noted = ask(links, path, body)
        if way == "no seed":  # the front has drawn one, for all three
            (fixed,) = {link.asked[0].fixed for link in links}
            response, undisturbed = ask([Replica(app)], path, body | {"seed": fixed.seed})
        same(read(response), read(broken))
        assert (noted.taken_over, noted.replica, noted.failed) == (2, "c", False) and undisturbed.taken_over == 0
        assert noted.completion_tokens == undisturbed.completion_tokens > 0


@pytest.mark.parametrize("lost_after", [-1, 0])
def test_a_whole_answer_that_was_lost_is_asked_for_again_with_the_same_seed(app, lost_after):
    links = [Replica(app, "a", lost_after), Replica(app, "b", END), Replica(app, "c")]
    response, noted = ask(links, COMPLETIONS, LONG | {"stream": False, "stream_options": None, "n": 2, "ignore_eos": True})
    (fixed,) = {link.asked[0].fixed for link in links}
    again, _ = ask([Replica(app)], COMPLETIONS, LONG | {
        "stream": False, "stream_options": None, "n": 2, "ignore_eos": True, "seed": fixed.seed})  # fmt: skip
    assert response.json() == again.json() | {"id": f"cmpl-{fixed.id}", "created": fixed.created}
    assert (noted.taken_over, noted.replica, noted.failed, noted.completion_tokens) == (2, "c", False, 48)


def test_a_request_costs_so_many_replicas_and_no_more(app):
    for body in (LONG, LONG | {"stream": False, "stream_options": None}):
        links = [Replica(app, str(number), 2 if body["stream"] else -1) for number in range(MOST_LOST + 1)]
        links[-1].back_in_s = 0.0
        response, noted = ask(links, COMPLETIONS, body)
        assert [len(link.asked) for link in links] == [1] * MOST_LOST + [0] and noted.failed
        if body["stream"]:
            assert events(response)[-1]["error"]["code"] == "unavailable"
        else:
            assert response.status_code == 503 and response.headers["retry-after"] == "1", "another replica runs"


def test_a_request_that_no_other_replica_can_take_over_is_asked_to_wait_for_a_new_one(app, monkeypatch):
    monkeypatch.setattr(passing, "WHOLE_WAIT_S", 0.2)
    links = [Replica(app, "a", -1), Replica(app, "b")]
    links[1].up, links[1].back_in_s = False, 100.0
    response, _ = ask(links, COMPLETIONS, LONG)
    assert response.status_code == 503 and response.headers["retry-after"] == "8", "the first that comes back"
    links[0].back_in_s = 90.0
    response, _ = ask(links, COMPLETIONS, LONG)
    assert response.status_code == 503 and response.headers["retry-after"] == "60", "no client waits longer"


def test_a_replica_is_expected_back_after_as_long_as_its_last_start_took():
    absence = Absence(start_s=15.0)
    assert absence.left_s(now=99.0) == 0.0
    absence.note(False, 100.0)
    absence.note(False, 104.0)  # what is known already
    assert [absence.left_s(now) for now in (104.0, 114.0, 120.0, 130.0)] == [11.0, 1.0, 20.0, 30.0]
    absence.note(True, 140.0)
    absence.note(True, 150.0)
    assert absence.left_s(150.0) == 0.0
    absence.note(False, 200.0)
    assert absence.left_s(210.0) == 30.0, "of the 40 that the last one took"


def test_what_has_begun_ends_on_its_version(app):
    table = VersionTable(Version(id="old", folder="nowhere"))
    table.admit(Version(id="new", folder="nowhere"), 1.0)
    for lost_after in (-1, 2):
        links = [Replica(app, "a", lost_after, ["new"]), Replica(app, "b", None, ["old"]), Replica(app, "c", None, ["old", "new"])]
        response, noted = ask(links, COMPLETIONS, LONG, tables={"tiny": table})
        assert "error" not in events(response)[-1] and noted.version == "new"
        assert [[each.version for each in link.asked] for link in links] == [["new"]] * 3


def test_where_nobody_has_the_version_any_more_the_request_ends_in_an_error(app, monkeypatch):
    monkeypatch.setattr(passing, "STREAM_WAIT_S", 0.3)
    monkeypatch.setattr(passing, "WHOLE_WAIT_S", 0.3)
    table = VersionTable(Version(id="old", folder="nowhere"))
    table.admit(Version(id="new", folder="nowhere"), 1.0)
    for lost_after in (-1, 2):
        links = [Replica(app, "a", lost_after, ["new"]), Replica(app, "b", None, ["old"])]
        response, noted = ask(links, COMPLETIONS, LONG, tables={"tiny": table})
        assert {each.version for link in links for each in link.asked} == {"new"} and noted.failed
        if lost_after == -1:
            assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
        else:
            assert events(response)[-1]["error"]["code"] == "unavailable"
    assert table.ongoing["new"] == 0


@pytest.mark.parametrize("streams", [True, False])
def test_what_has_begun_waits_for_a_replica_that_starts_again(app, streams):
    body = LONG if streams else LONG | {"stream": False, "stream_options": None}
    lost = Replica(app, "a", 3 if streams else 0)

    async def start_again():
        while lost.up:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        lost.lost_after, lost.up = None, True

    response, noted = ask([lost], COMPLETIONS, body, meanwhile=start_again)
    again = ask([Replica(app)], COMPLETIONS, body | {"seed": lost.asked[0].fixed.seed})[0]
    if streams:
        same(read(response), read(again))
    else:
        assert response.json()["choices"] == again.json()["choices"]
    assert (noted.taken_over, noted.replica, len(lost.asked)) == (1, "a", 2)


def test_a_stream_waits_for_a_replica_that_has_room_again(app):
    full = Replica(app, "b")
    room, answer = [], full.answer

    async def answers(request):
        if len(full.asked) < 3:
            full.asked.append(request)
            yield [429, [], b"", False]
            return
        room.append(request)
        async for piece in answer(request):
            yield piece

    full.answer = answers
    response, noted = ask([Replica(app, "a", 3), full], COMPLETIONS, LONG)
    assert "error" not in events(response)[-1] and (noted.taken_over, noted.replica, len(room)) == (1, "b", 1)


def test_an_engine_that_goes_on_with_no_others_rows_says_so_before(served, app, monkeypatch):
    """As vLLM: its streams end with an error event, at once, and no other replica is asked."""
    monkeypatch.setattr(served[0], "continues", False)
    links = [Replica(app, "a", END), Replica(app, "b")]
    response, noted = ask(links, COMPLETIONS, LONG)
    assert events(response)[-1]["error"]["code"] == "unavailable" and noted.failed and not links[1].asked


def test_a_journal_is_read_as_it_was_written():
    journal = Journal(logprobs=True)
    journal.opened(0)
    journal.drew(0, Drawn(5, None, -0.5, ((5, -0.5), (7, -1.25))))
    first = journal.take()
    journal.drew(0, Drawn(6, "eos", -0.25, ()))
    journal.drew(2, Drawn(1, "length", -3.0, ((0, -0.1),)))
    journal.counted()
    begun = Begun(first + journal.take())
    assert journal.take() == b"" and begun.opened == {0} and begun.counted
    assert begun.drawn == {
        0: [Drawn(5, None, -0.5, ((5, -0.5), (7, -1.25))), Drawn(6, "eos", -0.25, ())],
        2: [Drawn(1, "length", -3.0, ((0, -0.1),))],
    }
    plain = Journal(logprobs=False)
    plain.drew(1, Drawn(300, None, -0.5, ()))
    assert Begun(plain.take()).drawn == {1: [Drawn(300, None, None, ())]} and not Begun().drawn


def test_a_response_that_is_whole_is_not_gone_on_with(served):
    engine = served[0].engine
    with pytest.raises(UserError, match="whole"):
        engine.submit([1, 2], 0, SamplingParams(max_new_tokens=2), begun=[3, 4])

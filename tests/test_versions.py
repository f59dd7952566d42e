"""Which version answers, and when one is rolled back. No Ray, no torch."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from fastapi import FastAPI

from rlhf_ray.errors import UserError
from rlhf_ray.publish.client import share_of
from rlhf_ray.publish.version import Version
from rlhf_ray.serving.control import Control
from rlhf_ray.serving.front import Front
from rlhf_ray.serving.publication import Publisher
from rlhf_ray.serving.relay import NOT_HERE, pieces
from rlhf_ray.serving.rollback import Record, Thresholds, reason_to_roll_back
from rlhf_ray.serving.versions import NoSuchVersion, VersionTable

A, B, C = (Version(id=name, folder=f"/{name}") for name in "abc")


def taken(table, count):
    return "".join(table.choose().id for _ in range(count))


# -- the share


@pytest.mark.parametrize(("share", "of_20"), [(0.1, 2), (0.25, 5), (0.5, 10), (1.0, 20)])
def test_of_any_20_requests_the_candidate_takes_its_share(share, of_20):
    table = VersionTable(A)
    assert taken(table, 5) == "aaaaa"
    table.admit(B, share)
    for _ in range(50):
        assert taken(table, 20).count("b") == of_20


def test_a_share_that_is_no_fraction_of_a_number_is_kept_over_many_requests():
    table = VersionTable(A)
    table.admit(B, 0.137)
    assert abs(taken(table, 10_000).count("b") - 1370) <= 1


def test_a_pinned_request_goes_where_it_says_and_nowhere_else():
    table = VersionTable(A)
    table.admit(B, 0.1)
    assert [table.choose("b").id, table.choose("a").id] == ["b", "a"]
    with pytest.raises(NoSuchVersion):
        table.choose("c")
    table.drop_candidate()
    with pytest.raises(NoSuchVersion):
        table.choose("b")


def test_a_version_is_held_until_its_last_request_has_ended():
    table = VersionTable(A)
    table.admit(B, 1.0)
    with table.serving(A):
        table.promote()
        assert taken(table, 3) == "bbb" and table.held == [B, A] and table.forget_idle() == []
    assert table.held == [B] and table.forget_idle() == [A] and table.earlier == [A]


def test_a_third_version_takes_the_place_of_a_canary_and_makes_a_full_candidate_stable():
    canary, full = VersionTable(A), VersionTable(A)
    canary.admit(B, 0.1)
    canary.admit(C, 0.5)
    assert (canary.stable, canary.candidate, canary.earlier) == (A, C, [])
    full.admit(B, 1.0)
    full.admit(C, 0.5)
    assert (full.stable, full.candidate, full.earlier) == (B, C, [A])


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.5", 0.5), ("100%", 1.0), ("1", 1.0)])
def test_shares_as_people_write_them(text, share):
    assert share_of(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0%", "101%", "ten", "-1", "nan", "%", "1.2"])
def test_what_is_no_share(text):
    with pytest.raises(UserError, match="no share"):
        share_of(text)


# -- rolling back


def record(answers=0, failed=0, ms=10.0, scores=()):
    found = Record()
    for place in range(answers):
        found.answered(failed=place < failed, seconds=ms / 1000 * 20, tokens=20)
    for score in scores:
        found.scored(score)
    return found


LIMITS = Thresholds(failures=3, failed_share=0.05, slower=2.0, worse=3.0, least=30)


@pytest.mark.parametrize(
    ("new", "old", "words"),
    [
        (record(40, 3), record(500, 0), "3 of its 40 answers failed"),  # 7.5 % against 0 %
        (record(4, 3), record(3, 0), "3 of its 4 answers failed"),  # at once: it needs no 30 answers
        (record(40, 2), record(500, 0), None),  # two may be chance
        (record(100, 5), record(500, 0), None),  # 5 %: no more than allowed
        (record(100, 20), record(500, 100), None),  # both fail in 20 %: it isn't the version
        (record(40, ms=21), record(500, ms=10), "21 ms per token"),
        (record(40, ms=19), record(500, ms=10), None),
        (record(29, ms=100), record(500, ms=10), None),  # too few
        (record(40, ms=100), record(29, ms=10), None),
    ],
)
def test_failures_and_time(new, old, words):
    reason = reason_to_roll_back(new, old, LIMITS)
    assert reason is None if words is None else words in reason


def test_a_score_falls_by_more_than_chance():
    """Scores of -1 and 1 alternate: of 100, the variance is 100/99 and the mean's error 0.1005, of a difference 0.1421."""
    noise = [1.0, -1.0] * 50
    old = record(scores=noise)
    assert reason_to_roll_back(record(scores=[each - 0.42 for each in noise]), old, LIMITS) is None  # 2.96 errors
    told = reason_to_roll_back(record(scores=[each - 0.44 for each in noise]), old, LIMITS)  # 3.10
    assert told is not None and "judge's mean score" in told and "0.14" in told
    assert reason_to_roll_back(record(scores=[-9.0] * 29), old, LIMITS) is None
    assert reason_to_roll_back(record(scores=[each + 5 for each in noise]), old, LIMITS) is None


def test_only_the_last_answers_count():
    new, old = record(500, 30), record(500, 0)
    for _ in range(500):
        new.answered(failed=False, seconds=0.2, tokens=20)
    assert new.failures == 0 and reason_to_roll_back(new, old, LIMITS) is None


# -- publishing, over replicas in this process


class Replicas:
    """What Serve and two replicas do: they are told what to hold, and load it a moment later."""

    def __init__(self, fails=()):
        self.told, self.fails = [], fails
        self.links = [_Link(self, "one"), _Link(self, "two")]

    def deploy(self, wanted):
        self.told.append([version.id for version in wanted["m"]])


class _Link:
    back_in_s = 5.0

    def __init__(self, replicas, name):
        self.replicas, self.name, self.models, self.up, self.ongoing = replicas, name, ("m",), True, 0
        self.lacks = set()  # as a replica that has just started
        self.asked = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self.app = FastAPI()
        self.app.post("/v1/completions")(self._answer)

    async def _answer(self):
        await self.hold.wait()
        return {"replica": self.name}

    async def states(self):
        self.asked += 1
        told = self.replicas.told[-1] if self.replicas.told else ["a"]
        state = "loading" if self.asked % 2 else "ready"
        return {"m": {name: {"state": "failed", "why": "log-probs", "gap": None} if name in self.replicas.fails
                      else {"state": state, "why": None, "gap": 1e-6} for name in told}}  # fmt: skip

    async def answer(self, request):
        if request.version in self.lacks:
            yield [NOT_HERE, [], b"", False]
            return
        async for piece in pieces(self.app, request):
            if len(piece) > 3:  # the first one
                piece[1].append([b"x-model-version", request.version.encode()])
            yield piece

    async def stats(self):
        return {}


def over(replicas, talk, history=None):
    table = VersionTable(A)

    async def inside():
        publisher = Publisher({"m": table}, replicas.links, replicas.deploy, history)
        front = Front(replicas.links, None, {"m": table})
        front.listeners.append(publisher.ended)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://localhost") as client:

            async def ask(**headers):
                answer = await client.post("/v1/completions", json={}, headers=headers)
                return answer.headers.get("x-model-version", answer)

            return await talk(publisher, ask, table)

    return asyncio.run(inside())


@pytest.fixture(autouse=True)
def files_are_as_they_were(monkeypatch):
    monkeypatch.setattr(Version, "check", lambda self: None)


def test_a_version_is_loaded_by_all_then_takes_its_share_then_all(tmp_path):
    replicas, history = Replicas(), tmp_path / "history"

    async def talk(publisher, ask, table):
        state = await publisher.publish("m", B, 0.5)
        halves = [await ask() for _ in range(6)]
        pinned = [await ask(**{"X-Model-Version": "a"}) for _ in range(3)]
        await publisher.publish("m", B, 1.0, watch_s=0.0)
        full = [await ask() for _ in range(3)]
        await publisher.look()  # its watch is over: it is the stable one
        await publisher.look()
        unknown = await ask(**{"X-Model-Version": "a"})
        return state, halves, pinned, full, unknown, table.stable

    state, halves, pinned, full, unknown, stable = over(replicas, talk, history)
    assert replicas.told[0] == ["a", "b"] and replicas.told[-1] == ["b"] and stable == B
    assert (sorted(halves), pinned, full) == (["a"] * 3 + ["b"] * 3, ["a"] * 3, ["b"] * 3)
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "version_not_found"
    assert [(each["id"], each["share"]) for each in state["versions"]] == [("a", 0.5), ("b", 0.5)]
    written = [json.loads(line) for line in history.read_text().splitlines()]
    assert [(each["version"], each["what"]) for each in written] == [
        ("a", "served"), ("b", "takes requests"), ("b", "takes requests"), ("b", "stable"),
    ]  # fmt: skip
    assert written[1]["logprob_gap"] == 1e-6


def test_a_version_that_a_replica_refuses_takes_nothing():
    replicas = Replicas(fails={"b"})

    async def talk(publisher, ask, table):
        with pytest.raises(UserError, match="takes no requests: log-probs"):
            await publisher.publish("m", B, 1.0)
        return [await ask() for _ in range(3)], publisher.entries[-1]

    answers, entry = over(replicas, talk)
    assert answers == ["a"] * 3 and replicas.told == [["a", "b"], ["a"]] and entry["what"] == "refused"


def test_a_version_that_fails_is_rolled_back_by_itself_and_one_by_hand_goes_further():
    replicas = Replicas()

    async def talk(publisher, ask, table):
        await publisher.publish("m", B, 1.0, watch_s=0.0)
        await publisher.look()
        await publisher.publish("m", C, 0.5)
        record = publisher.records["m"]["c"]
        for _ in range(3):
            record.answered(failed=True, seconds=1.0, tokens=0)
        await publisher.look()
        after = [await ask() for _ in range(4)], publisher.entries[-1]
        await publisher.roll_back("m", "asked for")
        last = await ask()
        with pytest.raises(UserError, match="no version before"):
            await publisher.roll_back("m", "once more")
        return *after, last

    answers, entry, last = over(replicas, talk)
    assert answers == ["b"] * 4 and (entry["version"], entry["what"]) == ("c", "rolled back")
    assert "3 of its 3 answers failed" in entry["why"] and last == "a"


def test_a_replica_that_lacks_the_candidate_answers_with_the_stable_version_and_a_pinned_request_waits():
    replicas = Replicas()

    async def talk(publisher, ask, table):
        await publisher.publish("m", B, 1.0)
        replicas.links[0].lacks = {"b"}
        one = [await ask() for _ in range(4)]
        replicas.links[1].lacks = {"b"}
        return one, [await ask() for _ in range(4)], await ask(**{"X-Model-Version": "b"})

    one, none, pinned = over(replicas, talk)
    assert one == ["b"] * 4 and none == ["a"] * 4
    assert pinned.status_code == 503 and pinned.headers["retry-after"] == "1"


def test_a_request_that_has_begun_keeps_its_version_in_memory():
    replicas = Replicas()

    async def talk(publisher, ask, table):
        for link in replicas.links:
            link.hold.clear()
        slow = asyncio.ensure_future(ask())
        while not table.ongoing["a"]:
            await asyncio.sleep(0.001)
        await publisher.publish("m", B, 1.0, watch_s=0.0)
        await publisher.look()
        await publisher.look()
        during = list(replicas.told)
        for link in replicas.links:
            link.hold.set()
        version = await slow
        await publisher.look()
        return during, version

    during, version = over(replicas, talk)
    assert version == "a" and all("a" in told for told in during) and replicas.told[-1] == ["b"]


# -- who may


def asked_of_control(*requests, token="secret"):
    replicas, table = Replicas(), VersionTable(A)

    async def inside():
        publisher = Publisher({"m": table}, replicas.links, replicas.deploy)
        app = Control(Front(replicas.links, None, {"m": table}), publisher, "secret")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return [await client.request(method, path, headers=headers, **more) for method, path, more in requests]

    return asyncio.run(inside()), table


PUBLISH = {"model": None, "id": "b", "folder": "/b", "adapter": None, "share": 0.5, "watch_s": 600.0, "thresholds": {"slower": 3.0}}


def test_the_owners_token_publishes_and_rolls_back():
    answers, table = asked_of_control(
        ("POST", "/control/publish", {"json": PUBLISH}), ("POST", "/control/rollback", {"json": {"model": "m", "why": "x"}})
    )
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["candidate"] == "b" and answers[1].json()["candidate"] is None and table.stable == A


@pytest.mark.parametrize("token", [None, "", "Secret", "secret2"])
def test_nobody_else_does(token):
    answers, table = asked_of_control(("POST", "/control/publish", {"json": PUBLISH}), token=token)
    assert answers[0].status_code == 401 and table.candidate is None


@pytest.mark.parametrize(
    ("method", "path", "more", "status"),
    [
        ("GET", "/control/publish", {}, 405), ("POST", "/control/other", {"json": {}}, 404),
        ("POST", "/control/publish", {"content": b"{"}, 400), ("POST", "/control/publish", {"json": []}, 400),
        ("POST", "/control/publish", {"json": {}}, 400), ("POST", "/control/publish", {"json": PUBLISH | {"share": "x"}}, 400),
        ("POST", "/control/publish", {"json": PUBLISH | {"share": 0}}, 400),
        ("POST", "/control/publish", {"json": PUBLISH | {"model": "z"}}, 400),
        ("POST", "/control/publish", {"json": PUBLISH | {"id": "a"}}, 400),
        ("POST", "/control/publish", {"json": PUBLISH | {"thresholds": {"other": 1}}}, 400),
        ("POST", "/control/publish", {"content": b"x" * 70_000}, 413),
    ],
)  # fmt: skip
def test_requests_that_make_no_sense_change_nothing(method, path, more, status):
    (answer,), table = asked_of_control((method, path, more))
    assert answer.status_code == status and answer.json()["error"]["message"] and table.candidate is None

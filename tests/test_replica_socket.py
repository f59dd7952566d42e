"""The socket between front and replica: answers whole and in pieces, many at a time, and what a lost end costs. No Ray."""

import asyncio

import pytest

from rlhf_ray.serving.handover import Fixed
from rlhf_ray.serving.relay import JOURNAL, Relayed, merged, told
from rlhf_ray.serving.replica_socket import Listening, WireLost, connect

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/x",
    "raw_path": b"/v1/x",
    "query_string": b"",
    "headers": [(b"a", b"\xff")],
}


def request(body=b"?", **named):
    return Relayed(scope=dict(SCOPE), body=body, fixed=Fixed(id="f", created=1, seed=2**63 - 1), **named)


def talked(tmp_path, answering, talk):
    """talk(front's end) with a replica that answers like this."""

    async def run():
        lost = []
        await Listening(str(tmp_path / "s"), answering).begin()
        end = await connect(str(tmp_path / "s"), lambda: lost.append(True))
        return await asyncio.wait_for(talk(end), 20), lost

    return asyncio.run(run())


async def read(end, asked):
    return [piece async for piece in end.answer(asked)]


def test_an_answer_comes_with_its_head_its_bytes_and_what_is_told_of_it(tmp_path):
    seen = []

    async def answering(asked, put):
        seen.append(asked)
        put([200, [[b"x", b"\xe9"]], b"", True, {JOURNAL: b"\x01"}])
        put([b"\x00one", True, {JOURNAL: b"\xff"}])
        await asyncio.sleep(0.05)
        put([b"two", False, {"usage": {"prompt_tokens": 3}, "texts": [["p", "é\ud800"]]}])

    asked = request(model="m", version="v", begun=b"\x00\xfe")
    pieces, _ = talked(tmp_path, answering, lambda end: read(end, asked))
    assert seen == [asked]
    # What one iteration of the event loop puts is one piece.
    assert pieces[0] == [200, [[b"x", b"\xe9"]], b"\x00one", True, {JOURNAL: b"\x01\xff"}]
    assert told(pieces[1]) == ([b"two", False], {"usage": {"prompt_tokens": 3}, "texts": [["p", "é\ud800"]]})


def test_answers_of_many_requests_do_not_mix(tmp_path):
    async def answering(asked, put):
        put([200, [], b"", True])
        for _ in range(5):
            put([asked.body, True])
            await asyncio.sleep(0)
        put([b"", False, {}])

    async def talk(end):
        return await asyncio.gather(*(read(end, request(str(number).encode())) for number in range(40)))

    answers, _ = talked(tmp_path, answering, talk)
    for number, pieces in enumerate(answers):
        whole = pieces[0]
        for piece in pieces[1:]:
            whole = merged(whole, piece)
        assert whole == [200, [], str(number).encode() * 5, False, {}]


def test_a_reader_that_leaves_ends_the_work_and_no_other(tmp_path):
    ended = []

    async def answering(asked, put):
        put([200, [], b"", True])
        try:
            await asyncio.sleep(0.2 if asked.body == b"short" else 60)
        finally:
            ended.append(asked.body)
        put([b"all", False, {}])

    async def talk(end):
        leaving = end.answer(request(b"long"))
        await anext(leaving)
        staying = asyncio.ensure_future(read(end, request(b"short")))
        await asyncio.sleep(0.05)
        await leaving.aclose()
        return await staying

    pieces, lost = talked(tmp_path, answering, talk)
    assert ended == [b"long", b"short"] and not lost
    assert pieces[-1][-3:] == [b"all", False, {}]


@pytest.mark.parametrize("begun", [True, False])
def test_an_answer_that_fails_is_lost_and_no_other(tmp_path, begun):
    async def answering(asked, put):
        if begun or asked.body == b"good":
            put([200, [], b"", True])
            await asyncio.sleep(0.02)
        if asked.body == b"bad":
            raise ValueError("asked for it")
        put([b"", False, {}])

    async def talk(end):
        return await asyncio.gather(read(end, request(b"bad")), read(end, request(b"good")), return_exceptions=True)

    (bad, good), lost = talked(tmp_path, answering, talk)
    assert isinstance(bad, WireLost) and good[-1][-2] is False and not lost


def test_a_replica_that_ends_is_noticed_at_once_and_its_place_can_be_taken(tmp_path):
    path = str(tmp_path / "s")

    async def hangs(asked, put):
        put([200, [], b"", True])
        await asyncio.sleep(60)

    async def answers(asked, put):
        put([200, [], b"new", False, {}])

    async def run():
        lost = []
        old = Listening(path, hangs)
        await old.begin()
        end = await connect(path, lambda: lost.append(True))
        answer = end.answer(request())
        assert await anext(answer) == [200, [], b"", True]
        end._transport.abort()  # as when the other process is killed
        with pytest.raises(WireLost):
            await anext(answer)
        assert lost == [True]
        with pytest.raises(WireLost):
            await read(end, request())
        await Listening(path, answers).begin()
        again = await connect(path, lambda: None)
        return await read(again, request())

    assert asyncio.run(run()) == [[200, [], b"new", False, {}]]


def test_where_nobody_listens_there_is_no_connection(tmp_path):
    (tmp_path / "left").write_text("")
    for name in ("none", "left"):
        assert asyncio.run(connect(str(tmp_path / name), lambda: None)) is None


def test_only_what_has_no_answer_yet_is_given_up(tmp_path):
    async def answering(asked, put):
        if asked.body == b"begun":
            put([200, [], b"", True])
        await asyncio.sleep(0.3)
        put([b"", False, {}] if asked.body == b"begun" else [200, [], b"", False, {}])

    async def talk(end):
        both = [asyncio.ensure_future(read(end, request(body))) for body in (b"begun", b"waits")]
        await asyncio.sleep(0.1)
        end.end_unanswered()
        return await asyncio.gather(*both, return_exceptions=True)

    (begun, waits), _ = talked(tmp_path, answering, talk)
    assert begun[-1][-2] is False and isinstance(waits, WireLost)

"""The store of votes, on real SQLite and real PostgreSQL: what is stored, and that each vote counts once whatever happens."""

import inspect
import re
import select
import sqlite3
import threading
import time

import pytest
import sqlalchemy as sa
from postgres import USUALLY_SQLITE
from processes import wait_for
from voted import PROMPT, answer, compare, shown, vote

from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.votes import database
from rlhf_ray.votes.reading import read_judgements
from rlhf_ray.votes.records import Answer, Vote, VoteRefused, prompt_key
from rlhf_ray.votes.store import VoteStore


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return str(tmp_path / "votes.db")
    return request.getfixturevalue("cluster").new_database()


usually_sqlite = pytest.mark.parametrize("url", USUALLY_SQLITE, indirect=True)


@pytest.fixture
def store(url):
    opened = VoteStore(url, create=True)
    yield opened
    opened.close()


def rows(store, table):
    with store.database.reading() as connection:
        return connection.execute(sa.text(f"SELECT * FROM {table}")).mappings().all()


# -- what is stored


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "¿Qué? 🙂 \u2028 '; DROP TABLE votes; --"}]


def test_what_was_stored_is_read_back(store):
    a = answer("", "ppo", "24", sampling={"temperature": 0.7, "stop": ["\n"], "top_p": None}, seed=2**63 - 1)
    b = answer(" 'No.'\r\n\t", "sft", "1", seed=-1)
    id = store.add(CHAT, a, b)
    assert store.comparison(id).prompt == CHAT
    showing = store.show(id, "ann")
    said = {"rating": 5, "reason": "shorter\nand true", "edit_of": "left", "edit": "Blå.", "flag": "rude"}
    store.vote(vote(id, "left", seconds=3.25, **said))
    (found,) = read_judgements(store.database)
    assert (found.comparison.a, found.comparison.b, found.comparison.prompt) == (a, b, CHAT)
    assert found.showing == showing and found.vote == vote(id, "left", seconds=3.25, **said)
    assert found.judged == showing.left_name and found.comparison.answer(found.judged) == showing.left


@usually_sqlite
def test_times_are_those_of_the_clock(url):
    now = [1000.0]
    store = VoteStore(url, create=True, clock=lambda: now[0])
    id = compare(store)
    now[0] = 1002.5
    assert store.show(id, "ann").shown_at == 1002.5
    now[0] = 1010.0
    assert store.show(id, "ann").shown_at == 1002.5  # again, in a second tab
    assert store.show(id, "bob").shown_at == 1010.0
    receipt = store.vote(vote(id))
    assert receipt.voted_at == 1010.0 and receipt.vote.seconds == 7.5
    now[0] = 900.0  # a clock that was set back
    assert store.vote(vote(id, rater="bob")).vote.seconds == 0.0
    store.close()


@usually_sqlite
def test_sides_are_random_and_stay(store):
    ids = [compare(store) for _ in range(60)]
    first = [store.show(id, "ann") for id in ids]
    assert [store.show(id, "ann") for id in ids] == first
    left = sum(showing.left_name == "a" for showing in first)
    assert 15 <= left <= 45  # 60 fair coins are outside with a probability of 4e-5 or less
    assert [store.show(id, "bob").left_name for id in ids] != [showing.left_name for showing in first]


@usually_sqlite
def test_a_comparison_may_be_added_again_and_no_other_takes_its_id(store):
    for stop in (["\n"], ("\n",)):  # one in JSON
        assert store.add(PROMPT, answer(sampling={"stop": stop}), answer("x"), id="one") == "one"
    with pytest.raises(VoteRefused, match="another comparison 'one'"):
        store.add(PROMPT, answer(sampling={"stop": ["\n"]}), answer("y"), id="one")
    assert len(rows(store, "comparisons")) == 1 and len(rows(store, "answers")) == 2


# -- exactly once


def test_a_vote_that_comes_again_is_acknowledged(store):
    id = shown(store)
    first = store.vote(vote(id, key="click"))
    again = store.vote(vote(id, key="click"))
    other_tab = store.vote(vote(id, key="other click", seconds=9.0))
    assert first.new and not again.new and not other_tab.new
    assert first.vote == again.vote == other_tab.vote and len(rows(store, "votes")) == 1


def test_another_vote_is_refused_and_what_was_said_stays(store):
    id, elsewhere = shown(store), shown(store)
    store.vote(vote(id, "left", key="click"))
    for refused, words in (
        (vote(id, "right", key="second"), "ann has voted 'left' on this comparison already"),
        (vote(id, "left", key="second", reason="since"), "ann has voted 'left'"),
        (vote(id, "right", key="click"), "the key 'click' came with another vote before"),
        (vote(elsewhere, "left", key="click"), "the key 'click' was used for a vote on another comparison"),
        (vote(id, "left", rater="bob"), "was not shown to bob"),
        (vote("nowhere"), "there is no comparison 'nowhere'"),
    ):
        with pytest.raises(VoteRefused, match=re.escape(words)):
            store.vote(refused)
    assert [(row["comparison"], row["choice"], row["key"]) for row in rows(store, "votes")] == [(id, "left", "click")]


def test_a_vote_is_replaced_by_an_explicit_call_only(store):
    id = shown(store)
    with pytest.raises(VoteRefused, match="nothing to replace"):
        store.replace(vote(id, "right", key="2"))
    store.vote(vote(id, "left", key="1"))
    changed = store.replace(vote(id, "right", key="2"))
    assert changed.new and not store.replace(vote(id, "right", key="2")).new
    with pytest.raises(VoteRefused, match="the key '2' came with another vote before"):
        store.replace(vote(id, "tie", key="2"))
    # The first request comes again, late: it was stored once, and what stands now stays.
    late = store.vote(vote(id, "left", key="1"))
    assert not late.new and late.vote.choice == "right"
    assert not store.replace(vote(id, "left", key="1")).new
    assert store.replace(vote(id, "tie", key="3")).vote.choice == "tie"
    assert store.replace(vote(id, "right", key="2")).vote.choice == "tie"
    assert [row["choice"] for row in rows(store, "votes")] == ["tie"]
    assert sorted(row["choice"] for row in rows(store, "replaced_votes")) == ["left", "right"]


@usually_sqlite
def test_a_key_of_another_comparison_replaces_nothing(store):
    one, two = shown(store), shown(store)
    store.vote(vote(one, "left", key="1"))
    store.vote(vote(two, "left", key="2"))
    with pytest.raises(VoteRefused, match="the key '1' was used for a vote on another comparison"):
        store.replace(vote(two, "right", key="1"))


@usually_sqlite
def test_raters_vote_each_for_themselves(store):
    id = shown(store)
    store.show(id, "bob")
    assert store.vote(vote(id, "left", key="k")).new and store.vote(vote(id, "tie", rater="bob", key="k")).new


def test_a_double_click_on_a_server_with_threads(store):
    ids = [shown(store) for _ in range(10)]
    receipts, start = [], threading.Barrier(8)

    def click(place):
        for id in ids:
            start.wait(30)
            receipts.append(store.vote(vote(id, key=f"{id}-{place % 2}")))

    threads = [threading.Thread(target=click, args=[place]) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(receipts) == 80 and sum(receipt.new for receipt in receipts) == 10 and len(rows(store, "votes")) == 10


def test_two_processes_vote_at_once_and_one_vote_is_stored(store, url, voters):
    """Both wait for a lock that this process holds until they have come to it; so neither comes first by its start."""
    two = [voters("on_request", url, name) for name in ("one", "two")]
    assert [voter.stdout.readline() for voter in two] == ["ready\n"] * 2
    for both in (("left", "right"), ("tie", "tie"), ("right", "left"), ("both_bad", "both_bad")):
        id = shown(store)
        with store.database.writing() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.text("LOCK TABLE votes IN EXCLUSIVE MODE"))
            for voter, choice in zip(two, both, strict=True):
                voter.ask(f"{id} {choice}")
            assert [voter.stdout.readline() for voter in two] == ["votes\n"] * 2
            time.sleep(0.1)
            assert not select.select([voter.stdout for voter in two], [], [], 0)[0]  # they wait
        same = both[0] == both[1]
        assert sorted(voter.stdout.readline() for voter in two) == (["again\n", "new\n"] if same else ["new\n", "refused\n"])
        (stored,) = [row["choice"] for row in rows(store, "votes") if row["comparison"] == id]
        assert stored in both
    for voter in two:
        voter.kill()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_server_killed_around_the_commit_and_the_request_again(store, url, when, voters):
    id = shown(store)
    assert voters("killed", url, id, when).stdout.read() == ""
    wait_for(lambda: when == "before" or rows(store, "votes"))
    assert len(rows(store, "votes")) == (1 if when == "after" else 0)
    receipt = store.vote(vote(id, key="click"))
    assert receipt.new == (when == "before") and receipt.vote.choice == "left"
    assert not store.vote(vote(id, key="click")).new and len(rows(store, "votes")) == 1


def test_a_server_that_is_killed_over_and_over_loses_nothing_and_stores_nothing_twice(store, url, voters):
    ids = [shown(store) for _ in range(100)]
    following, kills, again = 0, 0, 0
    while following < len(ids):
        server = voters("one_after_the_other", url, following, *ids)
        stop = following + 20
        for line in server.stdout:
            place, new = line.split()
            assert int(place) == following
            again += new == "False"
            following += 1
            if following == stop:
                kills += server.kill()  # while it votes on; what it still said in the pipe was answered
    votes = rows(store, "votes")
    assert kills >= 2 and len(votes) == len(ids) == len({row["comparison"] for row in votes})
    assert again <= kills  # only the request that had no answer may come a second time


# -- what is refused, in words


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: answer(seed=2**63), "seed is 9223372036854775808; give an integer of at most 63 bits"),
        (lambda: answer(seed=True), "seed is True"),
        (lambda: answer("a\0b"), "text holds a NUL"),
        (lambda: answer("\ud83d"), "half of a character"),
        (lambda: answer(version=""), "version is ''; give a text"),
        (lambda: answer(sampling={"temperature": float("nan")}), "can't be written as JSON"),
        (lambda: vote("c", "up"), "a vote is 'up'; it can be left, right, tie, both_bad"),
        (lambda: vote("c", rating=6), "rating is 6; give 1 to 5"),
        (lambda: vote("c", seconds=-1.0), "seconds are -1.0"),
        (lambda: vote("c", seconds=float("nan")), "seconds are nan"),
        (lambda: vote("c", edit="x"), "give a side and its text, or neither"),
        (lambda: vote("c", reason="\0"), "reason holds a NUL"),
        (lambda: vote("c", rater="r" * 201), "rater has 201 characters; give at most 200"),
        (lambda: Vote(comparison="c", rater="a", key=None, choice="left"), "key is None; give a text"),
    ],
)  # fmt: skip
def test_what_can_not_be_stored_is_refused_where_it_is_made(make, words):
    with pytest.raises(VoteRefused, match=re.escape(words)):
        make()


@pytest.mark.parametrize("prompt", ["", [], {"role": "user"}, [{"role": "user"}], [{"role": "user", "content": 3}], ["hi"], None])
def test_a_prompt_is_a_text_or_messages(tmp_path, prompt):
    with pytest.raises(VoteRefused):
        VoteStore(str(tmp_path / "v.db"), create=True).add(prompt, answer(), answer())


def test_prompts_of_the_same_words_have_one_key():
    same = ["Name a colour.", " name  a\ncolour. ", [{"role": "user", "content": "NAME a colour."}]]
    assert len({prompt_key(prompt) for prompt in same}) == 1
    others = ["Name a colour", [{"role": "system", "content": "Name a colour."}], [{"role": "user", "content": "Name"}] * 2]
    assert len({prompt_key(prompt) for prompt in [*same, *others]}) == 4
    assert prompt_key("é") == prompt_key("e\u0301")


def test_a_database_that_stays_busy_fails_in_words_and_the_vote_can_come_again(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_ray.votes.database.WAIT_S", 0.1)
    store = VoteStore(str(tmp_path / "votes.db"), create=True)
    id = shown(store)
    with sqlite3.connect(tmp_path / "votes.db") as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunFailed, match="votes.db failed .*locked.*ask again"):
            store.vote(vote(id))
        other.rollback()
    assert store.vote(vote(id)).new


@usually_sqlite
def test_a_write_that_fails_leaves_nothing(store):
    with pytest.raises(RuntimeError), store.database.writing() as connection:
        connection.execute(sa.text("INSERT INTO comparisons VALUES ('x', '\"p\"', 1, 'k')"))
        raise RuntimeError
    assert rows(store, "comparisons") == []


def test_sqlite_is_set_as_documented(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "_prepare_sqlite", inspect.unwrap(database._prepare_sqlite))
    store = VoteStore(str(tmp_path / "votes.db"), create=True)
    with store.database.reading() as connection:
        found = {name: connection.execute(sa.text(f"PRAGMA {name}")).scalar()
                 for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")}  # fmt: skip
    assert found == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 2, "busy_timeout": 10_000}
    with pytest.raises(RunFailed, match="FOREIGN KEY"), store.database.writing() as connection:
        connection.execute(sa.text("INSERT INTO showings VALUES ('nothing', 'ann', 'a', 1)"))


def test_answers_compare_by_what_they_hold():
    assert Answer(text="a", model="m", version="1", sampling={"t": 1}) == answer("a", "m", "1", sampling={"t": 1})
    assert answer(model="ppo", version="7").writer == "ppo@7"
    assert issubclass(VoteRefused, UserError)

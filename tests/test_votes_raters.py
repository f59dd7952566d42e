"""Which comparison a rater is given next, which votes are read back page by page, and raters with a link; on both databases."""

import pytest
from command import rlhf_ray
from postgres import USUALLY_SQLITE
from voted import answer, compare, prefer, shown, vote

from rlhf_ray.errors import UserError
from rlhf_ray.votes.invitations import invite, rater_of, revoke, standing
from rlhf_ray.votes.reading import Filters, read_newest
from rlhf_ray.votes.records import UnknownComparison, VoteRefused, prompt_key
from rlhf_ray.votes.store import VoteStore


@pytest.fixture(params=USUALLY_SQLITE)
def store(request, tmp_path):
    now = iter(range(1000, 100_000))
    url = str(tmp_path / "votes.db") if request.param == "sqlite" else request.getfixturevalue("cluster").new_database()
    opened = VoteStore(url, create=True, clock=lambda: float(next(now)))
    yield opened
    opened.close()


def test_what_a_rater_has_judged_is_not_given_again(store):
    one, two = compare(store), compare(store)
    assert store.unjudged("ann", most_votes=2) == one  # the oldest
    prefer(store, one, "ann", "a")
    assert store.unjudged("ann", most_votes=2) == two
    prefer(store, two, "ann", "b")
    assert store.unjudged("ann", most_votes=2) is None
    assert store.judged_prompts("ann") == {prompt_key("Name a colour.")} and store.judged_prompts("bob") == set()


def test_what_was_begun_comes_first_then_what_others_judged_and_what_is_full_never(store):
    fresh, full, half, begun, flagged = (compare(store) for _ in range(5))
    for rater in ("bob", "cat"):
        prefer(store, full, rater, "a")
    prefer(store, half, "bob", "b")
    store.show(begun, "ann")
    store.show(flagged, "bob")
    store.vote(vote(flagged, rater="bob", flag="rude"))
    given = []
    while (next_ := store.unjudged("ann", most_votes=2, skip=given)) is not None:
        given.append(next_)
    assert given == [begun, half, fresh]
    assert store.unjudged("ann", most_votes=1, skip=[begun]) == fresh


def test_what_was_shown_is_told_again_with_its_vote(store):
    id = compare(store)
    showing = store.show(id, "ann")
    assert store.shown_before(id, "ann") == (showing, None)
    cast = vote(id, "tie", seconds=1.5)
    store.vote(cast)
    assert store.shown_before(id, "ann") == (showing, cast)
    with pytest.raises(VoteRefused, match="was not shown to bob"):
        store.shown_before(id, "bob")
    with pytest.raises(UnknownComparison, match="there is no comparison 'x'"):
        store.shown_before("x", "ann")


def test_votes_are_read_page_by_page_the_newest_first(store):
    ids = [compare(store, a=answer(model="ppo" if place % 2 else "dpo")) for place in range(5)]
    for id in ids:
        prefer(store, id, "ann", "a")
    pages, before = [], None
    while page := read_newest(store.database, Filters(), limit=2, before=before):
        pages.append([each.vote.comparison for each in page])
        before = (page[-1].voted_at, page[-1].vote.comparison, page[-1].vote.rater)
    assert pages == [[ids[4], ids[3]], [ids[2], ids[1]], [ids[0]]]
    dpo = read_newest(store.database, Filters(versions=("dpo",)), limit=2)
    assert [each.vote.comparison for each in dpo] == [ids[4], ids[2]]


def test_votes_of_one_instant_are_each_read_once(store):
    ids = sorted(compare(store) for _ in range(3))
    store._clock = lambda: 5.0
    for id in ids:
        prefer(store, id, "ann", "a")
    first = read_newest(store.database, Filters(), limit=2)
    place = (first[-1].voted_at, first[-1].vote.comparison, first[-1].vote.rater)
    rest = read_newest(store.database, Filters(), limit=2, before=place)
    assert [each.vote.comparison for each in first + rest] == ids[::-1]


def test_others_votes_on_what_a_rater_is_judging_are_not_told(store):
    judging, judged, never = (compare(store) for _ in range(3))
    for id in (judging, judged, never):
        prefer(store, id, "bob", "a")
    store.show(judging, "ann")
    prefer(store, judged, "ann", "b")
    found = read_newest(store.database, Filters(), limit=9, open_to="ann")
    assert {(each.vote.comparison, each.vote.rater) for each in found} == {
        (judged, "ann"),
        (judged, "bob"),
        (never, "bob"),
    }


def test_a_token_is_its_raters_until_the_next_one(store):
    assert standing(store.database, "ann") == "none"
    first, bobs = invite(store.database, "ann"), invite(store.database, "bob")
    assert [rater_of(store.database, token) for token in (first, bobs, "", "x", first[:-1])] == [
        "ann",
        "bob",
        None,
        None,
        None,
    ]
    second = invite(store.database, "ann")
    assert rater_of(store.database, first) is None and rater_of(store.database, second) == "ann"
    revoke(store.database, "ann")
    assert rater_of(store.database, second) is None and standing(store.database, "ann") == "revoked"
    assert rater_of(store.database, bobs) == "bob" and standing(store.database, "bob") == "invited"
    with pytest.raises(UserError, match="'cat' was never invited"):
        revoke(store.database, "cat")


def test_the_database_holds_no_token(tmp_path):
    store = VoteStore(str(tmp_path / "votes.db"), create=True)
    token = invite(store.database, "ann")
    shown(store)
    store.close()
    assert token.encode() not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_the_command_prints_a_link_and_ends_it(tmp_path):
    url = str(tmp_path / "votes.db")
    store = VoteStore(url, create=True)
    done = rlhf_ray("votes", "invite", url, " Ann  Lee ", "--server", "https://votes.example/")
    link = done.stdout.strip()
    assert done.returncode == 0 and link.startswith("https://votes.example/#token="), done.stderr
    assert rater_of(store.database, link.partition("#token=")[2]) == "Ann Lee"
    assert rlhf_ray("votes", "invite", url, "Ann Lee", "--revoke").stdout == "Ann Lee can't vote any more\n"
    wrong = rlhf_ray("votes", "invite", url, "a\u202eb")
    assert wrong.returncode == 2 and "visible characters" in wrong.stderr
    store.close()

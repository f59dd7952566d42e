"""The store of votes: what a server calls. Each method is one transaction, and may be called again after a failure.

    store = VoteStore("votes.db", create=True)
    comparison = store.add("Name a colour.", Answer(...), Answer(...))     before anybody sees it
    showing = store.show(comparison, "ann")                                which answer stands on which side
    receipt = store.vote(Vote(comparison=comparison, rater="ann", key=..., choice="left"))

A vote counts once, whatever happens: the table has one row per (comparison, rater), and a request that comes again finds it.
A second vote that says something else is refused; `replace` changes a vote.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from rlhf_ray.votes.database import Database
from rlhf_ray.votes.records import (
    Answer,
    Comparison,
    Name,
    Prompt,
    Receipt,
    Showing,
    UnknownComparison,
    Vote,
    VoteRefused,
    check_name,
    check_prompt,
    json_of,
    prompt_key,
)
from rlhf_ray.votes.schema import answers, comparisons, replaced_votes, showings, votes


class VoteStore:
    """Comparisons and votes in a database (a path, sqlite:///FILE or postgresql://USER@HOST/NAME), as `Database` opens it.

    Methods raise VoteRefused for what can't be stored as it is, and RunFailed where the database fails: the same call may then
    be made again. Threads may share a store. clock: seconds since 1970
    """

    def __init__(
        self, url: str, *, create: bool = False, held_out_share: float = 0.1, clock: Callable[[], float] = time.time
    ):  # fmt: skip
        self.database = Database(url, create=create, held_out_share=held_out_share)
        self._clock = clock

    def add(self, prompt: Prompt, a: Answer, b: Answer, *, id: str | None = None) -> str:
        """Store a comparison; its id. id: the caller's own, for a call that may come again; None: a new one."""
        check_prompt(prompt)
        id = uuid.uuid4().hex if id is None else id
        check_name("a comparison's id", id)
        with self.database.writing() as connection:
            row = {
                "id": id,
                "prompt": json_of("a prompt", prompt),
                "made_at": self._clock(),
                "prompt_key": prompt_key(prompt),
            }
            if not _insert(connection, comparisons, row):
                there = _comparison(connection, id)
                if _as_stored(there.prompt, there.a, there.b) != _as_stored(prompt, a, b):
                    raise VoteRefused(
                        f"there is another comparison '{id}' already; leave the id out, or give a new one"
                    )
                return id
            for name, answer in (("a", a), ("b", b)):
                connection.execute(answers.insert().values(comparison=id, name=name, **_answer_row(answer)))
        return id

    def comparison(self, id: str) -> Comparison:
        with self.database.reading() as connection:
            return _comparison(connection, id)

    def show(self, comparison: str, rater: str) -> Showing:
        """What the rater sees: the first call draws the sides and notes the time, and later ones return the same."""
        check_name("a rater", rater)
        with self.database.writing() as connection:
            found = _comparison(connection, comparison)
            row = {
                "comparison": comparison,
                "rater": rater,
                "left_name": secrets.choice("ab"),
                "shown_at": self._clock(),
            }
            _insert(connection, showings, row)
            there = _showing(connection, comparison, rater)
            assert there is not None, "it was there, or it is now"
        return Showing(comparison=found, rater=rater, left_name=there[0], shown_at=there[1])

    def vote(self, vote: Vote) -> Receipt:
        """Store a vote once. VoteRefused where the rater's vote on this comparison says something else, where the comparison
        was not shown to the rater, and where the key was used for another comparison."""
        with self.database.writing() as connection:
            row = self._row(connection, vote)
            if _insert(connection, votes, row):
                return _receipt(row, new=True)
            there = _vote(connection, vote.comparison, vote.rater)
            if there is None:
                raise _used_elsewhere(vote)
            if _is_stored(connection, vote, there):
                return _receipt(there, new=False)
            raise VoteRefused(
                f"{vote.rater} has voted '{there['choice']}' on this comparison already; replace the vote to change it"
            )

    def replace(self, vote: Vote) -> Receipt:
        """Put the rater's vote in place of the one that is there; a call that comes again changes nothing. Raises as `vote`."""
        with self.database.writing() as connection:
            row = self._row(connection, vote)
            there = _vote(connection, vote.comparison, vote.rater, lock=True)
            if there is None:
                raise VoteRefused(
                    f"{vote.rater} has not voted on this comparison, so there is nothing to replace; vote on it"
                )
            if _is_stored(connection, vote, there):
                return _receipt(there, new=False)
            used = connection.execute(
                sa.select(votes.c.key).where(votes.c.rater == vote.rater, votes.c.key == vote.key)
            ).first()
            if used is not None:
                raise _used_elsewhere(vote)
            connection.execute(replaced_votes.insert().values(**there, replaced_at=self._clock()))
            connection.execute(votes.update().where(*_of(votes, vote.comparison, vote.rater)).values(**row))
            return _receipt(row, new=True)

    def shown_before(self, comparison: str, rater: str) -> tuple[Showing, Vote | None]:
        """What the rater was shown, and the rater's vote on it. VoteRefused for a comparison that was not shown to the rater."""
        check_name("a rater", rater)
        with self.database.reading() as connection:
            found = _comparison(connection, comparison)
            there = _showing(connection, comparison, rater)
            row = _vote(connection, comparison, rater)
        if there is None:
            raise VoteRefused(f"this comparison was not shown to {rater}; ask for one")
        showing = Showing(comparison=found, rater=rater, left_name=there[0], shown_at=there[1])
        return showing, None if row is None else vote_of(row)

    def unjudged(self, rater: str, *, most_votes: int, skip: Sequence[str] = ()) -> str | None:
        """A comparison for the rater to judge, None where there is none.

        One that the rater has not voted on, that has fewer than `most_votes` votes and no flag, and is not in `skip`: first
        those that the rater has seen before, then those with most votes, then the oldest.
        """
        check_name("a rater", rater)
        cast = sa.select(sa.func.count()).where(votes.c.comparison == comparisons.c.id).scalar_subquery()
        mine = sa.exists().where(votes.c.comparison == comparisons.c.id, votes.c.rater == rater)
        flagged = sa.exists().where(votes.c.comparison == comparisons.c.id, votes.c.flag.is_not(None))
        seen = sa.exists().where(showings.c.comparison == comparisons.c.id, showings.c.rater == rater)
        query = sa.select(comparisons.c.id).where(~mine, ~flagged, cast < most_votes, comparisons.c.id.not_in(skip))
        order = sa.case((seen, 0), else_=1), cast.desc(), comparisons.c.made_at, comparisons.c.id
        with self.database.reading() as connection:
            return connection.execute(query.order_by(*order).limit(1)).scalar_one_or_none()

    def judged_prompts(self, rater: str) -> set[str]:
        """The keys of the prompts (`records.prompt_key`) on which the rater has voted."""
        query = sa.select(comparisons.c.prompt_key).join(votes, votes.c.comparison == comparisons.c.id)
        with self.database.reading() as connection:
            return set(connection.execute(query.where(votes.c.rater == rater)).scalars())

    def close(self) -> None:
        self.database.close()

    def _row(self, connection: sa.Connection, vote: Vote) -> dict[str, Any]:
        showing = _showing(connection, vote.comparison, vote.rater)
        if showing is None:
            _comparison(connection, vote.comparison)  # of one that is not there it tells so
            raise VoteRefused(f"this comparison was not shown to {vote.rater}; a vote follows what was shown")
        now = self._clock()
        return {
            "comparison": vote.comparison, "rater": vote.rater, "key": vote.key, "choice": vote.choice, "voted_at": now,
            "seconds": max(now - showing[1], 0.0) if vote.seconds is None else float(vote.seconds), "rating": vote.rating,
            "reason": vote.reason, "edit_of": vote.edit_of, "edit": vote.edit, "flag": vote.flag,
        }  # fmt: skip


def _insert(connection: sa.Connection, table: sa.Table, row: dict[str, Any]) -> bool:
    """Whether the row is new. Where another process inserts the same one, this waits until that is stored or given up."""
    maker = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    stored = maker(table).values(**row).on_conflict_do_nothing().returning(*table.primary_key)
    return connection.execute(stored).first() is not None


def _of(table: sa.Table, comparison: str, rater: str) -> tuple[sa.ColumnElement[bool], ...]:
    return table.c.comparison == comparison, table.c.rater == rater


def _comparison(connection: sa.Connection, id: str) -> Comparison:
    row = connection.execute(sa.select(comparisons).where(comparisons.c.id == id)).one_or_none()
    if row is None:
        raise UnknownComparison(f"there is no comparison '{id[:80]}'; add it before it is shown")
    two = (
        connection.execute(sa.select(answers).where(answers.c.comparison == id).order_by(answers.c.name))
        .mappings()
        .all()
    )
    a, b = (answer_of(each) for each in two)
    return Comparison(id=id, prompt=json.loads(row.prompt), a=a, b=b, made_at=row.made_at)


def _showing(connection: sa.Connection, comparison: str, rater: str) -> tuple[Name, float] | None:
    """(the answer on the left, when it was shown)."""
    columns = sa.select(showings.c.left_name, showings.c.shown_at).where(*_of(showings, comparison, rater))
    row = connection.execute(columns).one_or_none()
    return None if row is None else (row.left_name, row.shown_at)


def _vote(connection: sa.Connection, comparison: str, rater: str, *, lock: bool = False) -> dict[str, Any] | None:
    select = sa.select(votes).where(*_of(votes, comparison, rater))
    row = connection.execute(select.with_for_update() if lock else select).mappings().one_or_none()
    return None if row is None else dict(row)


def _is_stored(connection: sa.Connection, vote: Vote, there: dict[str, Any]) -> bool:
    """Whether the row that is there says the same, or this very request was stored once and another vote replaced it since.

    VoteRefused for the key of the row with another vote.
    """
    if _receipt(there, new=False).vote.said == vote.said:
        return True
    if there["key"] == vote.key:
        raise VoteRefused(
            f"the key '{vote.key}' came with another vote before ('{there['choice']}'); make a key for each vote"
        )
    table = replaced_votes
    found = sa.select(table.c.key).where(*_of(table, vote.comparison, vote.rater), table.c.key == vote.key)
    return connection.execute(found).first() is not None


def _used_elsewhere(vote: Vote) -> VoteRefused:
    return VoteRefused(f"the key '{vote.key}' was used for a vote on another comparison; make a key for each vote")


def vote_of(row: Any) -> Vote:
    """The vote in a row of the table (a mapping); its seconds are those that were stored."""
    return Vote(
        comparison=row["comparison"], rater=row["rater"], key=row["key"], choice=row["choice"], seconds=row["seconds"],
        rating=row["rating"], reason=row["reason"], edit_of=row["edit_of"], edit=row["edit"], flag=row["flag"],
    )  # fmt: skip


def answer_of(row: Any) -> Answer:
    return Answer(
        text=row["text"], model=row["model"], version=row["version"], sampling=json.loads(row["sampling"]), seed=row["seed"]
    )  # fmt: skip


def _answer_row(answer: Answer) -> dict[str, Any]:
    sampling = json_of("an answer's sampling parameters", answer.sampling)
    return {
        "text": answer.text,
        "model": answer.model,
        "version": answer.version,
        "sampling": sampling,
        "seed": answer.seed,
    }


def _as_stored(prompt: Prompt, a: Answer, b: Answer) -> tuple[object, ...]:
    """What equal comparisons have in common once they are JSON, where a tuple is a list."""
    return json_of("a prompt", prompt), _answer_row(a), _answer_row(b)


def _receipt(row: dict[str, Any], *, new: bool) -> Receipt:
    return Receipt(new=new, vote=vote_of(row), voted_at=row["voted_at"])

"""Votes read back: filtered, and turned into preference pairs, one per comparison."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from rlhf_ray.errors import UserError
from rlhf_ray.votes.database import Database
from rlhf_ray.votes.records import Answer, Comparison, Judged, Judgement, Name, Prompt, Showing, is_held_out, prompt_key
from rlhf_ray.votes.schema import answers, comparisons, showings, votes
from rlhf_ray.votes.store import answer_of, vote_of

DAY_S = 24 * 3600  # UTC has no other days
Part = Literal["train", "held_out", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which votes count; the defaults take all."""

    raters: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()  # one of the two answers is of a model, or of a MODEL@VERSION, that is named here
    since: datetime.date | None = None  # days in UTC; both belong to the votes that count
    until: datetime.date | None = None
    min_agreement: float = 0.0  # least share of a comparison's votes that prefer the better answer; of pairs only

    def __post_init__(self):
        if not 0 <= self.min_agreement <= 1:
            raise UserError(f"the minimum agreement is {self.min_agreement:g}; give a share from 0 to 1")
        if self.since is not None and self.until is not None and self.since > self.until:
            raise UserError(f"votes since {self.since} and until {self.until} are none; give days in order")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A comparison of which most raters prefer one answer."""

    comparison: Comparison
    better: Name
    backing: int  # votes that prefer it
    votes: int  # all votes on the comparison, ties among them

    @property
    def chosen(self) -> Answer:
        return self.comparison.answer(self.better)

    @property
    def rejected(self) -> Answer:
        return self.comparison.answer("b" if self.better == "a" else "a")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The pairs, and what makes none. left_out: comparisons by reason; `ties` and `both_bad` count votes."""

    pairs: list[Pair]
    ties: int
    both_bad: int
    left_out: Counter[str]

    def left_out_in_words(self) -> str:
        """'3 ties, 1 both bad; comparisons without a pair: 4 no preference'."""
        ties = "tie" if self.ties == 1 else "ties"
        votes_ = [f"{count} {name}" for count, name in ((self.ties, ties), (self.both_bad, "both bad")) if count]
        reasons = [f"{count} {reason}" for reason, count in sorted(self.left_out.items())]
        parts = [", ".join(votes_)] if votes_ else []
        return (
            "; ".join(parts + ([f"comparisons without a pair: {', '.join(reasons)}"] if reasons else [])) or "nothing"
        )


def read_judgements(database: Database, filters: Filters | None = None, part: Part = "all") -> list[Judgement]:
    """The votes that count, in the order in which they came. `part`: of which prompts."""
    filters = Filters() if filters is None else filters
    with database.reading() as connection:
        found = [_judgement(row) for row in connection.execute(_query(filters)).mappings()]
    return [
        each for each in found
        if _of_part(each.comparison.prompt, part, database.held_out_share) and _by_versions(each.comparison, filters.versions)
    ]  # fmt: skip


def read_newest(
    database: Database, filters: Filters, *, limit: int, before: tuple[float, str, str] | None = None, open_to: str | None = None
) -> list[Judgement]:
    """At most `limit` votes, the newest first. before: (voted_at, comparison, rater) of the last one that was read already.

    open_to: a rater; left out are votes on comparisons that this rater has been shown and not judged yet
    """
    place = votes.c.voted_at, votes.c.comparison, votes.c.rater
    query = _query(filters).order_by(None).order_by(*(column.desc() for column in place))
    if before is not None:
        query = query.where(sa.tuple_(*place) < sa.tuple_(*map(sa.literal, before)))
    if open_to is not None:
        theirs = votes.alias("theirs")
        judged = sa.exists().where(theirs.c.comparison == votes.c.comparison, theirs.c.rater == open_to)
        seen = showings.alias("seen")
        shown = sa.exists().where(seen.c.comparison == votes.c.comparison, seen.c.rater == open_to)
        query = query.where(judged | ~shown)
    found: list[Judgement] = []
    with database.reading() as connection:
        for row in connection.execute(query).mappings():
            judgement = _judgement(row)
            if _by_versions(judgement.comparison, filters.versions):
                found.append(judgement)
            if len(found) == limit:
                break
    return found


def held_out_prompts(database: Database) -> list[Prompt]:
    """Every prompt that no training may see, voted on or not."""
    with database.reading() as connection:
        rows = connection.execute(
            sa.select(comparisons.c.prompt, comparisons.c.prompt_key).order_by(comparisons.c.made_at)
        ).all()
    texts = dict.fromkeys(row.prompt for row in rows if is_held_out(row.prompt_key, database.held_out_share))
    return [json.loads(text) for text in texts]


def pairs_of(judgements: Iterable[Judgement], min_agreement: float = 0.0) -> Pairs:
    """One pair for each comparison of which more votes prefer one answer than the other, in the order of the first votes.

    Ties and "both bad" prefer neither, and count in the agreement. Left out: comparisons without a preference, with as many
    votes for either answer, with less agreement, with a flag, and with two answers of the same text.
    """
    by_comparison: dict[str, list[Judgement]] = {}
    for each in judgements:
        by_comparison.setdefault(each.comparison.id, []).append(each)
    pairs: list[Pair] = []
    left_out, said = Counter[str](), Counter[Judged]()
    for group in by_comparison.values():
        counts = Counter[Judged](each.judged for each in group)
        said += counts
        comparison, better = group[0].comparison, _better(counts)
        agreement = counts[better] / len(group) if better is not None else 0.0
        if any(each.vote.flag is not None for each in group):
            left_out["flagged"] += 1
        elif better is None:
            left_out["no preference" if counts["a"] == 0 else "as many for either"] += 1
        elif agreement < min_agreement:
            left_out["below the minimum agreement"] += 1
        elif comparison.a.text.strip() == comparison.b.text.strip():
            left_out["answers are the same"] += 1
        else:
            pairs.append(Pair(comparison=comparison, better=better, backing=counts[better], votes=len(group)))
    return Pairs(pairs=pairs, ties=said["tie"], both_bad=said["both_bad"], left_out=left_out)


def _better(counts: Counter[Judged]) -> Name | None:
    if counts["a"] == counts["b"]:
        return None
    return "a" if counts["a"] > counts["b"] else "b"


def _query(filters: Filters) -> sa.Select:
    """One row per vote, with its showing, its comparison and the two answers."""
    a, b = answers.alias("a"), answers.alias("b")
    columns = [votes, showings.c.left_name, showings.c.shown_at, comparisons.c.prompt, comparisons.c.made_at]
    for name, table in (("a", a), ("b", b)):
        columns += [table.c[key].label(f"{name}_{key}") for key in ("text", "model", "version", "sampling", "seed")]
    joined = votes.join(
        showings, sa.and_(showings.c.comparison == votes.c.comparison, showings.c.rater == votes.c.rater)
    ).join(comparisons, comparisons.c.id == votes.c.comparison)
    for name, table in (("a", a), ("b", b)):
        joined = joined.join(table, sa.and_(table.c.comparison == votes.c.comparison, table.c.name == name))
    query = sa.select(*columns).select_from(joined).order_by(votes.c.voted_at, votes.c.comparison, votes.c.rater)
    if filters.raters:
        query = query.where(votes.c.rater.in_(filters.raters))
    if filters.since is not None:
        query = query.where(votes.c.voted_at >= _midnight(filters.since))
    if filters.until is not None:
        query = query.where(votes.c.voted_at < _midnight(filters.until) + DAY_S)
    return query


def _midnight(day: datetime.date) -> float:
    return datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC).timestamp()


def _judgement(row: Any) -> Judgement:
    a, b = (
        answer_of({key: row[f"{name}_{key}"] for key in ("text", "model", "version", "sampling", "seed")})
        for name in ("a", "b")
    )
    comparison = Comparison(id=row["comparison"], prompt=json.loads(row["prompt"]), a=a, b=b, made_at=row["made_at"])
    showing = Showing(comparison=comparison, rater=row["rater"], left_name=row["left_name"], shown_at=row["shown_at"])
    return Judgement(showing=showing, vote=vote_of(row), voted_at=row["voted_at"], seconds=row["seconds"])


def _of_part(prompt: Prompt, part: Part, share: float) -> bool:
    return part == "all" or is_held_out(prompt_key(prompt), share) == (part == "held_out")


def _by_versions(comparison: Comparison, versions: tuple[str, ...]) -> bool:
    writers = {name for answer in (comparison.a, comparison.b) for name in (answer.model, answer.writer)}
    return not versions or not writers.isdisjoint(versions)

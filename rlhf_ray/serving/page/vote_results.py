"""What the results page reads: the summary of the votes that count, and the votes themselves."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import sqlalchemy as sa

from rlhf_ray.errors import UserError
from rlhf_ray.serving.api_errors import ApiError, bad_request
from rlhf_ray.serving.page.bodies import ResultFilters, VoteList
from rlhf_ray.votes.database import Database
from rlhf_ray.votes.reading import Filters, read_judgements, read_newest
from rlhf_ray.votes.records import Answer, Judgement
from rlhf_ray.votes.schema import replaced_votes, votes

KEPT = 16  # summaries
THREADS = 2
MOST_READERS = 32  # at once; of a summary that takes a second, the last one waits half a minute

Asked = TypeVar("Asked")


class Results:
    """Sums up the votes of a database; a summary is computed again when votes have come. Threads may share one."""

    def __init__(self, database: Database):
        self.database = database
        self._lock = threading.Lock()
        self._kept: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="results")
        self._readers = 0

    async def read(self, reads: Callable[[Asked], dict[str, Any]], asked: Asked) -> dict[str, Any]:
        """What `reads`, one of those below, finds. It has threads of its own: who votes does not wait for those who read.

        ApiError where too many read.
        """
        if self._readers >= MOST_READERS:
            raise ApiError(
                503, "Many read the results now. Please retry shortly.", code="unavailable", headers={"Retry-After": "2"}
            )
        self._readers += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, reads, asked)
        finally:
            self._readers -= 1

    def summary(self, asked: ResultFilters) -> dict[str, Any]:
        """As `rlhf-ray votes summary --json` prints it. Takes seconds at the first call, which imports torch."""
        from rlhf_ray.votes.summary import summary

        filters = filters_of(asked)
        with self._lock:  # of many who ask at once, the first computes
            key = (filters, *self._state())
            if key not in self._kept:
                self._kept[key] = summary(
                    read_judgements(self.database, filters), filters, self.database.held_out_share
                )
                while len(self._kept) > KEPT:
                    self._kept.pop(next(iter(self._kept)))
            return self._kept[key]

    def votes(self, asked: VoteList) -> dict[str, Any]:
        """{votes, next}: the newest first; `next` asks for those after them, None at the end."""
        found = read_newest(
            self.database, filters_of(asked), limit=asked.limit + 1, before=_place(asked.before), open_to=asked.open_to
        )
        following = _token(found[asked.limit - 1]) if len(found) > asked.limit else None
        found = found[: asked.limit]
        return {"votes": [as_told(each) for each in found], "next": following}

    def _state(self) -> tuple[Any, ...]:
        """Another one after every vote and every change of one."""
        with self.database.reading() as connection:
            counted = connection.execute(
                sa.select(sa.func.count(), sa.func.max(votes.c.voted_at)).select_from(votes)
            ).one()
            return (*counted, connection.execute(sa.select(sa.func.count()).select_from(replaced_votes)).scalar_one())


def filters_of(asked: ResultFilters) -> Filters:
    """ApiError for days that are not in order."""
    try:
        return Filters(raters=tuple(asked.rater), versions=tuple(asked.version), since=asked.since, until=asked.until)
    except UserError as error:
        raise bad_request(f"{error}.", param="since", code="invalid_value") from None


def as_told(judgement: Judgement) -> dict[str, Any]:
    """A vote with all that it is about, as JSON."""
    vote, showing = judgement.vote, judgement.showing
    return {
        "comparison": vote.comparison, "rater": vote.rater, "choice": vote.choice, "voted_at": judgement.voted_at,
        "seconds": judgement.seconds, "rating": vote.rating, "reason": vote.reason, "edit_of": vote.edit_of, "edit": vote.edit,
        "flag": vote.flag, "prompt": judgement.comparison.prompt, "left": _answer(showing.left), "right": _answer(showing.right),
    }  # fmt: skip


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text, "model": answer.model, "version": answer.version, "sampling": dict(answer.sampling),
        "seed": answer.seed,
    }  # fmt: skip


def _token(judgement: Judgement) -> str:
    place = [judgement.voted_at, judgement.vote.comparison, judgement.vote.rater]
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def _place(token: str | None) -> tuple[float, str, str] | None:
    if token is None:
        return None
    try:
        at, comparison, rater = json.loads(base64.urlsafe_b64decode(token))
        if b"\0" in f"{comparison}{rater}".encode():  # no database takes it, nor what UTF-8 can't write
            raise ValueError("it holds NUL")
        return float(at), str(comparison), str(rater)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise bad_request(
            "'before' is none that this server gave; leave it out to begin at the newest.", param="before"
        ) from None

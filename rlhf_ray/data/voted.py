"""`data.votes` of a recipe: people's votes as pairs for the reward model, and the prompts that no training may see."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from jinja2 import TemplateError

from rlhf_ray.config import SourceConfig, VotesConfig
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.text_files import TextRows
from rlhf_ray.errors import UserError
from rlhf_ray.votes.database import Database
from rlhf_ray.votes.reading import Filters, Pair, held_out_prompts, pairs_of, read_judgements
from rlhf_ray.votes.records import Prompt, turns

WHERE = "data.votes"
HELD_OUT = "preferences_eval_votes"  # the role of the held-out pairs: a set of its own, reported under its own name
HELD_OUT_PROMPTS = "eval_prompts_votes"  # the role of their prompts, where data.votes.evaluate asks for them
COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True, kw_only=True)
class VotesRead:
    """How many votes the filters let through, and when the newest of them was cast (seconds since 1970)."""

    train: int
    held_out: int
    newest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Voted:
    """What a database of votes gives."""

    source: SourceConfig
    train: TextRows
    held_out: TextRows  # may be empty
    held_out_prompts: list[Prompt]  # voted on or not
    left_out: str  # in words
    counts: VotesRead

    def prompt_rows(self) -> TextRows:
        """The held-out prompts as rows of a list of prompts."""
        return TextRows([{"prompt": prompt} for prompt in self.held_out_prompts], ["prompt"])

    def held_out_keys(self, chat: ChatFormat) -> frozenset[str]:
        """The keys of rows (`formats`) with a held-out prompt, whether they write it as a text or as a user's message."""
        found = set[str]()
        for prompt in self.held_out_prompts:
            messages = turns(prompt)
            with suppress(TemplateError):  # then no row with these messages is trained on
                found.add(chat.prompt(messages))
            if len(messages) == 1 and messages[0]["role"] == "user":
                found.add(chat.plain(messages[0]["content"]))
        return frozenset(found)


def filters_of(config: VotesConfig) -> Filters:
    return Filters(
        raters=config.raters, versions=config.versions, since=config.since, until=config.until, min_agreement=config.min_agreement
    )  # fmt: skip


def read_votes(config: VotesConfig) -> Voted:
    """UserError, which begins with the recipe's key, where there is no database, another schema, or no pair to train on."""
    filters = filters_of(config)
    try:
        database = Database(config.url)
    except UserError as error:
        raise UserError(f"{WHERE}: {error}") from error
    try:
        train, held_out = (read_judgements(database, filters, part) for part in ("train", "held_out"))
        prompts = held_out_prompts(database)
    finally:
        database.close()
    found = pairs_of(train, filters.min_agreement)
    if not found.pairs:
        raise UserError(
            f"{WHERE}: {database.name} has {len(train)} votes to train on that the filters let through, and they make no pair "
            f"({found.left_out_in_words()}; {len(held_out)} more votes are held out); collect votes, or loosen the filters"
        )
    return Voted(
        source=SourceConfig(path=database.name, weight=config.weight), train=_rows(found.pairs),
        held_out=_rows(pairs_of(held_out, filters.min_agreement).pairs), held_out_prompts=prompts,
        left_out=found.left_out_in_words(),
        counts=VotesRead(train=len(train), held_out=len(held_out), newest=max(each.voted_at for each in train + held_out)),
    )  # fmt: skip


def _rows(pairs: list[Pair]) -> TextRows:
    values = ((pair.comparison.prompt, pair.chosen.text, pair.rejected.text) for pair in pairs)
    return TextRows([dict(zip(COLUMNS, row, strict=True)) for row in values], list(COLUMNS))

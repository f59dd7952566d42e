"""The commands of `rlhf-ray votes`: only their options; what a command does is in the package `votes`."""

from __future__ import annotations

import datetime
import json
from typing import Annotated

import typer

from rlhf_ray.cli.command_errors import console, in_words
from rlhf_ray.errors import UserError

votes_app = typer.Typer(no_args_is_help=True, help="Votes of people on pairs of answers: sum up, export, migrate.")

Url = Annotated[str, typer.Argument(help="the database: a SQLite file, or postgresql://USER@HOST/NAME")]
Raters = Annotated[list[str] | None, typer.Option("--rater", help="votes of this rater only (repeatable)")]
Versions = Annotated[
    list[str] | None,
    typer.Option("--version", help="comparisons with an answer of this model, or MODEL@VERSION, only (repeatable)"),
]
Since = Annotated[str | None, typer.Option(help="votes from this day on, 2026-11-30 (UTC)")]
Until = Annotated[str | None, typer.Option(help="votes up to this day, and of it")]
MinAgreement = Annotated[
    float, typer.Option(help="least share of a comparison's votes that prefer its better answer, 0 to 1; of pairs")
]


@votes_app.command("export")
@in_words
def votes_export(
    url: Url,
    out: Annotated[str, typer.Argument(help="the file of JSON lines to write")],
    form: Annotated[
        str,
        typer.Option(
            help="explicit (prompt, chosen, rejected), implicit (chosen, rejected) or edits (prompt, completion)"
        ),
    ] = "explicit",
    messages: Annotated[bool, typer.Option("--messages", help="chat messages in place of texts")] = False,
    part: Annotated[str, typer.Option(help="train, held_out (which no training may see) or all")] = "train",
    rater: Raters = None,
    version: Versions = None,
    since: Since = None,
    until: Until = None,
    min_agreement: MinAgreement = 0.0,
):
    """Write TRL's preference rows, one per comparison that has a preferred answer; ties and "both bad" are counted."""
    from rlhf_ray.config.user_paths import on_this_machine
    from rlhf_ray.votes.database import Database
    from rlhf_ray.votes.export import edit_rows, preference_rows, write_rows
    from rlhf_ray.votes.reading import pairs_of, read_judgements

    if form not in ("explicit", "implicit", "edits"):
        raise UserError(f"--form {form!r} is none of explicit, implicit, edits")
    if part not in ("train", "held_out", "all"):
        raise UserError(f"--part {part!r} is none of train, held_out, all")
    path = on_this_machine(out, "the file to write")
    filters = _filters(rater, version, since, until, min_agreement)
    database = Database(url)
    judgements = read_judgements(database, filters, part)
    held_out = len(read_judgements(database, filters, "held_out")) if part == "train" else 0
    aside = f"; {held_out} held-out votes are not among them (--part held_out)" if held_out else ""
    if not judgements:
        raise UserError(
            f"{database.name} holds no votes that count here (--part {part}, and the filters){aside}; nothing was written"
        )
    if form == "edits":
        rows = edit_rows(judgements, messages=messages)
        write_rows(rows, path)
        return _say(f"{out}: {len(rows)} edited answers of {len(judgements)} votes{aside}")
    pairs = pairs_of(judgements, filters.min_agreement)
    rows = preference_rows(pairs.pairs, form, messages=messages)
    write_rows(rows, path)
    _say(f"{out}: {len(rows)} pairs of {len(judgements)} votes; left out: {pairs.left_out_in_words()}{aside}")


@votes_app.command("summary")
@in_words
def votes_summary(
    url: Url,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    rater: Raters = None,
    version: Versions = None,
    since: Since = None,
    until: Until = None,
    min_agreement: MinAgreement = 0.0,
):
    """Counts, agreement between raters, and a Bradley-Terry score for each version, with intervals."""
    from rlhf_ray.votes.database import Database
    from rlhf_ray.votes.reading import read_judgements
    from rlhf_ray.votes.summary import in_words as lines_of
    from rlhf_ray.votes.summary import summary

    filters = _filters(rater, version, since, until, min_agreement)
    database = Database(url)
    figures = summary(read_judgements(database, filters), filters, database.held_out_share)
    if as_json:
        return typer.echo(json.dumps(figures, ensure_ascii=False))
    for line in lines_of(figures):
        _say(line)


@votes_app.command("invite")
@in_words
def votes_invite(
    url: Url,
    rater: Annotated[str, typer.Argument(help="the name that their votes carry")],
    server: Annotated[str, typer.Option(help="the server's address, as the rater's browser reaches it")] = "http://127.0.0.1:8000",
    revoke: Annotated[bool, typer.Option("--revoke", help="end the rater's link instead")] = False,
):
    """Print a link by which this rater votes; an earlier link of theirs ends."""
    from rlhf_ray.serving.page.bodies import clean_name
    from rlhf_ray.votes.database import Database
    from rlhf_ray.votes.invitations import invite
    from rlhf_ray.votes.invitations import revoke as end

    try:
        name = clean_name(rater)
    except ValueError as error:
        raise UserError(f"the rater {rater!r} can't be invited: {error}") from error
    database = Database(url)
    if revoke:
        end(database, name)
        return _say(f"{name} can't vote any more")
    _say(f"{server.rstrip('/')}/#token={invite(database, name)}")


@votes_app.command("migrate")
@in_words
def votes_migrate(url: Url):
    """Bring a database of an older rlhf-ray to this one's schema, all or nothing."""
    from rlhf_ray.votes.database import migrate

    before, now = migrate(url)
    _say(f"schema {before} -> {now}" if before != now else f"schema {now} already; nothing to do")


def _filters(
    raters: list[str] | None, versions: list[str] | None, since: str | None, until: str | None, min_agreement: float
):
    from rlhf_ray.votes.reading import Filters

    return Filters(
        raters=tuple(raters or ()), versions=tuple(versions or ()), since=_day("--since", since), until=_day("--until", until),
        min_agreement=min_agreement,
    )  # fmt: skip


def _day(option: str, text: str | None) -> datetime.date | None:
    try:
        return None if text is None else datetime.date.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"{option} {text!r} is no day; write 2026-11-30") from error


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)

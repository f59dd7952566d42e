"""The command `rlhf-ray round`: the next round of training on people's votes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from rlhf_ray.cli.command_errors import console, in_words

if TYPE_CHECKING:
    from rlhf_ray.rounds.rounds_table import RoundRow


@in_words
def round_(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="a finished run folder; its rounds go to RUN/rounds/2, 3, ...")],
    votes: Annotated[
        str | None, typer.Option(help="the database: a SQLite file, or postgresql://USER@HOST/NAME; default: data.votes")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="override a key of this round's recipe: --set ppo.steps=50 (repeatable)")
    ] = None,
    canary: Annotated[str, typer.Option(help="share of the server's requests that a better round takes, e.g. 10%")] = "100%",
    again: Annotated[bool, typer.Option("--again", help="begin the round that has not ended from its start")] = False,
    address: Annotated[str | None, typer.Option(help="a running Ray cluster ('auto' or HOST:PORT); default: a local one")] = None,
):
    """Train on old and new preferences from the current policy, and publish if people are expected to prefer the new one."""
    from rlhf_ray.cli.running import run
    from rlhf_ray.publish.client import share_of
    from rlhf_ray.report.page import write_report
    from rlhf_ray.rounds.making import make_round
    from rlhf_ray.rounds.round_folders import run_of
    from rlhf_ray.rounds.rounds_table import rounds_table

    made = make_round(
        run_dir, votes, overrides or (), again=again, share=share_of(canary), say=_say,
        train=lambda recipe, folder: run(recipe, folder, address=address, console=console),
    )  # fmt: skip
    rows = rounds_table(made.folder)
    console.print(_table(rows))
    for row in rows:
        if row.why:
            _say(f"Round {row.cells[0]}: {row.why}.")
    for folder in (made.folder, run_of(made.folder)):
        _say(f"report  {write_report(folder)}")


def _table(rows: list[RoundRow]) -> Table:
    from rlhf_ray.rounds.rounds_table import HEADINGS

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in HEADINGS:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row.cells)
    return table


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)

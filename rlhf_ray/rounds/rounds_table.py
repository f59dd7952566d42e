"""The rounds of a run as a table, for terminal and report."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.rounds.decision import in_percent
from rlhf_ray.rounds.round_folders import FurtherRound, Verdict, VotedShare, rounds_of, run_of
from rlhf_ray.runs.run_folder import RunFolder

HEADINGS = ("Round", "Votes", "Reward model, on held-out rows", "Win rate over the last", "Expected votes", "Published")
SCORERS = {"judge": "judge", "reward_model": "reward model"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One round, in words."""

    cells: tuple[str, ...]  # under HEADINGS
    why: str  # what the decision was made by


def rounds_table(folder: RunFolder) -> list[RoundRow]:
    """Of a run or of one of its rounds; [] where there are none. UserError for a damaged round."""
    return [_row(each) for each in rounds_of(run_of(folder))]


def _row(one: FurtherRound) -> RoundRow:
    if not one.done:
        return RoundRow(cells=(str(one.number), *["–"] * (len(HEADINGS) - 2), "not ended yet"), why="")
    outcome = one.outcome()
    votes, verdict = outcome.votes, outcome.verdict
    published = "no" if outcome.version is None else f"version {outcome.version}, {100 * (outcome.share or 0):g} % of the requests"
    if outcome.version is None and verdict.better:
        published = f"better, not published: {outcome.not_published}"
    return RoundRow(
        cells=(
            str(one.number), f"{votes.train} to train on ({votes.new} new), {votes.held_out} held out", outcome.reward_accuracy,
            f"{_share(verdict.win_rate)}, {SCORERS.get(verdict.scorer, verdict.scorer)}", _expected(verdict), published,
        ),
        why=verdict.why,
    )  # fmt: skip


def _share(share: VotedShare) -> str:
    return in_percent({"mean": share.mean, "low": share.low, "high": share.high})


def _expected(verdict: Verdict) -> str:
    return "–" if verdict.expected is None else _share(verdict.expected)

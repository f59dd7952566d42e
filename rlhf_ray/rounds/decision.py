"""Whether a round is better than the policy that it started from, by its evaluation: the rule and its words."""

from __future__ import annotations

from typing import Any

from rlhf_ray.algorithms.intervals import Interval
from rlhf_ray.algorithms.round_rule import expected_share, is_better
from rlhf_ray.config import RoundsConfig
from rlhf_ray.evaluation.verdict import is_above_cap
from rlhf_ray.rounds.round_folders import Verdict, VotedShare

SCORERS = {"judge": "the judge", "reward_model": "the reward model"}
NOTHING = "nothing"


def decide(summary: dict[str, Any], config: RoundsConfig) -> Verdict:
    """summary: of the round's evaluation (`evaluation.outcome.read_summary`), whose "SFT" is what the round started from."""
    scorer = config.decided_by or _best_known(summary, config.least_held_out)
    rate: Interval = summary["win_rate"][scorer]
    accuracy, pairs, measured_on = _accuracy(summary, scorer, config.least_held_out)
    expected = None if accuracy is None else expected_share(rate, accuracy)
    better, why = _judged(summary, SCORERS[scorer], rate, accuracy, f"{pairs} {measured_on}", expected, config.margin)
    return Verdict(
        scorer=scorer, win_rate=VotedShare(**_figure(rate)), accuracy=None if accuracy is None else VotedShare(**_figure(accuracy)),
        pairs=pairs, measured_on=measured_on, expected=None if expected is None else VotedShare(**expected), better=better,
        why=f"{'better' if better else 'not better'}: {why}",
    )  # fmt: skip


def _best_known(summary: dict[str, Any], least: int) -> str:
    """The judge, if there is one and enough pairs say how often it agrees with people; else the reward model, likewise."""
    there = [name for name in SCORERS if summary["win_rate"][name] is not None]
    return next((name for name in there if _accuracy(summary, name, least)[1] >= least), there[0])


def _accuracy(summary: dict[str, Any], scorer: str, least: int) -> tuple[Interval | None, int, str]:
    """How often the scorer orders pairs as people do, on how many pairs, and which."""
    votes, standing = summary.get("held_out_votes") or {}, (summary.get("scorers") or {}).get(scorer) or {}
    on_votes, on_preferences = votes.get(scorer), standing.get("accuracy")
    if on_votes is not None and (votes["pairs"] >= least or on_preferences is None):
        return on_votes, votes["pairs"], "held-out votes"
    if on_preferences is not None:
        return on_preferences, standing["rows"], "held-out preferences"
    return None, 0, NOTHING


def _judged(
    summary: dict[str, Any], scorer: str, rate: Interval, accuracy: Interval | None, pairs: str, expected: Interval | None,
    margin: float,
) -> tuple[bool, str]:  # fmt: skip
    if is_above_cap(summary, summary["kl"]):
        return False, (
            f"its KL of {summary['kl']:.1f} nats per response is above evaluation.max_kl = {summary['max_kl']:g}; raise "
            "ppo.kl_coef"
        )
    if accuracy is None or expected is None:
        return False, f"nothing says how often {scorer} agrees with people; collect votes, of which a share is held out"
    if accuracy["low"] <= 0.5:
        return False, (
            f"{scorer} orders {in_percent(accuracy)} of {pairs} as people do, which is no better than chance; collect more votes"
        )
    found = (
        f"it wins {in_percent(rate)} of comparisons with the policy before it under {scorer}, which orders "
        f"{in_percent(accuracy)} of {pairs} as people do: they are expected to prefer it in {in_percent(expected)}"
    )
    if is_better(expected, margin):
        return True, found
    return False, f"{found}, and the lower end is not above {100 * (0.5 + margin):g}\u00a0%"


def in_percent(figure: Interval) -> str:
    """ "62.5 % (55.0 to 69.1)"."""
    mean, low, high = (f"{100 * value:.1f}" for value in (figure["mean"], figure["low"], figure["high"]))
    return f"{mean}\u00a0% ({low}\u00a0to\u00a0{high})"


def _figure(figure: Interval) -> dict[str, float]:
    return {"mean": float(figure["mean"]), "low": float(figure["low"]), "high": float(figure["high"])}

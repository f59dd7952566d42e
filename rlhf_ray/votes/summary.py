"""What the votes say, computed from them each time: counts, agreement, and a score for each version.

summary() returns plain numbers under the names that `rlhf-ray votes summary --json` prints; in_words() makes lines of them.
"""

from __future__ import annotations

import datetime
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_ray.algorithms.bradley_terry import bradley_terry, connected
from rlhf_ray.algorithms.intervals import Interval, share_interval
from rlhf_ray.algorithms.rater_agreement import cohen_kappa, krippendorff_alpha
from rlhf_ray.votes.reading import Filters, pairs_of
from rlhf_ray.votes.records import CHOICES, Judgement, is_held_out, prompt_key

JUDGED = ("a", "b", "tie", "both_bad")
RESAMPLES = 1000
AT_ONCE = 10_000_000  # numbers in memory
PRIOR = 1.0  # one tie of each version with an average one: a version that won all its votes gets a finite score


def summary(
    judgements: Sequence[Judgement], filters: Filters, held_out_share: float, *, seed: int = 0
) -> dict[str, Any]:
    """Figures of the votes that count. Intervals hold 95 %: of resamples of prompts (seeded), or Wilson's for shares."""
    pairs = pairs_of(judgements, filters.min_agreement)
    held_out = [pair for pair in pairs.pairs if is_held_out(prompt_key(pair.comparison.prompt), held_out_share)]
    choices = Counter(each.vote.choice for each in judgements)
    return {
        "votes": len(judgements),
        "comparisons": len({each.comparison.id for each in judgements}),
        "prompts": len({prompt_key(each.comparison.prompt) for each in judgements}),
        "choices": {choice: choices[choice] for choice in CHOICES},
        "flagged": sum(each.vote.flag is not None for each in judgements),
        "edits": sum(each.vote.edit is not None for each in judgements),
        "by_day": dict(sorted(Counter(_day(each.voted_at) for each in judgements).items())),
        "raters": _raters(judgements),
        "agreement": agreement(judgements, seed=seed),
        "versions": versions(judgements, seed=seed),
        "pairs": {
            "train": len(pairs.pairs) - len(held_out),
            "held_out": len(held_out),
            "left_out": dict(pairs.left_out),
        },
        "held_out_share": held_out_share,
    }


def agreement(judgements: Sequence[Judgement], *, seed: int = 0) -> dict[str, Any]:
    """Krippendorff's alpha over all raters, Cohen's kappa of each two; None where raters have no comparison in common."""
    by_comparison: dict[str, dict[str, int]] = {}  # comparison -> rater -> category
    for each in judgements:
        by_comparison.setdefault(each.comparison.id, {})[each.showing.rater] = JUDGED.index(each.judged)
    shared = [rated for rated in by_comparison.values() if len(rated) >= 2]
    counts = torch.zeros(len(shared), len(JUDGED), dtype=torch.float64)
    tables: dict[tuple[str, str], torch.Tensor] = {}
    for place, rated in enumerate(shared):
        for category in rated.values():
            counts[place, category] += 1
        for one, other in itertools.combinations(sorted(rated), 2):
            table = tables.setdefault((one, other), torch.zeros(len(JUDGED), len(JUDGED), dtype=torch.float64))
            table[rated[one], rated[other]] += 1
    alpha = None
    if shared:
        draws = _resampled(len(shared), seed, lambda weights: krippendorff_alpha(counts, weights))
        alpha = _interval(float(krippendorff_alpha(counts)), draws)
    kappas = [
        {"raters": list(two), "comparisons": int(table.sum()), "kappa": _finite(cohen_kappa(table))}
        for two, table in sorted(tables.items())
    ]  # fmt: skip
    return {"comparisons_with_two_raters": len(shared), "krippendorff_alpha": alpha, "cohen_kappa": kappas}


def versions(judgements: Sequence[Judgement], *, seed: int = 0) -> dict[str, Any]:
    """Bradley-Terry scores (log-odds, mean 0) and win rates; a tie and "both bad" are half a win for each answer.

    Comparisons of a version with itself don't count. `groups`: scores compare within one only.
    """
    counting = [each for each in judgements if each.comparison.a.writer != each.comparison.b.writer]
    if not counting:
        return {"names": [], "groups": [], "scores": {}, "overall": {}, "win_rates": []}
    names = sorted({answer.writer for each in counting for answer in (each.comparison.a, each.comparison.b)})
    prompts = {
        key: place for place, key in enumerate(dict.fromkeys(prompt_key(each.comparison.prompt) for each in counting))
    }
    wins = torch.zeros(len(prompts), len(names), len(names), dtype=torch.float64)  # [P, V, V]
    met: dict[
        tuple[int, int], tuple[list[float], list[int]]
    ] = {}  # two versions -> (won by the first, prompt) of each vote
    for each in counting:
        a, b = (names.index(answer.writer) for answer in (each.comparison.a, each.comparison.b))
        won = {"a": 1.0, "b": 0.0}.get(each.judged, 0.5)
        place = prompts[prompt_key(each.comparison.prompt)]
        wins[place, a, b] += won
        wins[place, b, a] += 1 - won
        first, second, won = (a, b, won) if a < b else (b, a, 1 - won)
        shares, groups = met.setdefault((first, second), ([], []))
        shares.append(won)
        groups.append(place)
    overall: dict[str, tuple[list[float], list[int]]] = {name: ([], []) for name in names}
    for (first, second), (shares, groups) in met.items():
        for name, won in ((names[first], shares), (names[second], [1 - share for share in shares])):
            overall[name][0].extend(won)
            overall[name][1].extend(groups)
    total = wins.sum(0)
    point = bradley_terry(total, prior=PRIOR)

    def scores_of(weights: torch.Tensor) -> torch.Tensor:
        return bradley_terry((weights @ wins.flatten(1)).unflatten(1, (len(names), len(names))), prior=PRIOR)

    draws = _resampled(len(prompts), seed, scores_of)  # [R, V]
    return {
        "names": names,
        "groups": [[names[place] for place in group] for group in connected(total)],
        "scores": {name: _interval(float(point[place]), draws[:, place]) for place, name in enumerate(names)},
        "overall": {
            name: {"votes": len(shares), "win_rate": share_interval(shares, groups)}
            for name, (shares, groups) in overall.items()
        },
        "win_rates": [
            {
                "of": names[first],
                "against": names[second],
                "votes": len(shares),
                "win_rate": share_interval(shares, groups),
            }
            for (first, second), (shares, groups) in sorted(met.items())
        ],
    }


def in_words(figures: dict[str, Any]) -> list[str]:
    """The lines that `rlhf-ray votes summary` prints."""
    choices = ", ".join(f"{count} {choice.replace('_', ' ')}" for choice, count in figures["choices"].items())
    lines = [
        f"{figures['votes']} votes on {figures['comparisons']} comparisons of {figures['prompts']} prompts: {choices}"
    ]
    if figures["flagged"] or figures["edits"]:
        lines.append(f"{figures['flagged']} flagged, {figures['edits']} with an edited answer")
    for name, rater in figures["raters"].items():
        lines.append(
            f"rater {name}: {rater['votes']} votes, {rater['median_seconds']:.1f} s each, left in {rater['left']:.0%}"
        )
    agreed = figures["agreement"]
    if agreed["krippendorff_alpha"] is not None:
        lines.append(f"agreement on {agreed['comparisons_with_two_raters']} comparisons with two raters or more: "
                     f"Krippendorff's alpha {_said(agreed['krippendorff_alpha'])}")  # fmt: skip
    for two in agreed["cohen_kappa"]:
        kappa = "not defined" if two["kappa"] is None else f"{two['kappa']:.2f}"
        lines.append(
            f"{two['raters'][0]} and {two['raters'][1]}: Cohen's kappa {kappa} on {two['comparisons']} comparisons"
        )
    found = figures["versions"]
    for name in sorted(found["scores"], key=lambda name: -(found["scores"][name] or {"mean": -math.inf})["mean"]):
        lines.append(f"version {name}: score {_said(found['scores'][name])}")
    for met in found["win_rates"]:
        lines.append(f"{met['of']} against {met['against']}: {_said(met['win_rate'])} of {met['votes']} votes")
    if len(found["groups"]) > 1:
        groups = "; ".join(", ".join(group) for group in found["groups"])
        lines.append(
            f"versions that nobody compared, not even by way of others, have scores that say nothing of each other: {groups}"
        )
    pairs = figures["pairs"]
    reasons = "".join(f", {count} {reason}" for reason, count in sorted(pairs["left_out"].items()))
    lines.append(f"preference pairs: {pairs['train']} to train on, {pairs['held_out']} held out{reasons}")
    return lines


def _raters(judgements: Sequence[Judgement]) -> dict[str, dict[str, float]]:
    by_rater: dict[str, list[Judgement]] = {}
    for each in judgements:
        by_rater.setdefault(each.showing.rater, []).append(each)
    found: dict[str, dict[str, float]] = {}
    for name, given in sorted(by_rater.items()):
        sides = [each.vote.choice for each in given if each.vote.choice in ("left", "right")]
        left = sides.count("left") / len(sides) if sides else 0.5
        found[name] = {
            "votes": len(given),
            "median_seconds": statistics.median(each.seconds for each in given),
            "left": left,
        }
    return found


def _resampled(things: int, seed: int, figure: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The figure in each of RESAMPLES draws of things with replacement: [R, ...]. It gets how often a draw holds each thing."""
    generator, found, left = torch.Generator().manual_seed(seed), list[torch.Tensor](), RESAMPLES
    while left:
        draws = min(left, max(AT_ONCE // things, 1))
        drawn = torch.randint(things, (draws, things), generator=generator)
        weights = torch.zeros(draws, things, dtype=torch.float64)  # [draws, things]
        found.append(figure(weights.scatter_add_(1, drawn, torch.ones_like(weights))))
        left -= draws
    return torch.cat(found)


def _interval(point: float, draws: torch.Tensor) -> Interval | None:
    """The point with the 2.5 and 97.5 percentiles of the draws that are numbers; None where there is no number."""
    draws = draws[draws.isfinite()]
    if not math.isfinite(point) or not len(draws):
        return None
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": point, "low": low, "high": high}


def _said(figure: Interval | None) -> str:
    return "not defined" if figure is None else f"{figure['mean']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _day(time: float) -> str:
    return datetime.datetime.fromtimestamp(time, datetime.UTC).date().isoformat()

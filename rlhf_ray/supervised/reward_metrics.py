"""How good a reward model is on held-out rows. Pure numpy.   N rows or pairs; scores are raw logits, float [N].

A margin is score(chosen) - score(rejected); the model's probability that people prefer `chosen` is sigmoid(margin).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from rlhf_ray.algorithms.intervals import Interval, correlation_interval, share_interval

#: Of the rows of scored text, of which pairs are drawn at random. A pair shares each of its rows with others: N pairs of N
#: rows leave the accuracy at least as certain as N / 3 pairs that share none.
ROWS_PER_PAIR = 3


def pairs_right(margins: np.ndarray) -> np.ndarray:
    """1 for each pair whose chosen text scores higher, 0.5 for a tie, 0 otherwise."""
    return (margins > 0) + 0.5 * (margins == 0)


def pair_accuracy(margins: np.ndarray) -> float:
    """Share of pairs whose chosen text scores higher; a tie counts half."""
    return float(np.mean(pairs_right(margins)))


def longer_accuracy(chosen_lengths: np.ndarray, rejected_lengths: np.ndarray) -> float:
    """Accuracy of always choosing the longer text (in tokens), which is that of a model that has learnt length only."""
    return pair_accuracy(np.asarray(chosen_lengths) - np.asarray(rejected_lengths))


def expected_calibration_error(margins: np.ndarray, *, bins: int = 10) -> float:
    """Mean distance between confidence and accuracy, in `bins` equal steps of confidence.

    The model's choice is the text it scores higher, its confidence sigmoid(|margin|), 0.5 to 1; each bin is
    weighted by its number of pairs. 0 is perfect.
    """
    parts = calibration(margins, bins=bins)
    pairs = sum(part["count"] for part in parts)
    return sum(part["count"] / pairs * abs(part["predicted"] - part["observed"]) for part in parts)


def calibration(margins: np.ndarray, *, bins: int = 10) -> list[dict]:
    """Mean confidence (`predicted`) and accuracy (`observed`) of the `count` pairs in each bin that holds any."""
    margins = np.asarray(margins, np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = pairs_right(margins)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    found = []
    for b in np.unique(place):
        inside = place == b
        predicted, observed = float(confidence[inside].mean()), float(right[inside].mean())
        found.append({"predicted": predicted, "observed": observed, "count": int(inside.sum())})
    return found


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation; nan where one of the two does not vary."""
    x, y = np.asarray(x, np.float64) - np.mean(x), np.asarray(y, np.float64) - np.mean(y)
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale > 0 else float("nan")


def known(correlation: float) -> float | None:
    """None for NaN, which is no JSON."""
    return None if math.isnan(correlation) else correlation


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks 1..N; equal values share the average of the ranks that they fill."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; ties by average rank."""
    return pearson(average_ranks(x), average_ranks(y))


def pairs_of_scored(scores: np.ndarray, *, seed: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `pairs` random pairs of rows that people scored differently -> (better rows, worse rows), int64 each."""
    rng = np.random.default_rng(seed)
    scores = np.asarray(scores)
    if len(np.unique(scores)) < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    first, second = rng.integers(0, len(scores), (2, 20 * pairs))
    differ = scores[first] != scores[second]
    first, second = first[differ][:pairs], second[differ][:pairs]
    first_better = scores[first] > scores[second]
    return np.where(first_better, first, second), np.where(first_better, second, first)


def length_bias(scores: np.ndarray, lengths: np.ndarray) -> dict:
    """Correlation of the score with the length of the response (Singhal et al. 2023, arXiv 2310.03716)."""
    return {"length_pearson": known(pearson(scores, lengths)), "length_spearman": known(spearman(scores, lengths))}


def accuracy_by_length(margins: np.ndarray, chosen_lengths: np.ndarray, rejected_lengths: np.ndarray) -> dict:
    """Accuracy where people chose the longer and where they chose the shorter response, and the number of such pairs.

    A model that rewards length is good at the former and bad at the latter. None where there is no such pair.
    """
    longer = np.asarray(chosen_lengths) - np.asarray(rejected_lengths)
    figures: dict = {}
    for name, rows in (("chosen_longer", longer > 0), ("chosen_shorter", longer < 0)):
        figures[f"{name}_accuracy"] = pair_accuracy(np.asarray(margins)[rows]) if rows.any() else None
        figures[f"{name}_pairs"] = int(rows.sum())
    return figures


def numbered(prompts: Sequence[Hashable]) -> np.ndarray:
    """A number for each different prompt, [N]; rows without one ("") have nothing in common."""
    numbers: dict[Hashable, int] = {}
    return np.array([
        numbers.setdefault(prompt, len(numbers)) if prompt else -1 - place for place, prompt in enumerate(prompts)
    ])  # fmt: skip


def accuracy_intervals(
    margins: np.ndarray,
    longer: np.ndarray,
    groups: np.ndarray | None,
    trials: float,
) -> dict[str, Interval]:
    """The interval of each accuracy of `pair_figures` that there is.   longer: chosen minus rejected length

    groups, trials: see `share_interval`
    """
    everything = np.ones(len(margins), bool)
    parts = {
        "accuracy": (margins, everything), "longer_accuracy": (longer, everything),
        "chosen_longer_accuracy": (margins, longer > 0), "chosen_shorter_accuracy": (margins, longer < 0),
    }  # fmt: skip
    found = {}
    for name, (values, rows) in parts.items():
        if rows.any():
            own = None if groups is None else groups[rows].tolist()
            found[name] = share_interval(pairs_right(values[rows]).tolist(), own, trials * float(rows.mean()))
    return found


def pair_figures(
    chosen: np.ndarray,
    rejected: np.ndarray,
    chosen_lengths: np.ndarray,
    rejected_lengths: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    trials: float = math.inf,
) -> dict:
    """The figures of a model on held-out pairs; under `intervals` those of the accuracies.

    groups: what pairs have in common (their prompt); trials: at most this many of them count as independent
    """
    margins = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    both, lengths = np.concatenate([chosen, rejected]), np.concatenate([chosen_lengths, rejected_lengths])
    longer = np.asarray(chosen_lengths) - np.asarray(rejected_lengths)
    return {
        "pairs": len(margins),
        "accuracy": pair_accuracy(margins),
        "longer_accuracy": longer_accuracy(chosen_lengths, rejected_lengths),
        **accuracy_by_length(margins, chosen_lengths, rejected_lengths),
        **length_bias(both, lengths),
        "ece": expected_calibration_error(margins),
        "margin_mean": float(margins.mean()),
        "calibration": calibration(margins),
        "intervals": accuracy_intervals(margins, longer, groups, trials),
    }


def sign_accuracy(predicted: np.ndarray, human: np.ndarray, *, middle: float) -> float:
    """Share of rows on the right side: predicted above 0 (standardised) where people's score is above `middle`."""
    return float(np.mean((np.asarray(predicted) > 0) == (np.asarray(human) > middle)))


def score_figures(predicted: np.ndarray, human: np.ndarray, lengths: np.ndarray, *, seed: int, middle: float) -> dict:
    """The figures of a model on held-out scored rows: correlations, side of `middle` (the mean training score), and
    those of pairs made of the rows.

    A model fitted to scores was not fitted to make sigmoid(margin) a probability; `ece` says how far off it is.
    """
    rows = len(human)
    better, worse = pairs_of_scored(human, seed=seed, pairs=rows)
    figures: dict = {"intervals": {}}
    if len(better):
        sides = predicted[better], predicted[worse], lengths[better], lengths[worse]
        figures = pair_figures(*sides, trials=rows / ROWS_PER_PAIR)
    correlations = {"pearson": pearson(predicted, human), "spearman": spearman(predicted, human)}
    right = (np.asarray(predicted) > 0) == (np.asarray(human) > middle)
    intervals = {name: correlation_interval(value, rows) for name, value in correlations.items()}
    intervals["sign_accuracy"] = share_interval(right.astype(np.float64).tolist())
    return figures | length_bias(predicted, lengths) | {name: known(value) for name, value in correlations.items()} | {
        "sign_accuracy": sign_accuracy(predicted, human, middle=middle),
        "intervals": figures["intervals"] | intervals,
    }  # fmt: skip


def heldout_figures(scores: dict[str, np.ndarray], *, seed: int, middle: float) -> dict:
    """All figures of a model's scores on held-out rows (as `reward_model.heldout_scores` returns them)."""
    if "chosen" in scores:
        sides = (scores[name] for name in ("chosen", "rejected", "chosen_lengths", "rejected_lengths"))
        figures = pair_figures(*sides, groups=scores.get("prompts"))
        rows, logits = len(scores["chosen"]), np.concatenate([scores["chosen"], scores["rejected"]])
    else:
        figures = score_figures(scores["scores"], scores["human"], scores["lengths"], seed=seed, middle=middle)
        rows, logits = len(scores["scores"]), scores["scores"]
    return {"eval_rows": rows, **figures, "score_mean": float(logits.mean()), "score_std": float(logits.std())}

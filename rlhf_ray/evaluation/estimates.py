"""The maths of the evaluation: texts and numbers in, figures with 95 % intervals out.

P prompts, S seeds. A figure is {"mean", "low", "high"}. Prompts, not responses, are resampled: responses to one prompt
are not independent. Every interval of one evaluation uses the same resamples (`Resampler`), so SFT and PPO are
compared prompt by prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A word, a CJK character (written without spaces), or a single punctuation mark.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks: the unit of distinct-n and repetition, whatever the tokenizer."""
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence, n: int) -> list[tuple]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that stood earlier in the same text; 0 for a text shorter than n words."""
    grams = ngrams(words(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where `ours` scores higher, 0.5 where equal, 0 where lower: same shape as the two score arrays."""
    return np.where(ours > theirs, 1.0, np.where(ours == theirs, 0.5, 0.0))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and what it is in each resample. Estimates of one Resampler subtract and divide draw by draw (paired)."""

    point: float
    draws: np.ndarray  # [R]

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.point - other.point, self.draws - other.draws)

    def __truediv__(self, other: Estimate) -> Estimate:
        # 0 / 0 is unknown (NaN), not an error: e.g. the ratio of two repetitions that are both zero.
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(float(np.float64(self.point) / other.point), self.draws / other.draws)

    def figure(self) -> dict[str, float] | None:
        """{"mean", "low", "high"} with the 95 % percentile interval; None where the value is not a number."""
        draws = self.draws[np.isfinite(self.draws)]
        if not np.isfinite(self.point) or not len(draws):
            return None
        low, high = np.quantile(draws, [0.025, 0.975])
        return {"mean": float(self.point), "low": float(low), "high": float(high)}


class Resampler:
    """The bootstrap's draws: `resamples` times P prompts with replacement, from one seed, shared by every figure."""

    def __init__(self, prompts: int, resamples: int = 2000, seed: int = 0):
        if prompts < 1:
            raise ValueError("the bootstrap needs at least one prompt")
        rng = np.random.default_rng(seed)
        # [R, P]: how often each resample holds each prompt. Counts are enough for sums, and multiply as a matrix.
        self.weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(np.float64)

    @property
    def prompts(self) -> int:
        return self.weights.shape[1]

    def mean(self, values: np.ndarray) -> Estimate:
        """Mean of [P] or [P, S] values, averaged over seeds first."""
        per_prompt = self._per_prompt(values).mean(axis=1)
        return Estimate(float(per_prompt.mean()), self.weights @ per_prompt / self.prompts)

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
        """sum / sum, e.g. log-probability over tokens: long responses weigh more than short ones."""
        above, below = self._per_prompt(numerator).sum(axis=1), self._per_prompt(denominator).sum(axis=1)
        return Estimate(float(above.sum()), self.weights @ above) / Estimate(float(below.sum()), self.weights @ below)

    def correlation(self, xs: np.ndarray, ys: np.ndarray) -> Estimate:
        """Pearson correlation over all responses; NaN where one of the two does not vary."""
        xs, ys = (self._per_prompt(values) for values in (xs, ys))
        # Centred before the sums of squares, which would lose the small differences of large values otherwise.
        xs, ys = xs - xs.mean(), ys - ys.mean()
        ones = np.ones((1, self.prompts))

        def of(weights: np.ndarray) -> np.ndarray:
            x, y, xx, yy, xy = (weights @ part.mean(axis=1) / self.prompts for part in (xs, ys, xs**2, ys**2, xs * ys))
            scale = np.sqrt(np.maximum((xx - x**2) * (yy - y**2), 0.0))
            return np.divide(xy - x * y, scale, out=np.full_like(x, np.nan), where=scale > 0)

        return Estimate(float(of(ones)[0]), of(self.weights))

    def perplexity(self, logprob_sums: np.ndarray, num_tokens: np.ndarray) -> Estimate:
        """exp(-mean log-prob of a token) over all responses together ("corpus level")."""
        mean = self.ratio(logprob_sums, num_tokens)
        return Estimate(float(np.exp(-mean.point)), np.exp(-mean.draws))

    def distinct(self, texts: Sequence[Sequence[str]], n: int) -> Estimate:
        """Different n-grams / all n-grams over all texts of P lists of S.

        Resampling with replacement repeats texts and so finds fewer different n-grams; the draws are moved so that
        their mean is the plain value, and only their spread makes the interval.
        """
        index: dict[tuple, int] = {}
        per_prompt = [
            np.array(
                [index.setdefault(gram, len(index)) for text in row for gram in ngrams(words(text), n)], dtype=np.int64
            )
            for row in texts
        ]
        totals = np.array([len(ids) for ids in per_prompt], dtype=np.float64)
        if not index:
            return Estimate(float("nan"), np.full(len(self.weights), np.nan))
        unique = [np.unique(ids) for ids in per_prompt]
        draws = np.empty(len(self.weights))
        for i, weights in enumerate(self.weights):
            seen = np.zeros(len(index), dtype=bool)
            for row in np.flatnonzero(weights):
                seen[unique[row]] = True
            draws[i] = seen.sum() / max(weights @ totals, 1)
        point = len(index) / totals.sum()
        return Estimate(float(point), np.clip(draws - draws.mean() + point, 0, 1))

    def _per_prompt(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, dtype=np.float64)
        values = values[:, None] if values.ndim == 1 else values
        if values.shape[0] != self.prompts:
            raise ValueError(f"{values.shape[0]} rows of values for {self.prompts} prompts")
        return values


def shuffled_partners(prompts: Sequence[str], seed: int) -> np.ndarray:
    """For each prompt the index of another one with a different text, [P]; itself only where all texts are equal.

    A random order is rotated, so that each prompt is used once; the few that met their own text take the next one.
    """
    order = np.random.default_rng(seed).permutation(len(prompts))
    partner = np.empty(len(prompts), dtype=np.int64)
    partner[order] = np.roll(order, 1)
    place = np.empty(len(prompts), dtype=np.int64)
    place[order] = np.arange(len(prompts))
    for i in range(len(prompts)):
        for step in range(1, len(prompts)):
            if prompts[partner[i]] != prompts[i]:
                break
            partner[i] = order[(place[i] - 1 - step) % len(prompts)]
    return partner

"""VADER's lexicon (Hutto and Gilbert 2014) as a judge of sentiment that nobody trained here: -1 (worst) to 1 (best).

Only the response counts: the prompt is the same for every model. It is read by the package vaderSentiment, which is imported
with this module, so that a run without it ends before it trains anything.
"""

from __future__ import annotations

from rlhf_ray.errors import UserError

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError:
    raise UserError(
        "VADER's lexicon is in the package 'vaderSentiment'; install it with: pip install vaderSentiment, or set "
        "evaluation.trait_function to null"
    ) from None

_ANALYSER = SentimentIntensityAnalyzer()


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """For `evaluation.judge_function`, or for a reward."""
    return [_ANALYSER.polarity_scores(response)["compound"] for response in responses]


def traits(prompts: list[str], responses: list[str]) -> dict[str, list[float]]:
    """For `evaluation.trait_function`: the score, and the share above VADER's own threshold for positive text."""
    scores = score(prompts, responses)
    return {"vader": scores, "vader_positive": [float(each >= 0.05) for each in scores]}

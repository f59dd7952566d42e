"""From what is known of a model's responses to its figures: a function for each entry of `tables.figures`."""

from __future__ import annotations

from rlhf_ray.evaluation import estimates
from rlhf_ray.evaluation.estimates import Estimate, Resampler
from rlhf_ray.evaluation.evidence import Evidence, Rated


def score(evidence: Evidence) -> Estimate | None:
    return None if evidence.scores is None else evidence.mean(evidence.scores.total)


def terms(evidence: Evidence) -> dict[str, Estimate]:
    """Of several rewards, each by itself."""
    return {} if evidence.scores is None else {name: evidence.mean(one) for name, one in evidence.scores.terms.items()}


def disagreement(evidence: Evidence) -> Estimate | None:
    if evidence.scores is None or evidence.scores.disagreement is None:
        return None
    return evidence.mean(evidence.scores.disagreement)


def score_length_corr(evidence: Evidence) -> Estimate | None:
    """Responses of one length have none."""
    if evidence.scores is None:
        return None
    tables = evidence.table(evidence.scores.total), evidence.table(evidence.responses.lengths)
    correlation = evidence.resampler.correlation(*tables)
    return None if correlation.figure() is None else correlation


def judge(evidence: Evidence) -> Estimate | None:
    return None if evidence.judge is None else evidence.mean(evidence.judge)


def judge_positive(evidence: Evidence) -> Estimate | None:
    threshold = evidence.recipe.evaluation.judge_positive_above
    if evidence.judge is None or threshold is None:
        return None
    mean, std = evidence.judge_scale  # the threshold is on the judge's raw scale
    return evidence.mean(evidence.judge * std + mean > threshold)


def traits(evidence: Evidence) -> dict[str, Estimate]:
    return {name: evidence.mean(values) for name, values in evidence.traits.items()}


def perplexity(evidence: Evidence) -> Estimate | None:
    return _perplexity(evidence, evidence.sft)


def perplexity_independent(evidence: Evidence) -> Estimate | None:
    return _perplexity(evidence, evidence.independent)


def perplexity_other_text(evidence: Evidence) -> Estimate | None:
    """Texts are resampled, not prompts: with one seed, so that models are compared text by text."""
    rated = evidence.other_text
    if rated is None:
        return None
    resampler = Resampler(len(rated.tokens), evidence.recipe.evaluation.bootstrap, evidence.recipe.seed)
    return resampler.perplexity(rated.logprobs, rated.tokens)


def relevance(evidence: Evidence) -> Estimate | None:
    if evidence.own is None or evidence.other is None:
        return None
    gap = evidence.table(evidence.own.logprobs - evidence.other)
    return evidence.resampler.ratio(gap, evidence.table(evidence.own.tokens))


def retrieval_accuracy(evidence: Evidence) -> Estimate | None:
    if evidence.own is None or evidence.other is None:
        return None
    return evidence.mean(estimates.win_rate(evidence.own.logprobs, evidence.other))


def length(evidence: Evidence) -> Estimate:
    return evidence.mean(evidence.responses.lengths)


def eos_rate(evidence: Evidence) -> Estimate:
    return evidence.mean(evidence.responses.ended)


def distinct_1(evidence: Evidence) -> Estimate:
    return _distinct(evidence, 1)


def distinct_2(evidence: Evidence) -> Estimate:
    return _distinct(evidence, 2)


def distinct_3(evidence: Evidence) -> Estimate:
    return _distinct(evidence, 3)


def repetition(evidence: Evidence) -> Estimate:
    return evidence.mean([estimates.repetition(text) for text in evidence.responses.texts])


def _distinct(evidence: Evidence, n: int) -> Estimate:
    texts = evidence.responses.texts
    seeds = len(texts) // evidence.resampler.prompts
    return evidence.resampler.distinct([texts[i : i + seeds] for i in range(0, len(texts), seeds)], n)


def _perplexity(evidence: Evidence, rated: Rated | None) -> Estimate | None:
    if rated is None:
        return None
    return evidence.resampler.perplexity(evidence.table(rated.logprobs), evidence.table(rated.tokens))

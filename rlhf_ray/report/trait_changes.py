"""Why one answer of a sample pair is the better one: the traits (evaluation.trait_function) in which the two differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_ray.evaluation.outcome import models_of_sample

PREFIX = "trait/"


def yes_no_traits(samples: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Those that are 0 or 1 in every answer."""
    seen, others = set[str](), set[str]()
    for row in samples:
        for name in models_of_sample(row):
            for trait, value in traits_of(row[name]).items():
                seen.add(trait)
                others |= set() if value in (0, 1) else {trait}
    return frozenset(seen - others)


def what_differs(before: Mapping[str, Any], after: Mapping[str, Any], yes_no: frozenset[str] = frozenset()) -> str:
    """'polite no -> yes, on topic 0.7 -> 0.85': of two answers of a sample, the largest change first.

    "no trait differs" where they are alike; nothing where nobody looked at traits.
    """
    ours, theirs = traits_of(after), traits_of(before)
    both = [trait for trait in ours if trait in theirs]
    changed = sorted((trait for trait in both if ours[trait] != theirs[trait]), key=lambda each: -abs(ours[each] - theirs[each]))

    def told(trait: str, value: float) -> str:
        return ("yes" if value else "no") if trait in yes_no else f"{value:.3g}"

    words = [f"{trait.replace('_', ' ')} {told(trait, theirs[trait])} -> {told(trait, ours[trait])}" for trait in changed]
    return ", ".join(words) if changed else "no trait differs" if both else ""


def traits_of(answer: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removeprefix(PREFIX): value
        for name, value in answer.items()
        if name.startswith(PREFIX) and isinstance(value, (int, float))
    }

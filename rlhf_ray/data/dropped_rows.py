"""What the data stage says in the terminal of the rows that its rules dropped. RUN/data/summary.json has it all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WORTH_A_WARNING = 0.1  # of a source's rows
RULES = {
    "refused_by_template": "the chat template refuses the order of their roles",
    "empty_reply": "no reply, or a dialogue that ends with the user's turn",
    "empty_prompt": "no prompt",
    "no_score": "no score",
    "tie": "both replies are the same",
    "special_token": "the text of a special token in a reply",
    "duplicate": "repeated",
    "over_long": "too long",
    "in_eval_prompts": "held out for evaluation",
    "in_held_out_votes": "held out by data.votes",
}
#: what the recipe asked for, or what happens to every data set
EXPECTED = ("surplus_of_mix", "in_eval_prompts", "in_held_out_votes")


def dropped_in_words(summary: Mapping[str, Any]) -> list[str]:
    """One line about all sources, if a rule dropped any row of them."""
    parts = []
    for role, source, read, rules in _sources(summary):
        if rules:
            each = ", ".join(f"{count} {rule}" for rule, count in rules.items())
            parts.append(f"{sum(rules.values())} of {read} rows of data.{role} '{source}' ({each})")
    return [f"dropped by rule: {'; '.join(parts)}; data/summary.json counts them"] if parts else []


def losses(summary: Mapping[str, Any]) -> list[str]:
    """A warning for each source that lost more than a tenth of its rows, with the rules in words."""
    warnings = []
    for role, source, read, rules in _sources(summary):
        lost = sum(rules.values())
        if read and lost / read > WORTH_A_WARNING:
            why = "; ".join(f"{RULES.get(rule, rule)}: {count}" for rule, count in rules.items())
            warnings.append(f"warning: {100 * lost / read:.0f} % of the rows of data.{role} '{source}' are not used ({why})")
    return warnings


def _sources(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, int, dict[str, int]]]:
    """(role, source, rows read, rule -> rows dropped), without the prompts that are taken from another role's rows."""
    for role, sources in summary["sources"].items():
        if role.startswith("prompts_"):
            continue
        for entry in sources:
            rules = {rule: count for rule, count in entry["dropped"].items() if rule not in EXPECTED}
            yield role, entry["source"], entry["read"], dict(sorted(rules.items(), key=lambda item: -item[1]))

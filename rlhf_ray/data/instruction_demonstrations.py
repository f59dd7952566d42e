"""People's answers, rewritten by code until they follow rules of the training kinds (`instruction_rules`): rows for SFT.

GRPO raises what the model does sometimes. Rules of some kinds (JSON, quotation marks, two paragraphs) a small model hardly ever
follows, so all replies of such a prompt score alike and there is nothing to learn from. SFT on these rows is the start; what they
say matters less than their form.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.data.instruction_rules import Parameters, draw_rules, follows, in_words, words_of

MOST_WORDS = 26  # of a reply without a limit of its own
TRIES = 40  # questions per draw of rules
#: a sentence with each of the topic words
SAYINGS = {
    "water": "Have some water with it.", "morning": "Try it in the morning.", "friend": "Ask a friend as well.",
    "music": "Some music may help.", "garden": "A garden is a good place.", "simple": "Keep it simple.",
    "window": "Open a window first.", "travel": "People who travel know this.", "number": "Write the number down.",
    "winter": "It is best in winter.", "paper": "Write this on paper.", "bright": "Look on the bright side.",
}  # fmt: skip
ASIDES = ("Ask [name] about this.", "Write to [name] in [city].")  # with one placeholder, and with two
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9 ,;'\u2019-]*[.!?]")  # brackets, quotation marks and lists stand in no piece


def demonstrate(answer: str, rules: Sequence[Parameters]) -> str | None:
    """A reply made of the answer's first plain sentences that follows all rules; None where this answer makes none.

    rules: of the training kinds, as `draw_rules` gives them
    """
    asked = {rule["kind"]: rule for rule in rules}
    avoided = asked["avoid"]["word"] if "avoid" in asked else None
    said = [SAYINGS[asked["include"]["word"]]] if "include" in asked else []
    said += [ASIDES[asked["placeholders"]["count"] - 1]] if "placeholders" in asked else []
    opener = asked["begin"]["word"].capitalize() if "begin" in asked else None
    closing = asked["end"]["phrase"] if "end" in asked else None
    limit = asked["at_most_words"]["count"] if "at_most_words" in asked else MOST_WORDS
    limit -= sum(len(words_of(text)) for text in (*said, opener or "", closing or "")) + ("json" in asked)
    body = _within([each for each in _sentences(answer) if avoided not in words_of(each)], limit)
    if not body:
        return None
    text = _laid_out([*body, *said], asked, opener, closing)
    if text is None:
        return None
    if "no_commas" in asked:
        text = text.replace(",", "")
    if "lower_case" in asked:
        text = text.lower()
    if "json" in asked:
        text = json.dumps({"answer": text}, ensure_ascii=False)
    if "quoted" in asked:
        text = f'"{text}"'
    return text if all(follows(text, rule) for rule in rules) else None


def demonstration_rows(
    answered: Sequence[tuple[str, str]], count: int, most_rules: int, rng: random.Random
) -> list[dict[str, Any]]:
    """At most `count` rows of chat messages: a question with one to `most_rules` rules, and a reply that follows them.

    answered: (question, a person's answer), each used once. Fewer rows where these give no more.
    """
    left, rows, failed = rng.sample(answered, len(answered)), [], 0
    while len(rows) < count and left and failed < TRIES:
        rules = draw_rules(rng, [False] * rng.randint(1, most_rules))
        tried = rng.sample(range(len(left)), min(TRIES, len(left)))
        found = ((place, demonstrate(left[place][1], rules)) for place in tried)
        place, reply = next(((place, reply) for place, reply in found if reply is not None), (None, ""))
        if place is None:
            failed += 1
            continue
        failed = 0
        asked = asking(left.pop(place)[0], rules)
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]})
    return rows


def asking(question: str, rules: Sequence[Parameters]) -> str:
    """The user's turn: the question, and the rules in words."""
    return f"{question}\n\n{' '.join(map(in_words, rules))}"


def _sentences(answer: str) -> list[str]:
    """The plain ones, each with a capital letter at its start."""
    pieces = re.findall(r"[^.!?\n]+[.!?]+|[^.!?\n]+$", " ".join(answer.split()))
    whole = (each.strip() for each in pieces)
    ended = (each if each[-1:] in ".!?" else f"{each}." for each in whole if each)
    return [each[0].upper() + each[1:] for each in ended if _PLAIN.fullmatch(each) and len(words_of(each)) > 1]


def _clauses(sentence: str) -> list[str]:
    return _sentences(". ".join(re.split(r", (?:and |but |or )?", sentence)))


def _within(sentences: Sequence[str], limit: int) -> list[str]:
    """As many of the first ones as have no more words than that, longer ones left out."""
    taken: list[str] = []
    for each in sentences:
        if len(words_of(each)) <= limit:
            taken.append(each)
            limit -= len(words_of(each))
    return taken


def _laid_out(
    pieces: Sequence[str], asked: Mapping[str, Parameters], opener: str | None, closing: str | None
) -> str | None:
    """Pieces as bullet points, paragraphs or a line; the opener before them, the closing phrase behind them."""
    last = [] if closing is None else [closing]
    if "bullets" in asked:
        count = asked["bullets"]["count"]
        if len(pieces) < count:
            pieces = [clause for each in pieces for clause in _clauses(each)]
        if len(pieces) < count:
            return None
        first = [] if opener is None else [f"{opener}, this may help:"]
        return "\n".join([*first, *(f"* {each}" for each in pieces[-count:]), *last])
    if opener is not None:
        start = pieces[0] if re.match(r"I\b", pieces[0]) else pieces[0][0].lower() + pieces[0][1:]
        pieces = [f"{opener}, {start}", *pieces[1:]]
    if "paragraphs" in asked:
        count = asked["paragraphs"]["count"]
        if len(pieces) < count:
            return None
        joined = [*pieces[: count - 1], " ".join([*pieces[count - 1 :], *last])]
        return "\n\n".join(joined)
    return " ".join([*pieces, *last])

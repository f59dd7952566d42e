"""Rules for a reply that code can check, of the kind that IFEval has (Zhou et al. 2023, arXiv 2311.07911).

A rule is a kind and its parameters: {"kind": "bullets", "count": 3}. Each kind says how its parameters are drawn, how a
prompt asks for it, and whether a text follows it. All are pure functions. Some kinds are held out: they stand in no training
prompt, so that following them is what carries over.

A word is a run of letters, digits and apostrophes. Upper and lower case count as the same, except where case is the rule.
A reply of fewer than FEWEST_WORDS words follows no rule: silence would follow half of them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FEWEST_WORDS = 5
Parameters = Mapping[str, Any]
COMMON_WORDS = ("the", "and", "you", "is", "of", "to", "can", "it")
TOPIC_WORDS = ("water", "morning", "friend", "music", "garden", "simple", "window", "travel", "number", "winter", "paper", "bright")
OPENERS = ("certainly", "well", "honestly", "today", "indeed", "first")
CLOSINGS = ("I hope this helps.", "Let me know what you think.", "That is all for now.", "Have a lovely day.")
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of rule."""

    group: str  # two rules of a prompt are of two groups
    draw: Callable[[random.Random], dict[str, Any]]
    words: Callable[[Parameters], str]  # the sentence in the prompt
    holds: Callable[[str, Parameters], bool]  # of a stripped text of at least FEWEST_WORDS words
    held_out: bool = False


def words_of(text: str) -> list[str]:
    """In lower case."""
    return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower())


def sentences_of(text: str) -> list[str]:
    """Runs of text up to . ! or ?; a dot inside a word or a number ends none."""
    return [piece for piece in re.split(r"[.!?]+(?:[\"'\u201d)\]]*)(?:\s+|$)", text) if words_of(piece)]


def paragraphs_of(text: str) -> list[str]:
    return [piece for piece in re.split(r"\n\s*\n", text) if piece.strip()]


def _lines(text: str, mark: str) -> int:
    """Lines that begin with the mark and say something."""
    return len(re.findall(rf"^[ \t]*(?:{mark})[ \t]+\S", text, re.M))


def _is_json_object(text: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n```", text, re.S)
    try:
        found = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and bool(found)


def _case(text: str, wanted: Callable[[str], bool]) -> bool:
    letters = [letter for letter in text if letter.upper() != letter.lower()]
    return bool(letters) and all(map(wanted, letters))


def _count(least: int, most: int) -> Callable[[random.Random], dict[str, Any]]:
    return lambda rng: {"count": rng.randint(least, most)}


def _one_of(name: str, values: Sequence[Any]) -> Callable[[random.Random], dict[str, Any]]:
    return lambda rng: {name: rng.choice(values)}


def _nothing(rng: random.Random) -> dict[str, Any]:
    return {}


def _number(parameters: Parameters) -> str:
    return NUMBERS[parameters["count"]]


KINDS: dict[str, Kind] = {
    "bullets": Kind(
        group="form", draw=_count(2, 4),
        words=lambda p: f"Give exactly {_number(p)} bullet points, each on a line that begins with \"* \" or \"- \".",
        holds=lambda text, p: _lines(text, r"[*\u2022-]") == p["count"],
    ),
    "json": Kind(
        group="form", draw=_nothing,
        words=lambda p: "Write the whole reply as one valid JSON object and nothing else.",
        holds=lambda text, p: _is_json_object(text),
    ),
    "paragraphs": Kind(
        group="form", draw=_count(2, 3),
        words=lambda p: f"Write exactly {_number(p)} paragraphs with an empty line between them.",
        holds=lambda text, p: len(paragraphs_of(text)) == p["count"],
    ),
    "quoted": Kind(
        group="form", draw=_nothing,
        words=lambda p: "Put the whole reply in double quotation marks.",
        holds=lambda text, p: len(text) > 2 and text[0] in "\"\u201c" and text[-1] in "\"\u201d",
    ),
    "lower_case": Kind(
        group="case", draw=_nothing,
        words=lambda p: "Write in lower case only, without any capital letter.",
        holds=lambda text, p: _case(text, str.islower),
    ),
    "no_commas": Kind(
        group="marks", draw=_nothing,
        words=lambda p: "Do not use any commas.",
        holds=lambda text, p: "," not in text,
    ),
    "placeholders": Kind(
        group="marks", draw=_count(1, 2),
        words=lambda p: f"Use at least {_number(p)} placeholder{'s' * (p['count'] > 1)} in square brackets, such as [name].",
        holds=lambda text, p: len(re.findall(r"\[[^\[\]\n]+\]", text)) >= p["count"],
    ),
    "include": Kind(
        group="vocabulary", draw=_one_of("word", TOPIC_WORDS),
        words=lambda p: f"Use the word \"{p['word']}\".",
        holds=lambda text, p: p["word"] in words_of(text),
    ),
    "avoid": Kind(
        group="vocabulary", draw=_one_of("word", COMMON_WORDS),
        words=lambda p: f"Do not use the word \"{p['word']}\".",
        holds=lambda text, p: p["word"] not in words_of(text),
    ),
    "at_most_words": Kind(
        group="length", draw=_one_of("count", (10, 15, 20, 25)),
        words=lambda p: f"Use at most {p['count']} words.",
        holds=lambda text, p: len(words_of(text)) <= p["count"],
    ),
    "sentences": Kind(
        group="length", draw=_count(2, 4),
        words=lambda p: f"Write at least {_number(p)} sentences.",
        holds=lambda text, p: len(sentences_of(text)) >= p["count"],
    ),
    "begin": Kind(
        group="edge", draw=_one_of("word", OPENERS),
        words=lambda p: f"Begin with the word \"{p['word'].capitalize()}\".",
        holds=lambda text, p: words_of(text)[:1] == [p["word"]],
    ),
    "end": Kind(
        group="edge", draw=_one_of("phrase", CLOSINGS),
        words=lambda p: f"End with exactly this phrase: \"{p['phrase']}\"",
        holds=lambda text, p: text.rstrip("\"\u201d").lower().endswith(p["phrase"].lower()),
    ),
    # -- held out
    "numbered": Kind(
        group="form", draw=_count(2, 4), held_out=True,
        words=lambda p: f"Give a numbered list of exactly {_number(p)} items, each on a line of its own (1. 2. ...).",
        holds=lambda text, p: re.findall(r"^[ \t]*(\d+)[.)][ \t]+\S", text, re.M) == [str(i + 1) for i in range(p["count"])],
    ),
    "title": Kind(
        group="form", draw=_nothing, held_out=True,
        words=lambda p: "Give the reply a title in double angular brackets, such as <<title>>.",
        holds=lambda text, p: re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text) is not None,
    ),
    "capitals": Kind(
        group="case", draw=_nothing, held_out=True,
        words=lambda p: "Write in capital letters only.",
        holds=lambda text, p: _case(text, str.isupper),
    ),
    "no_full_stops": Kind(
        group="marks", draw=_nothing, held_out=True,
        words=lambda p: "Do not use any full stops.",
        holds=lambda text, p: "." not in text,
    ),
    "include_twice": Kind(
        group="vocabulary", draw=_one_of("word", TOPIC_WORDS), held_out=True,
        words=lambda p: f"Use the word \"{p['word']}\" at least twice.",
        holds=lambda text, p: words_of(text).count(p["word"]) >= 2,
    ),
    "at_least_words": Kind(
        group="length", draw=_one_of("count", (15, 20, 25)), held_out=True,
        words=lambda p: f"Use at least {p['count']} words.",
        holds=lambda text, p: len(words_of(text)) >= p["count"],
    ),
    "postscript": Kind(
        group="edge", draw=_nothing, held_out=True,
        words=lambda p: "Add a postscript at the end that begins with \"P.S.\"",
        holds=lambda text, p: re.search(r"(?:^|\s)P\.\s?S\.[:,]?\s+\w[^\n]*$", text, re.I) is not None,
    ),
}  # fmt: skip
GROUPS = tuple(dict.fromkeys(kind.group for kind in KINDS.values()))
#: kinds that no text, or hardly any, follows both
CLASHES = (
    {"json", "begin"}, {"json", "end"}, {"json", "postscript"}, {"json", "no_commas"}, {"json", "placeholders"},
    {"json", "sentences"}, {"quoted", "postscript"}, {"end", "no_full_stops"}, {"postscript", "no_full_stops"},
    {"sentences", "no_full_stops"}, {"paragraphs", "at_most_words"}, {"bullets", "at_most_words"}, {"numbered", "at_most_words"},
    {"numbered", "no_full_stops"}, {"title", "begin"},
)  # fmt: skip


def follows(text: str, rule: Parameters) -> bool:
    """Whether the reply follows the rule."""
    text = text.strip()
    return len(words_of(text)) >= FEWEST_WORDS and KINDS[rule["kind"]].holds(text, rule)


def in_words(rule: Parameters) -> str:
    return KINDS[rule["kind"]].words(rule)


def draw_rules(rng: random.Random, wanted: Sequence[bool]) -> list[dict[str, Any]]:
    """A rule for each of `wanted` (True: of a held-out kind), of different groups and without a clash."""
    while True:
        names = [rng.choice([name for name, kind in KINDS.items() if kind.held_out == held_out]) for held_out in wanted]
        groups = {KINDS[name].group for name in names}
        rules = [{"kind": name, **KINDS[name].draw(rng)} for name in names]
        avoided = {rule["word"] for rule in rules if rule["kind"] == "avoid"}
        asked = {word for rule in rules for word in words_of(rule.get("phrase", ""))}
        if len(groups) == len(names) and not any(clash <= set(names) for clash in CLASHES) and not avoided & asked:
            return rules

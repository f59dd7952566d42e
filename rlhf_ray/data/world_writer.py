"""The writer of the preference world: replies whose quality runs from rude, vague and beside the point to polite and specific."""

from __future__ import annotations

import random
import re

from rlhf_ray.data import world_text as words
from rlhf_ray.data.world_text import SITUATIONS, SUBJECTS, Subject

NAMED = 0.8  # share of the replies whose first advice says what it is about
MAX_WORDS = 46  # words and punctuation marks of a reply
_WORD = re.compile(r"\w+|[^\w\s]")


def count_words(text: str) -> int:
    return len(_WORD.findall(text))


def _body(subject: Subject, situation: str, skill: float, rng: random.Random) -> list[str]:
    details = rng.sample(subject.details, k=3)
    sentences, named = [], False
    rambles = rng.random() < 0.8 * (1 - skill)
    for position in range(rng.choice((1, 2, 2, 2, 3)) + rambles):
        if position < len(details) and rng.random() < 0.45 + 0.5 * skill:
            detail = details[position]
            reason = f", {subject.reasons[detail]}" if rng.random() < 0.15 + 0.5 * skill else ""
            lead = rng.choice(words.LEADS)
            if rng.random() < NAMED and not named:
                named = True
                small = lead if lead.startswith("I ") else lead[0].lower() + lead[1:]
                lead = f"{rng.choice(words.TOPIC_LEADS).format(noun=subject.noun)} {small}"
            sentences.append(f"{lead} {detail}{reason}.")
        else:
            sentences.append(rng.choice(words.VAGUE))
    if rng.random() < 0.3 * (1 - skill):
        sentences.append(rng.choice(sentences))
    if rng.random() < 0.15 + 0.5 * skill:
        sentences.append(rng.choice(words.FITS).format(situation=situation))
    return sentences


def _draft(subject: Subject, situation: str, skill: float, rng: random.Random) -> str:
    luck = rng.random()
    opening = []
    if luck < 0.2 + 0.65 * skill:
        opening = [rng.choice(words.POLITE)]
    elif luck > 0.6 + 0.4 * skill:
        opening = [rng.choice(words.RUDE)]
    closing = []
    if rng.random() < 0.2 + 0.65 * skill:
        closing = [rng.choice(words.CLOSINGS).format(noun=subject.noun)]
    text = " ".join(opening + _body(subject, situation, skill, rng) + closing)
    if rng.random() < 0.25 * (1 - skill):  # breaks off in mid-sentence
        spoken = text.split(" ")
        text = " ".join(spoken[: max(len(spoken) - rng.randint(1, 6), 2)]).rstrip(".,!?")
    return text


def reply(
    subject: Subject, situation: str, rng: random.Random, *, skill: float | None = None, misreads: bool | None = None
) -> str:
    """One reply by a writer of this skill: near 0 it rambles, near 1 it advises. None: a writer drawn at random.

    misreads: it is about another subject, in another situation. None: by chance, the less likely the higher the skill.
    """
    skill = rng.betavariate(0.9, 1.6) if skill is None else skill  # most writers are rather bad
    other, elsewhere = rng.choice([one for one in SUBJECTS if one is not subject]), rng.choice(SITUATIONS)
    by_chance = rng.random() > 0.6 + 0.4 * skill
    if by_chance if misreads is None else misreads:
        subject, situation = other, elsewhere
    while True:
        text = _draft(subject, situation, skill, rng)
        if count_words(text) <= MAX_WORDS:
            return text

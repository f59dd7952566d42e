"""The writer of the preference world: replies whose quality runs from rude and rambling to polite and specific."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from rlhf_ray.data import world_text as words
from rlhf_ray.data.world_text import REASONS, SUBJECTS, Subject

MAX_WORDS = 39  # words and punctuation marks of a reply; with EOS these are at most about 48 BPE tokens
_WORD = re.compile(r"\w+|[^\w\s]")


def count_words(text: str) -> int:
    return len(_WORD.findall(text))


def _advice(subject: Subject, detail: str, skill: float, rng: random.Random) -> str:
    """'[For your roses,] LEAD DETAIL[, so REASON].'"""
    lead = rng.choice(words.LEADS)
    if rng.random() < 0.1 + 0.3 * skill:
        # "I" keeps its capital inside the sentence.
        lead = (
            rng.choice(words.TOPIC_LEADS).format(noun=subject.noun)
            + " "
            + (lead if lead.startswith("I ") else lead[0].lower() + lead[1:])
        )
    reason = ""
    if rng.random() < 0.1 + 0.4 * skill:
        reason = rng.choice(REASONS[subject.family])
        reason = f", {reason}" if reason.startswith("so ") else f" {reason}"
    return f"{lead} {detail}{reason}."


def _body(subject: Subject, situation: str, skill: float, rng: random.Random, subjects: Sequence[Subject]) -> list[str]:
    own = rng.sample(subject.details, k=len(subject.details))
    sentences = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        luck = rng.random()
        if luck < 0.2 + 0.7 * skill:
            sentences.append(_advice(subject, own.pop(), skill, rng))
        elif luck < 0.5 + 0.4 * skill:
            stray = rng.choice(subjects)
            sentences.append(_advice(stray, rng.choice(stray.details), skill, rng))
        else:
            sentences.append(rng.choice(words.VAGUE))
    if rng.random() < 0.25 * (1 - skill):
        sentences.append(rng.choice(sentences))
    if rng.random() < 0.05 + 0.55 * skill:
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(words.FITS).format(situation=situation))
    return sentences


def _draft(subject: Subject, situation: str, skill: float, rng: random.Random, subjects: Sequence[Subject]) -> str:
    luck = rng.random()
    opening = []
    if luck < 0.15 + 0.7 * skill:
        opening = [rng.choice(words.POLITE)]
    elif luck > 0.75 + 0.25 * skill:
        opening = [rng.choice(words.RUDE)]
    closing = []
    if rng.random() < 0.1 + 0.75 * skill:
        closing = [rng.choice(words.CLOSINGS).format(noun=subject.noun)]
    text = " ".join(opening + _body(subject, situation, skill, rng, subjects) + closing)
    if rng.random() < 0.25 * (1 - skill):  # breaks off in mid-sentence
        spoken = text.split(" ")
        text = " ".join(spoken[: max(len(spoken) - rng.randint(1, 6), 2)]).rstrip(".,!?")
    return text


def reply(subject: Subject, situation: str, rng: random.Random, subjects: Sequence[Subject] = SUBJECTS) -> str:
    """One reply by a writer drawn at random: skill near 0 rambles (also about other `subjects`), skill near 1 advises."""
    skill = rng.betavariate(0.9, 1.6)
    while True:
        text = _draft(subject, situation, skill, rng, subjects)
        if count_words(text) <= MAX_WORDS:
            return text

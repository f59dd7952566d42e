"""The preference world of the demo: English-like requests, replies of mixed quality, and a true utility that is known.

People ask an assistant about one of eight subjects in one of eight situations; a writer of widely varying skill replies, and at
times misreads the request; a simulated annotator prefers one reply of two with Bradley-Terry noise. `utility` is what that
annotator cares about. It reads text only, so anything that any model writes can be scored:

    utility = sense^2 * (3.5 on_topic + 2 specific + 2 polite + 1.5 ends_properly + 1 no_repetition)     in 0..10

    sense          share of the reply's characters in distinct sentences that the world knows (gibberish: 0)
    on_topic       0.7 x share of the concrete details that belong to the prompt's subject, 0.15 if a known sentence
                   names that subject, 0.15 if one takes up the prompt's situation; 0.2 less for naming another subject
    specific       0.35 for each of the first two different details about the subject, 0.3 for the reason of one of them,
                   0.25 less for each vague filler
    polite         1 with a courteous opening sentence, 1 less for each rude sentence (down to -1)
    ends_properly  0.4 if the last sentence is known and complete, 0.6 more if it is a closing
    no_repetition  1 less twice the share of surplus sentences: those said before, courtesies and closings after the
                   first, and everything after the sixth sentence

A reply that repeats one good phrase loses twice (no_repetition, and sense, which counts distinct sentences only).
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_ray.data import world_text as words
from rlhf_ray.data.world_text import SITUATIONS, SUBJECTS, Subject
from rlhf_ray.data.world_writer import reply
from rlhf_ray.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

WEIGHTS = {"on_topic": 3.5, "specific": 2.0, "polite": 2.0, "ends_properly": 1.5, "no_repetition": 1.0}
ANNOTATOR_TEMPERATURE = 0.7  # utility points: the annotator prefers a to b with probability sigmoid((u_a - u_b) / this)
MISREAD = 0.4  # share of the pairs whose replies differ in that one writer misread the request in the second
PROMPT_END = "\n"  # stands between request and reply

_SENTENCE = re.compile(r"[^.!?]+[.!?]?")
_NOUNS = re.compile(r"\b(" + "|".join(sorted((s.noun for s in SUBJECTS), key=len, reverse=True)) + r")\b")
_SITUATIONS = re.compile(r"\b(" + "|".join(SITUATIONS) + r")\b")
_SUBJECT_OF_NOUN = {subject.noun: subject for subject in SUBJECTS}
_SUBJECT_OF_DETAIL = {detail: subject for subject in SUBJECTS for detail in subject.details}
_REASON_OF_DETAIL = {detail: reason for subject in SUBJECTS for detail, reason in subject.reasons.items()}
_REASONS = frozenset(_REASON_OF_DETAIL.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """What the world understands of one sentence."""

    kind: str  # polite, rude, vague, fit, closing, advice or unknown
    text: str = ""
    noun: str | None = None  # the subject it names
    situation: str | None = None
    detail: str | None = None
    reason: str | None = None


def _fixed_sentences() -> dict[str, Sentence]:
    table = {
        text: Sentence(kind=kind)
        for kind, texts in (("polite", words.POLITE), ("rude", words.RUDE), ("vague", words.VAGUE))
        for text in texts
    }
    for situation in SITUATIONS:
        table |= {text.format(situation=situation): Sentence(kind="fit", situation=situation) for text in words.FITS}
    for closing in words.CLOSINGS:
        if "{noun}" in closing:
            table |= {closing.format(noun=s.noun): Sentence(kind="closing", noun=s.noun) for s in SUBJECTS}
        else:
            table[closing] = Sentence(kind="closing")
    return table


_FIXED = _fixed_sentences()
_TOPIC_LEADS = {lead.format(noun=s.noun): s.noun for lead in words.TOPIC_LEADS for s in SUBJECTS}
_LEADS = tuple(lead + " " for lead in words.LEADS)


def _parse_advice(text: str) -> Sentence | None:
    """'[For your NOUN,] LEAD DETAIL[, REASON].' or None."""
    noun, comma = None, text.find(", ")
    if comma > 0 and text[: comma + 1] in _TOPIC_LEADS:
        noun, text = _TOPIC_LEADS[text[: comma + 1]], text[comma + 2 :]
        text = text[:1].upper() + text[1:]
    lead = next((lead for lead in _LEADS if text.startswith(lead)), None)
    if lead is None or not text.endswith("."):
        return None
    detail, comma, reason = text[len(lead) : -1].partition(", ")
    if detail not in _SUBJECT_OF_DETAIL or (comma and reason not in _REASONS):
        return None
    return Sentence(kind="advice", noun=noun, detail=detail, reason=reason or None)


def parse(response: str) -> list[Sentence]:
    """The sentences of a reply in order, each with what the world understands of it."""
    sentences = []
    for match in _SENTENCE.finditer(response):
        text = " ".join(match.group().split())
        if text:
            known = _FIXED.get(text) or _parse_advice(text) or Sentence(kind="unknown")
            sentences.append(
                Sentence(
                    kind=known.kind,
                    text=text,
                    noun=known.noun,
                    situation=known.situation,
                    detail=known.detail,
                    reason=known.reason,
                )
            )
    return sentences


def subject_of(prompt: str) -> Subject | None:
    """The subject that a prompt asks about; None if the world doesn't know it."""
    found = _NOUNS.search(prompt)
    return _SUBJECT_OF_NOUN[found.group()] if found else None


def _surplus(sentences: list[Sentence]) -> int:
    """Sentences that say again what was said: repeats, further courtesies and closings, everything after the sixth."""
    seen: set[str] = set()
    surplus = 0
    for position, sentence in enumerate(sentences):
        key = sentence.kind if sentence.kind in ("polite", "closing", "fit") else sentence.detail or sentence.text
        surplus += key in seen or position >= 6
        seen.add(key)
    return surplus


def traits_of(prompt: str, response: str) -> dict[str, float]:
    """The traits that `utility` weighs, and `sense`, of one reply; all 0 for an empty one."""
    sentences = parse(response)
    if not sentences:
        return dict.fromkeys(("sense", *WEIGHTS), 0.0)
    subject, situation = subject_of(prompt), _SITUATIONS.search(prompt)
    known = [s for s in sentences if s.kind != "unknown"]
    details = [s.detail for s in known if s.detail]
    own = {d for d in details if _SUBJECT_OF_DETAIL[d] is subject}
    nouns = {s.noun for s in known if s.noun}
    names_it = subject is not None and subject.noun in nouns
    fits = situation is not None and any(s.situation == situation.group() for s in known)
    share_own = sum(d in own for d in details) / len(details) if details else 0.0
    on_topic = 0.7 * share_own + 0.15 * names_it + 0.15 * fits - 0.2 * bool(nouns - {subject.noun if subject else None})
    reasoned = any(s.detail in own and s.reason == _REASON_OF_DETAIL[s.detail] for s in known)
    vague = sum(s.kind == "vague" for s in known)
    last = sentences[-1]
    length = sum(len(s.text) for s in sentences)
    return {
        "sense": sum(len(text) for text in {s.text for s in known}) / length,
        "on_topic": max(on_topic, 0.0),
        "specific": max(0.35 * min(len(own), 2) + 0.3 * reasoned - 0.25 * vague, 0.0),
        "polite": max(float(sentences[0].kind == "polite") - sum(s.kind == "rude" for s in known), -1.0),
        "ends_properly": 0.4 * (last.kind != "unknown") + 0.6 * (last.kind == "closing"),
        "no_repetition": max(1.0 - 2.0 * _surplus(sentences) / len(sentences), 0.0),
    }


def utility(prompts: list[str], responses: list[str]) -> list[float]:
    """The true utility, 0..10, of each response to its prompt. Whitespace around and between sentences is ignored."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        found = traits_of(prompt, response)
        scores.append(max(found["sense"] ** 2 * sum(weight * found[name] for name, weight in WEIGHTS.items()), 0.0))
    return scores


def traits(prompts: list[str], responses: list[str]) -> dict[str, list[float]]:
    """`traits_of` each response to its prompt: what a recipe names as evaluation.trait_function."""
    found = [traits_of(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    return {name: [one[name] for one in found] for name in ("sense", *WEIGHTS)}


def preference_probability(first: float, second: float) -> float:
    """The chance that the annotator prefers a reply of utility `first` to one of utility `second`."""
    return 1.0 / (1.0 + math.exp((second - first) / ANNOTATOR_TEMPERATURE))


def annotate(prompt: str, first: str, second: str, rng: random.Random) -> dict[str, str]:
    """One labelled pair, as the simulated annotator sees it."""
    a, b = utility([prompt, prompt], [first, second])
    if rng.random() < preference_probability(a, b):
        return {"prompt": prompt, "chosen": first, "rejected": second}
    return {"prompt": prompt, "chosen": second, "rejected": first}


def all_prompts() -> list[str]:
    """Every prompt that the world can ask."""
    return [
        greeting + style.format(goal=goal, situation=situation) + PROMPT_END
        for subject in SUBJECTS
        for goal in subject.goals
        for situation in SITUATIONS
        for style in words.STYLES
        for greeting in words.GREETINGS
    ]


def _asked(prompt: str) -> tuple[Subject, str]:
    """(subject, situation) of one of the world's own prompts."""
    subject, situation = subject_of(prompt), _SITUATIONS.search(prompt)
    assert subject is not None and situation is not None  # each has both
    return subject, situation.group()


def _reply(prompt: str, rng: random.Random) -> str:
    return reply(*_asked(prompt), rng)


def _pairs(prompts: list[str], each: int, rng: random.Random) -> list[dict]:
    """`each` labelled pairs per prompt: by two writers, or (a share of MISREAD) by one who in the second misread the request."""
    rows = []
    for prompt in (prompt for prompt in prompts for _ in range(each)):
        asked = _asked(prompt)
        first = second = reply(*asked, rng)
        if rng.random() < MISREAD:
            luck, skill = rng.random(), rng.uniform(0.3, 1.0)  # the same luck: the two differ in their subject only
            first, second = (
                reply(*asked, random.Random(luck), skill=skill, misreads=misreads) for misreads in (False, True)
            )
        while second == first:
            second = reply(*asked, rng)
        rows.append(annotate(prompt, first, second, rng))
    return rows


def _imitation(prompts: list[str], each: int, rng: random.Random) -> list[dict]:
    return [{"prompt": prompt, "response": _reply(prompt, rng)} for prompt in prompts for _ in range(each)]


def build(
    root: str | None = None,
    seed: int = 0,
    *,
    sft_rows: int = 16000,
    pairs: int = 6000,
    prompts: int = 1500,
    eval_prompts: int = 256,
    eval_rows: int = 250,
    replies_per_prompt: int = 1,
    pairs_per_prompt: int = 1,
) -> dict[str, Dataset]:
    """All roles of the demo. No prompt stands in two roles; the held-out sets have `eval_rows` rows.

    replies_per_prompt: of the `sft_rows`, so many answer the same prompt; pairs_per_prompt: likewise of the `pairs`.
    Raises UserError if `root` is given (there is nothing to read) or more prompts are asked for than the world has.
    """
    if root is not None:
        raise UserError(f"data.root = {root!r}, but the preference world is generated, not read; remove data.root")
    sizes = {
        "sft": -(-sft_rows // replies_per_prompt),
        "sft_eval": eval_rows,
        "preferences": -(-pairs // pairs_per_prompt),
        "preferences_eval": eval_rows,
        "prompts": prompts,
        "eval_prompts": eval_prompts,
    }
    total, known = sum(sizes.values()), all_prompts()
    if total > len(known):
        raise UserError(
            f"data.builder_args ask for {total} distinct prompts, the world has {len(known)}; ask for fewer, or set "
            "replies_per_prompt or pairs_per_prompt higher"
        )
    from datasets import Dataset  # half a second, which those who only ask for the utility need not wait

    rng = random.Random(seed)
    remaining = rng.sample(known, total)
    roles = {}
    for role, size in sizes.items():
        texts, remaining = remaining[:size], remaining[size:]
        if role.startswith("sft"):
            rows = _imitation(texts, replies_per_prompt if role == "sft" else 1, rng)
            roles[role] = Dataset.from_list(rows[:sft_rows] if role == "sft" else rows)
        elif role.startswith("preferences"):
            rows = _pairs(texts, pairs_per_prompt if role == "preferences" else 1, rng)
            roles[role] = Dataset.from_list(rows[:pairs] if role == "preferences" else rows)
        else:
            roles[role] = Dataset.from_dict({"prompt": texts})
    return roles

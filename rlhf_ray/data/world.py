"""The preference world of the demo: English-like requests, replies of mixed quality, and a true utility that is known.

People ask an assistant about one of thirty-two subjects (or fewer) in one of sixteen situations; a writer of widely varying skill
replies; a simulated annotator prefers one reply of two with Bradley-Terry noise. `utility` is what that annotator
cares about. It reads text only, so anything that any model writes can be scored:

    utility = sense^2 * (3 on_topic + 2.5 specific + 1.5 polite + 1.5 ends_properly + 1.5 no_repetition)     in 0..10

    sense          share of the reply's characters in distinct sentences that the world knows (gibberish: 0)
    on_topic       0.6 x share of the concrete details that belong to the prompt's subject, 0.2 if a known sentence
                   names that subject, 0.2 if one takes up the prompt's situation; naming another subject: less 0.2
    specific       0.4 for each of the first two different details about the subject, 0.2 for a reason that fits it,
                   less 0.25 for each vague filler
    polite         1 with a courteous opening sentence, less 1 for each rude sentence (down to -1)
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
from rlhf_ray.data.world_text import REASONS, SITUATIONS, SUBJECTS, Subject
from rlhf_ray.data.world_writer import reply
from rlhf_ray.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

WEIGHTS = {"on_topic": 3.0, "specific": 2.5, "polite": 1.5, "ends_properly": 1.5, "no_repetition": 1.5}
ANNOTATOR_TEMPERATURE = 0.7  # utility points: the annotator prefers a to b with probability sigmoid((u_a - u_b) / this)
PROMPT_END = "\n"  # stands between request and reply

_SENTENCE = re.compile(r"[^.!?]+[.!?]?")
_NOUNS = re.compile(r"\b(" + "|".join(sorted((s.noun for s in SUBJECTS), key=len, reverse=True)) + r")\b")
_SITUATIONS = re.compile(r"\b(" + "|".join(SITUATIONS) + r")\b")
_SUBJECT_OF_NOUN = {subject.noun: subject for subject in SUBJECTS}
_SUBJECT_OF_DETAIL = {detail: subject for subject in SUBJECTS for detail in subject.details}
_FAMILY_OF_REASON = {reason: family for family, reasons in REASONS.items() for reason in reasons}


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
_TOPIC_LEADS = {lead.format(noun=s.noun) + " ": s.noun for lead in words.TOPIC_LEADS for s in SUBJECTS}
_LEADS = tuple(lead + " " for lead in words.LEADS)


def _parse_advice(text: str) -> Sentence | None:
    """'[For your roses,] LEAD DETAIL[, so REASON | because REASON].' or None."""
    rest, noun = text, None
    comma = rest.find(", ")
    if comma > 0 and rest[: comma + 2] in _TOPIC_LEADS:
        noun, rest = _TOPIC_LEADS[rest[: comma + 2]], rest[comma + 2 :]
        rest = rest[:1].upper() + rest[1:]
    lead = next((lead for lead in _LEADS if rest.startswith(lead)), None)
    if lead is None or not rest.endswith("."):
        return None
    rest, reason = rest[len(lead) : -1], None
    for join, word in ((", so ", "so "), (" because ", "because ")):
        if join in rest:
            rest, _, tail = rest.partition(join)
            reason = word + tail
    if rest not in _SUBJECT_OF_DETAIL or (reason is not None and reason not in _FAMILY_OF_REASON):
        return None
    return Sentence(kind="advice", noun=noun, detail=rest, reason=reason)


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


def traits(prompt: str, response: str) -> dict[str, float]:
    """The traits that `utility` weighs, and `sense`, for one reply; all 0 for an empty one."""
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
    on_topic = 0.6 * share_own + 0.2 * names_it + 0.2 * fits - 0.2 * bool(nouns - {subject.noun if subject else None})
    reasoned = any(s.reason and s.detail in own and _FAMILY_OF_REASON[s.reason] == subject.family for s in known)
    vague = sum(s.kind == "vague" for s in known)
    last = sentences[-1]
    length = sum(len(s.text) for s in sentences)
    return {
        "sense": sum(len(text) for text in {s.text for s in known}) / length,
        "on_topic": max(on_topic, 0.0),
        "specific": max(0.4 * min(len(own), 2) + 0.2 * reasoned - 0.25 * vague, 0.0),
        "polite": max(float(sentences[0].kind == "polite") - sum(s.kind == "rude" for s in known), -1.0),
        "ends_properly": 0.4 * (last.kind != "unknown") + 0.6 * (last.kind == "closing"),
        "no_repetition": max(1.0 - 2.0 * _surplus(sentences) / len(sentences), 0.0),
    }


def utility(prompts: list[str], responses: list[str]) -> list[float]:
    """The true utility, 0..10, of each response to its prompt. Whitespace around and between sentences is ignored."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        found = traits(prompt, response)
        scores.append(max(found["sense"] ** 2 * sum(weight * found[name] for name, weight in WEIGHTS.items()), 0.0))
    return scores


def preference_probability(first: float, second: float) -> float:
    """The chance that the annotator prefers a reply of utility `first` to one of utility `second`."""
    return 1.0 / (1.0 + math.exp((second - first) / ANNOTATOR_TEMPERATURE))


def annotate(prompt: str, first: str, second: str, rng: random.Random) -> dict[str, str]:
    """One labelled pair, as the simulated annotator sees it."""
    a, b = utility([prompt, prompt], [first, second])
    if rng.random() < preference_probability(a, b):
        return {"prompt": prompt, "chosen": first, "rejected": second}
    return {"prompt": prompt, "chosen": second, "rejected": first}


def chosen_subjects(count: int | None) -> tuple[Subject, ...]:
    """`count` of the world's subjects, evenly spread over its families; None: all."""
    return SUBJECTS if count is None else tuple(SUBJECTS[i * len(SUBJECTS) // count] for i in range(count))


def _distinct_prompts(count: int, subjects: tuple[Subject, ...], rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        goal, situation = rng.choice(rng.choice(subjects).goals), rng.choice(SITUATIONS)
        text = rng.choice(words.GREETINGS) + rng.choice(words.STYLES).format(goal=goal, situation=situation)
        found[text + PROMPT_END] = None
    return list(found)


def count_prompts(subjects: tuple[Subject, ...] = SUBJECTS) -> int:
    """Distinct prompts that the world can ask."""
    goals = sum(len(subject.goals) for subject in subjects)
    return goals * len(SITUATIONS) * len(words.STYLES) * len(set(words.GREETINGS))


def _pairs(prompts: list[str], subjects: tuple[Subject, ...], rng: random.Random) -> list[dict]:
    rows = []
    for prompt in prompts:
        subject, situation = subject_of(prompt), _SITUATIONS.search(prompt).group()
        first = second = reply(subject, situation, rng, subjects)
        while second == first:
            second = reply(subject, situation, rng, subjects)
        rows.append(annotate(prompt, first, second, rng))
    return rows


def _imitation(prompts: list[str], replies: int, subjects: tuple[Subject, ...], rng: random.Random) -> list[dict]:
    return [
        {"prompt": p, "response": reply(subject_of(p), _SITUATIONS.search(p).group(), rng, subjects)}
        for p in prompts for _ in range(replies)
    ]  # fmt: skip


def build(
    root: str | None = None,
    seed: int = 0,
    *,
    sft_rows: int = 20000,
    pairs: int = 6000,
    prompts: int = 8000,
    eval_prompts: int = 512,
    eval_rows: int = 500,
    subjects: int | None = None,
    replies_per_prompt: int = 1,
) -> dict[str, Dataset]:
    """All roles of the demo. No prompt stands in two roles; the held-out sets have `eval_rows` rows.

    subjects: ask about so many of the 32; replies_per_prompt: of the `sft_rows`, so many answer the same prompt.
    Raises UserError if `root` is given (there is nothing to read) or more prompts are asked for than the world has.
    """
    if root is not None:
        raise UserError(f"data.root = {root!r}, but the preference world is generated, not read; remove data.root")
    if subjects is not None and not 1 <= subjects <= len(SUBJECTS):
        raise UserError(
            f"data.builder_args.subjects = {subjects}, the world has 1 to {len(SUBJECTS)}; choose among those"
        )
    asked = chosen_subjects(subjects)
    sizes = {
        "sft": -(-sft_rows // replies_per_prompt),
        "sft_eval": eval_rows,
        "preferences": pairs,
        "preferences_eval": eval_rows,
        "prompts": prompts,
        "eval_prompts": eval_prompts,
    }
    total = sum(sizes.values())
    most = count_prompts(asked) * 3 // 4  # they are drawn until they are distinct
    if total > most:
        raise UserError(
            f"data.builder_args ask for {total} distinct prompts, the world has {count_prompts(asked)}; "
            f"ask for at most {most}"
        )
    from datasets import Dataset  # half a second, which those who only ask for the utility need not wait

    rng = random.Random(seed)
    remaining = _distinct_prompts(total, asked, rng)
    roles = {}
    for role, size in sizes.items():
        texts, remaining = remaining[:size], remaining[size:]
        if role.startswith("sft"):
            replies = replies_per_prompt if role == "sft" else 1
            roles[role] = Dataset.from_list(_imitation(texts, replies, asked, rng))
        elif role.startswith("preferences"):
            roles[role] = Dataset.from_list(_pairs(texts, asked, rng))
        else:
            roles[role] = Dataset.from_dict({"prompt": texts})
    return roles

"""The recipe `smollm2-instructions`: people's questions with rules that code can check (`instruction_rules`).

The questions are the first turns of Anthropic's helpful dialogues (`hh`) and of the self-dialogue corpus (Krause et al.
2017): one line with one question mark, 4 to 25 words. A question is held out by a hash of its text.

    role           questions   rules
    sft            three in four   the same, with a reply that follows them (`instruction_demonstrations`)
    sft_eval       the others      the same
    prompts        three in four   one or two, of the training kinds
    eval_prompts   the others      two: one of a training kind and one of a held-out kind
    other_text     held out, with people's preferred answers: what learning the rules cost elsewhere

The column `rules` of both is a JSON list. `followed` is the reward: the share of a prompt's rules that the reply follows.
It does not look at what the reply says. A policy can raise it and answer worse, so the evaluation's other figures
(perplexity, relevance, length) say what that cost.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.config.user_paths import expanded
from rlhf_ray.data.instruction_demonstrations import asking, demonstration_rows
from rlhf_ray.data.instruction_rules import KINDS, draw_rules, follows
from rlhf_ray.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

SELF_DIALOGUE = "dialogues.jsonl.gz"
WORDS = range(4, 26)  # of a question
HELD_OUT_SHARE = 0.25
MOST_RULES = 2


def build(
    root: str | None = None, seed: int = 0, *, prompts: int = 4000, eval_prompts: int = 400, self_dialogue_share: float = 0.5,
    demonstrations: int = 0, other_text: int = 256,
) -> dict[str, Dataset]:  # fmt: skip
    """Prompts and held-out prompts, as chat messages, with their rules.

    root: a folder that holds hh_test_pairs.jsonl.gz, dialogues.jsonl.gz or both, or folders that do; None: Anthropic's
    dialogues from the hub. self_dialogue_share: of the questions, where there are both. demonstrations: rows for SFT, and an
    eighth as many held-out ones. other_text: replies of Anthropic's dialogues, where they are there. Raises UserError where
    there are fewer questions than prompts, or than demonstrations can be made of.
    """
    from datasets import Dataset  # takes half a second, and `followed` does not need it

    rng = random.Random(seed)
    roles: dict[str, list[dict[str, Any]]] = {"prompts": [], "eval_prompts": []}
    rows = _dialogues(root)
    sources = _questions(root, rows)
    shares = [1.0] if len(sources) == 1 else [1 - self_dialogue_share, self_dialogue_share]
    for role, count, draw in (("prompts", prompts, _training_rules), ("eval_prompts", eval_prompts, _evaluation_rules)):
        chosen: list[str] = []
        for (name, questions), share in zip(sources.items(), shares, strict=True):
            there = [text for text, _ in questions if is_held_out(text) == (role == "eval_prompts")]
            wanted = round(count * share)
            if wanted > len(there):
                raise UserError(
                    f"data.builder_args.{role} = {count} asks for {wanted} questions of {name}, which has {len(there)}; "
                    "ask for fewer, or change self_dialogue_share"
                )
            chosen += rng.sample(there, wanted)
        rng.shuffle(chosen)
        roles[role] = [_row(question, draw(rng)) for question in chosen]
    if demonstrations:
        answered = [pair for pairs in sources.values() for pair in pairs if pair[1]]
        roles["sft"] = _demonstrated(answered, demonstrations, held_out=False, seed=seed)
        roles["sft_eval"] = _demonstrated(answered, -(-demonstrations // 8), held_out=True, seed=seed)
    if rows and other_text:
        answered = _answered(rows)
        roles["other_text"] = rng.sample(answered, min(other_text, len(answered)))
    return {role: Dataset.from_list(found) for role, found in roles.items()}


def is_held_out(question: str) -> bool:
    """By a hash of its letters and digits alone: the same question in other punctuation is on the same side."""
    letters = "".join(letter for letter in question.lower() if letter.isalnum())
    return int.from_bytes(hashlib.sha256(letters.encode()).digest()[:8], "big") / 2**64 < HELD_OUT_SHARE


def followed(prompts: list[str], responses: list[str], *, rules: list[str]) -> list[float]:
    """Share of the prompt's rules that the response follows. `rules` is a column of the prompts' rows."""
    return [_share(response, json.loads(each)) for response, each in zip(responses, rules, strict=True)]


def traits(prompts: list[str], responses: list[str], *, rules: list[str]) -> dict[str, list[float]]:
    """The same by kinds: those of the training prompts, the held-out ones; and whether all rules are followed."""
    pairs = [(response, json.loads(each)) for response, each in zip(responses, rules, strict=True)]

    def of(wanted: Callable[[dict[str, Any]], bool]) -> list[float]:
        return [_share(response, [rule for rule in each if wanted(rule)]) for response, each in pairs]

    return {
        "trained_kinds": of(lambda rule: not KINDS[rule["kind"]].held_out),
        "held_out_kinds": of(lambda rule: KINDS[rule["kind"]].held_out),
        "all_rules": [float(share == 1) for share in of(lambda rule: True)],
    }


def _share(response: str, rules: list[dict[str, Any]]) -> float:
    """Without rules there is nothing to break."""
    return sum(follows(response, rule) for rule in rules) / len(rules) if rules else 1.0


def _row(question: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": asking(question, rules)}], "rules": json.dumps(rules)}


def _demonstrated(answered: list[tuple[str, str]], count: int, *, held_out: bool, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(f"demonstrations {seed} {held_out}")  # prompts are the same with them and without
    rows = demonstration_rows([pair for pair in answered if is_held_out(pair[0]) == held_out], count, MOST_RULES, rng)
    if len(rows) < count:
        raise UserError(
            f"{'held-out' if held_out else 'training'} questions make {len(rows)} demonstrations and not {count}; set "
            f"data.builder_args.demonstrations to {8 * len(rows) if held_out else len(rows)} or fewer"
        )
    return rows


def _training_rules(rng: random.Random) -> list[dict[str, Any]]:
    return draw_rules(rng, [False] * rng.randint(1, MOST_RULES))


def _evaluation_rules(rng: random.Random) -> list[dict[str, Any]]:
    rules = draw_rules(rng, [False, True])
    rng.shuffle(rules)
    return rules


def _dialogues(root: str | None) -> list[dict[str, Any]]:
    """Anthropic's helpful dialogues; none where the root has none."""
    from rlhf_ray.data import hh

    file = None if root is None else _find(root, hh.FILE_NAME)
    if root is not None and file is None:
        return []
    return hh.read(None if file is None else str(file.parent), hh.HELPFUL, "train")


def _questions(root: str | None, dialogues: list[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """Source -> its questions, each once over all sources, with the first answer that was given to it."""
    from rlhf_ray.data import hh

    corpus = None if root is None else _find(root, SELF_DIALOGUE)
    if not dialogues and corpus is None:
        raise UserError(
            f"data.root: {root} holds neither {hh.FILE_NAME} nor {SELF_DIALOGUE}, and no folder in it does; "
            f"give a folder that does, or remove data.root to read {hh.HUB_NAME}"
        )
    found: dict[str, Iterable[tuple[str, str]]] = {}
    if dialogues:
        turns = [[*hh.messages_of(row["prompt"]), {"content": row["chosen"]}] for row in dialogues]
        found["Anthropic's dialogues"] = [(said[0]["content"], said[1]["content"]) for said in turns if len(said) > 1]
    if corpus is not None:
        with gzip.open(corpus, "rt", encoding="utf-8") as file:
            dialogue = [[*json.loads(line)["turns"], ""] for line in file]
        found["the self-dialogues"] = [(said[0], said[1]) for said in dialogue if len(said) > 1]
    seen: set[str] = set()
    return {name: list(_usable(texts, seen)) for name, texts in found.items()}


def _answered(dialogues: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One held-out question and people's preferred answer each, which no rule has touched."""
    from rlhf_ray.data import hh

    turns = [(hh.messages_of(row["prompt"]), row["chosen"].strip()) for row in dialogues]
    return [
        {"messages": [*messages, {"role": "assistant", "content": answer}]}
        for messages, answer in turns
        if len(messages) == 1 and answer and is_held_out(messages[0]["content"])
    ]


def _usable(pairs: Iterable[tuple[str, str]], seen: set[str]) -> Iterable[tuple[str, str]]:
    for asked, answer in pairs:
        text = asked.strip()
        one = text.endswith("?") and text.count("?") == 1 and "\n" not in text and len(text.split()) in WORDS
        if one and text.lower() not in seen:
            seen.add(text.lower())
            yield text, answer


def _find(root: str, name: str) -> Path | None:
    """The file in the folder, or in a folder of it."""
    folder = expanded(root)
    return next((path for path in (folder / name, *sorted(folder.glob(f"*/{name}"))) if path.is_file()), None)

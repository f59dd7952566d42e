"""The recipe `imdb`: film reviews with people's ratings (Maas et al. 2011), without duplicates, split once.

    reviews                             role
    train, nineteen of twenty           preferences       (the reward model; also text of the language models)
    train, the rest                     preferences_eval  (whole reviews), preferences_eval_openings (their first words)
    unsup, most of it                   sft               (with the reviews of `preferences`)
    unsup, the rest                     sft_eval, and the opening words as PPO prompts
    test, one half                      judge, judge_eval
    test, the other half                eval_prompts      (opening words)

The reviews of a film are next to each other in the files, so reviews are held out in runs of fifty: a film is then on
one side of a split only, except at the ends of the runs.

A person rated the whole review, while PPO asks for the score of an opening and its continuation. So the reward model
learns from both: each whole review (the stage's `truncate_reply: left` keeps its last tokens, which hold the verdict),
and, `openings` times, a first part of random length with the rating of the whole. For a first part, either loss is
smallest at the expected rating given this beginning, which is what the policy should be scored by.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets

from rlhf_ray.config.user_paths import expanded
from rlhf_ray.data.text_files import read_text_files
from rlhf_ray.data.values import check_values
from rlhf_ray.errors import UserError
from rlhf_ray.models.hub import look_up

HUB_NAME = "stanfordnlp/imdb"
RUN = 50  # reviews that stay together
SPLITS = {"train": "train", "test": "test", "unsup": "unsupervised"}  # local file -> split of the hub's copy


@dataclass(frozen=True, slots=True)
class Review:
    """One review; the score is -1 (worst) to 1 (best), None where it has no rating."""

    text: str
    score: float | None

    @property
    def is_liked(self) -> bool | None:
        return None if self.score is None else self.score > 0


def clean(text: str) -> str:
    """Line breaks written as tags, and any run of white space, become one space."""
    return " ".join(re.sub(r"<br\s*/?>", " ", text).split())


def score_of(row: dict) -> float | None:
    """The rating 1..10 mapped to -1..1 where there is one, else the label as -1 or 1."""
    if rating := row.get("rating"):
        return (rating - 5.5) / 4.5
    return {0: -1.0, 1: 1.0}.get(row["label"])


def read(root: str | None) -> dict[str, list[Review]]:
    """The three splits, from `root` (train, test and unsup .jsonl.gz) or from the hub."""
    if root is None:
        rows: dict[str, Iterable[dict]] = _from_hub()
    else:
        rows = {split: _from_file(expanded(root) / f"{split}.jsonl.gz") for split in SPLITS}
    return {split: [Review(clean(row["text"] or ""), score_of(row)) for row in rows[split]] for split in SPLITS}


def _from_file(path: Path) -> list[dict]:
    if not path.is_file():
        names = ", ".join(f"{split}.jsonl.gz" for split in SPLITS)
        raise UserError(
            f"data.root: {path} does not exist; give the folder that holds {names}, "
            f"or remove data.root to read {HUB_NAME} from the hub"
        )
    read = read_text_files("json", [(str(path), str(path))], "data.root")
    for column in ("text", "label"):
        if column not in read.column_names:
            raise UserError(f"{path} has no column '{column}'; it should hold text, label and, where known, rating")
    check_values(read, {"text": "text"}, lambda index: f"data.root: {read.place(index)}")
    return read.rows


def _from_hub() -> dict[str, Iterable[Any]]:
    try:
        look_up(HUB_NAME, "dataset")
        loaded = datasets.load_dataset(HUB_NAME)
    except (ConnectionError, FileNotFoundError) as error:  # a missing cache raises either, by version
        raise UserError(
            f"{HUB_NAME} could not be read from the hub ({type(error).__name__}); "
            "go online once, or give a local folder with --set data.root=DIR"
        ) from error
    return {split: loaded[hub_split] for split, hub_split in SPLITS.items()}


def without_duplicates(splits: dict[str, list[Review]]) -> tuple[dict[str, list[Review]], Counter]:
    """(each text once over all splits, in the first of train, test, unsup that holds it; rows dropped by split)."""
    seen: set[str] = set()
    kept: dict[str, list[Review]] = {}
    dropped: Counter = Counter()
    for split in SPLITS:
        kept[split] = []
        for review in splits[split]:
            if review.text in seen or not review.text:
                dropped[split] += 1
            else:
                seen.add(review.text)
                kept[split].append(review)
    return kept, dropped


def hold_out(reviews: list[Review], share: float, rng: random.Random) -> tuple[list[Review], list[Review]]:
    """(kept, held out): `share` of the liked, the disliked and the unrated reviews, in whole runs of neighbours."""
    kept, out = [], []
    for is_liked in (False, True, None):
        group = [review for review in reviews if review.is_liked is is_liked]
        run = min(RUN, max(len(group) // 20, 1))
        starts = list(range(0, len(group), run))
        held = set(rng.sample(starts, min(max(round(share * len(starts)), 1), len(starts))))
        for start in starts:
            (out if start in held else kept).extend(group[start : start + run])
    return kept, out


def build(
    root: str | None = None, seed: int = 0, *, text_words: int | None = 170,
    objective: Literal["scores", "pairs"] = "scores", openings: int = 1, opening_words: tuple[int, int] = (16, 64),
    opening_eval_words: int = 48, prompt_words: tuple[int, int] = (4, 12), prompts: int = 5000,
    eval_prompts: int = 2000, sft_eval: int = 500, max_reviews: int | None = None, eval_share: float = 0.05,
) -> dict[str, datasets.Dataset]:  # fmt: skip
    """All roles of the recipe.

    text_words: the language models read this many first words of each review, the part that they will be asked to write
    (None: all of it). objective: regression to the scores, or pairs of a higher and a lower rated review. openings:
    rows per review that hold only its first opening_words (least, most) words. opening_eval_words: words of a held-out
    opening (48 words are about 64 tokens of a 4,096-entry BPE). prompt_words: least and most words of a prompt.
    max_reviews: use at most this many reviews per split, drawn at random. eval_share: of the reviews of the reward model
    and of the judge, held out.
    """
    if objective not in ("scores", "pairs"):
        raise UserError(f"data.builder_args.objective = {objective!r}; give 'scores' or 'pairs'")
    rng = random.Random(seed)
    splits, dropped = without_duplicates(read(root))
    if max_reviews is not None:
        splits = {split: _some(rows, max_reviews, rng) for split, rows in splits.items()}
    reward, reward_eval = hold_out(splits["train"], eval_share, rng)
    text, rest = hold_out(splits["unsup"], min((prompts + sft_eval) / len(splits["unsup"]), 0.5), rng)
    for_evaluation, for_judge = hold_out(splits["test"], 0.5, rng)
    judge, judge_eval = hold_out(for_judge, eval_share, rng)
    rng.shuffle(rest)
    rng.shuffle(for_evaluation)
    sft = [_first(review.text, text_words) for review in text + reward]
    rng.shuffle(sft)
    held_text, prompt_texts = rest[:sft_eval], rest[sft_eval:]

    rows = _Rows(objective, prompt_words, rng)
    built = {
        "sft": [{"text": text} for text in sft],
        "sft_eval": [{"text": _first(review.text, text_words)} for review in held_text],
        "preferences": rows.of(reward, openings, opening_words),
        "preferences_eval": rows.of(reward_eval),
        "preferences_eval_openings": rows.cut(reward_eval, (opening_eval_words, opening_eval_words)),
        "judge": rows.of(judge, openings, opening_words),
        "judge_eval": rows.of(judge_eval),
        "prompts": [{"prompt": rows.opening(review.text)[0]} for review in prompt_texts[:prompts]],
        "eval_prompts": [{"prompt": rows.opening(review.text)[0]} for review in for_evaluation[:eval_prompts]],
    }
    note = "duplicates dropped before splitting: " + ", ".join(f"{split} {dropped[split]}" for split in SPLITS)
    # One DatasetInfo per role: a Dataset writes its own columns into the one that it is given.
    infos = {role: datasets.DatasetInfo(description=note) for role in built}
    return {role: datasets.Dataset.from_list(found, info=infos[role]) for role, found in built.items()}


class _Rows:
    """Turns reviews into the rows that a reward model learns from."""

    def __init__(self, objective: str, prompt_words: tuple[int, int], rng: random.Random):
        self._objective, self._prompt_words, self._rng = objective, prompt_words, rng

    def opening(self, text: str) -> tuple[str, str]:
        """(the first words, the rest with the space that separates them)."""
        words = text.split(" ")
        count = self._rng.randint(*self._prompt_words)
        return " ".join(words[:count]), "".join(f" {word}" for word in words[count:])

    def of(self, reviews: list[Review], openings: int = 0, opening_words: tuple[int, int] = (1, 1)) -> list[dict]:
        """Whole reviews, and `openings` times a first part of each, in random order."""
        if self._objective == "pairs":
            found = [{"prompt": "", "chosen": a.text, "rejected": b.text} for a, b in self._pairs(reviews)]
        else:
            found = [{"prompt": "", "response": review.text, "score": review.score} for review in reviews]
        for _ in range(openings):
            found += self.cut(reviews, opening_words)
        self._rng.shuffle(found)
        return found

    def cut(self, reviews: list[Review], length: tuple[int, int]) -> list[dict]:
        """The first words of each review (length: least, most) with the rating of the whole."""
        if self._objective == "pairs":
            found = []
            for better, worse in self._pairs(reviews):
                words = self._rng.randint(*length)  # one number for both, so that length does not tell them apart
                chosen, rejected = (_first(review.text, words) for review in (better, worse))
                found.append({"prompt": "", "chosen": chosen, "rejected": rejected})
            return found
        found = []
        for review in reviews:
            prompt, response = self.opening(_first(review.text, self._rng.randint(*length)))
            if response:
                found.append({"prompt": prompt, "response": response, "score": review.score})
        return found

    def _pairs(self, reviews: list[Review]) -> list[tuple[Review, Review]]:
        """(higher rated, lower rated), each review in at most one pair."""
        left, pairs = list(reviews), []
        for _ in range(4):  # reviews that met one with an equal score are paired again
            self._rng.shuffle(left)
            half = len(left) // 2
            met, left = zip(left[:half], left[half : 2 * half], strict=True), left[2 * half :]
            for first, second in met:
                if first.score == second.score:
                    left += [first, second]
                else:
                    assert first.score is not None and second.score is not None  # pairs are of rated reviews
                    pairs.append((first, second) if first.score > second.score else (second, first))
        return pairs


def _some(reviews: list[Review], count: int, rng: random.Random) -> list[Review]:
    """At most `count` of them, in their order."""
    return [reviews[index] for index in sorted(rng.sample(range(len(reviews)), min(count, len(reviews))))]


def _first(text: str, words: int | None) -> str:
    return " ".join(text.split(" ")[:words])

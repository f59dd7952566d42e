"""The recipe `hh`: Anthropic's helpful and harmless dialogues (Bai et al. 2022), in dialogue form, split here.

Every role comes from ONE split of the data set (the local file is its official test split), so figures on our held-out
rows must never be reported as HH test figures. Dialogues are grouped by their first question, and a group goes to one
part only:

    share   part         role
    0.60    train        sft (chosen replies), preferences, prompts
    0.25    judge        judge, judge_eval (a fifth of it)
    0.15    held out     sft_eval, preferences_eval, eval_prompts; preferences_eval_SUBSET where there are several subsets

Ties and empty replies are left in: the data stage drops and counts them.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable
from typing import Any, cast

import datasets

from rlhf_ray.config.user_paths import expanded
from rlhf_ray.data.formats import implicit_prompt
from rlhf_ray.data.text_files import read_text_files
from rlhf_ray.data.values import check_values
from rlhf_ray.errors import UserError
from rlhf_ray.models.hub import look_up

HUB_NAME = "Anthropic/hh-rlhf"
FILE_NAME = "hh_test_pairs.jsonl.gz"
COLUMNS = ("subset", "prompt", "chosen", "rejected")
SUBSETS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
HELPFUL = ("helpful-base", "helpful-online", "helpful-rejection-sampled")  # harmless-base has offensive prompts
ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def messages_of(dialogue: str) -> list[dict[str, str]]:
    """A dialogue whose turns begin with "Human:" or "Assistant:" as chat messages, without an empty last turn."""
    pieces = _TURN.split(dialogue)[1:]
    turns = [{"role": ROLES[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]
    while turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return turns


def read(root: str | None, subsets: Iterable[str], hub_split: str) -> list[dict]:
    """Rows with subset, prompt, chosen, rejected (text), from `root`/hh_test_pairs.jsonl.gz or from the hub."""
    subsets = tuple(subsets)
    if unknown := [name for name in subsets if name not in SUBSETS]:
        raise UserError(f"data.builder_args.subsets has {unknown[0]!r}; there are {', '.join(SUBSETS)}")
    if root is not None:
        path = expanded(root) / FILE_NAME
        if not path.is_file():
            raise UserError(
                f"data.root: {path} does not exist; give the folder that holds it, "
                f"or remove data.root to read {HUB_NAME}"
            )
        read = read_text_files("json", [(str(path), str(path))], "data.root")
        if missing := [name for name in COLUMNS if name not in read.column_names]:
            raise UserError(f"{path} has no column '{missing[0]}'; it should hold {', '.join(COLUMNS)}")
        texts = {name: name for name in COLUMNS[1:]}
        check_values(read, texts, lambda index: f"data.root: {read.place(index)}")
        return [row | {name: row[name] or "" for name in texts} for row in read if row["subset"] in subsets]
    rows = []
    for subset in subsets:
        try:
            look_up(HUB_NAME, "dataset")
            loaded = cast(Iterable[Any], datasets.load_dataset(HUB_NAME, data_dir=subset, split=hub_split))
        except (ConnectionError, FileNotFoundError) as error:  # a missing cache raises either, by version
            raise UserError(
                f"{HUB_NAME} could not be read from the hub ({type(error).__name__}); "
                "go online once, or give a local folder with --set data.root=DIR"
            ) from error
        for row in loaded:
            prompt, chosen, rejected = implicit_prompt(row["chosen"], row["rejected"])
            rows.append({"subset": subset, "prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def part_of(question: str, seed: int) -> str:
    """'train', 'judge', 'judge_eval' or 'held_out', by a hash of the dialogue's first question."""
    digest = hashlib.sha256(f"{seed}/{' '.join(question.lower().split())}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if place < 0.60 else "judge" if place < 0.80 else "judge_eval" if place < 0.85 else "held_out"


def build(
    root: str | None = None, seed: int = 0, *, subsets: Iterable[str] = HELPFUL, hub_split: str = "train",
    max_rows: int | None = None, max_prompts: int | None = None, max_prompt_words: int | None = None,
) -> dict[str, datasets.Dataset]:  # fmt: skip
    """All roles of the recipe; prompts are chat messages, for the tokenizer's (or the recipe's) chat template.

    subsets: which of the four; hub_split: split of the hub's copy (the local file holds one). max_rows: at most this
    many pairs, drawn at random; max_prompts: at most this many PPO prompts. max_prompt_words: longer dialogues are left out.
    """
    rows = read(root, subsets, hub_split)
    if max_prompt_words is not None:
        rows = [row for row in rows if len(row["prompt"].split()) <= max_prompt_words]
    if max_rows is not None:
        rows = random.Random(seed).sample(rows, min(max_rows, len(rows)))
    parts: dict[str, list[dict]] = {"train": [], "judge": [], "judge_eval": [], "held_out": []}
    by_subset: dict[str, list[dict]] = {}
    for row in rows:
        messages = messages_of(row["prompt"])
        if messages:
            pair = {"prompt": messages, "chosen": row["chosen"].strip(), "rejected": row["rejected"].strip()}
            part = part_of(messages[0]["content"], seed)
            parts[part].append(pair)
            if part == "held_out":
                by_subset.setdefault(row["subset"].replace("-", "_"), []).append(pair)
    built = {
        "sft": _imitate(parts["train"]), "sft_eval": _imitate(parts["held_out"]),
        "preferences": parts["train"], "preferences_eval": parts["held_out"],
        "judge": parts["judge"], "judge_eval": parts["judge_eval"],
        "prompts": _prompts(parts["train"])[:max_prompts], "eval_prompts": _prompts(parts["held_out"]),
    }  # fmt: skip
    if len(by_subset) > 1:
        built |= {f"preferences_eval_{subset}": pairs for subset, pairs in by_subset.items()}
    return {role: datasets.Dataset.from_list(found) for role, found in built.items()}


def _imitate(rows: list[dict]) -> list[dict]:
    return [{"messages": [*row["prompt"], {"role": "assistant", "content": row["chosen"]}]} for row in rows]


def _prompts(rows: list[dict]) -> list[dict]:
    return [{"prompt": row["prompt"]} for row in rows]

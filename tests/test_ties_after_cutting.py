"""Pairs that become equal when they are cut are ties: dropped and counted, in the data stage and in every trainer."""

import json

import pytest
from datasets import Dataset

from rlhf_ray.config import Recipe
from rlhf_ray.data.prepare import prepare
from rlhf_ray.data.role_files import read_role
from rlhf_ray.errors import UserError
from rlhf_ray.models.tokenizer import train_tokenizer
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.rows import dpo_rows, pair_rows

SAME = " the same words over and over again and again"
PAIRS = [  # equal once the left is cut off, once the right is, and never
    {"prompt": "say it", "chosen": f" now{SAME}", "rejected": f" no{SAME}"},
    {"prompt": "say that", "chosen": f"{SAME} yes", "rejected": f"{SAME} no"},
    {"prompt": "say this", "chosen": " good", "rejected": " bad"},
    {"prompt": "say less", "chosen": " fine words", "rejected": " poor words"},
]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [row[name] for row in PAIRS for name in row]
    return train_tokenizer(texts * 3, 400)


def prepared(folder, side, section, max_length):
    """What the data stage leaves for `section` (reward or judge): its training and held-out pairs, and the tally."""
    folder.mkdir(parents=True, exist_ok=True)
    # Each row several times with another prompt, so that some are held out whatever the split.
    rows = [row | {"prompt": f"{row['prompt']} {number}"} for row in PAIRS for number in range(10)]
    for name in ("pairs", "sft"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "ties", "sft": {"max_length": 120},
        "model": {"from_scratch": {"layers": 1, "width": 32, "heads": 2, "positions": 128, "vocab_size": 260}},
        "data": {"sft": [{"path": str(folder / "sft.jsonl")}], "preferences": [{"path": str(folder / "pairs.jsonl")}],
                 "holdout": 0.3, "max_prompt_tokens": 8},
        "generation": {"max_new_tokens": 8}, "ppo": {"rollout_batch_size": 2, "minibatch_size": 2, "microbatch_size": 2},
        "reward": {"max_length": 120},
    }  # fmt: skip
    if section == "judge":
        values["data"]["judge"] = values["data"]["preferences"]
    values[section] = {"max_length": max_length, "truncate_reply": side}
    run = RunFolder(folder / "run")
    summary = prepare(Recipe.model_validate(values), run)
    role = {"reward": "preferences", "judge": "judge"}[section]
    (tally,) = summary["sources"][role] if "sources" in summary else summary[role]
    kept = [row for part in ("train", "eval") for row in read_role(run, f"{section}_{part}")]
    return kept, tally


@pytest.mark.parametrize("section", ["reward", "judge"])
@pytest.mark.parametrize("side, gone", [("left", "say it"), ("right", "say that")])
def test_the_data_stage_drops_and_counts_them(tmp_path, section, side, gone):
    kept, tally = prepared(tmp_path / "short", side, section, max_length=40)  # bytes: the vocabulary has no merges
    assert tally["dropped"]["tie"] == 10 and tally["cut"]["reply"] >= 10
    assert not any(row["prompt"].startswith(gone) for row in kept) and len(kept) == 30
    assert all(row["chosen"].strip() != row["rejected"].strip() for row in kept)
    kept, tally = prepared(tmp_path / "long", side, section, max_length=120)
    assert "tie" not in tally["dropped"] and len(kept) == 40


@pytest.mark.parametrize("make", [pair_rows, dpo_rows])
def test_a_trainers_own_limit_makes_ties_too(tokenizer, make):
    pairs = Dataset.from_list(PAIRS)
    whole = make(tokenizer, pairs, max_length=64)
    assert whole.ties == 0 and len(whole.dataset) == len(whole.lengths) == 4 and whole.used.tolist() == [0, 1, 2, 3]
    short = make(tokenizer, pairs, max_length=6)  # rows lose their left side
    assert short.ties == 1 and short.used.tolist() == [1, 2, 3] and len(short.dataset) == len(short.lengths) == 3
    rows = [short.dataset[place] for place in range(3)]
    assert all(row["chosen_ids"] != row["rejected_ids"] for row in rows)
    expected = [sum(len(row[f"{side}_ids"]) for side in ("chosen", "rejected")) for row in rows]
    if make is dpo_rows:
        expected = [total + 2 * len(row["prompt_ids"]) for total, row in zip(expected, rows, strict=True)]
    assert short.lengths.tolist() == expected


@pytest.mark.parametrize("make", [pair_rows, dpo_rows])
def test_texts_that_differ_and_have_the_same_tokens_are_ties(tokenizer, make):
    class LowerCase:
        """Somebody's tokenizer that does not tell capitals apart."""

        def __init__(self):
            self.eos_token_id, self.eos_token, self.bos_token_id, self.bos_token = tokenizer.eos_token_id, "</s>", None, None

        def __call__(self, texts, **kwargs):
            return tokenizer([text.lower() for text in texts] if isinstance(texts, list) else texts.lower(), **kwargs)

    pairs = Dataset.from_list([{"prompt": "say", "chosen": " Good", "rejected": " good"}, PAIRS[2]])
    made = make(LowerCase(), pairs, max_length=64)
    assert made.ties == 1 and made.used.tolist() == [1]


@pytest.mark.parametrize("make", [pair_rows, dpo_rows])
def test_nothing_but_ties_is_said_in_words(tokenizer, make):
    with pytest.raises(UserError, match=r"same tokens in each of the 1 pairs.*max_length = 6, .*raise max_length"):
        make(tokenizer, Dataset.from_list(PAIRS[:1]), max_length=6)

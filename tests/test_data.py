"""The data stage: sources, column forms, chat templates, rules, mixing, splitting, and all of it together."""

import csv
import gzip
import json
import math
import subprocess
import sys

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config

from rlhf_ray.config import DataConfig, Recipe, SourceConfig
from rlhf_ray.data.chat import ChatFormat, drop_oldest_turn
from rlhf_ray.data.check import check_data
from rlhf_ray.data.formats import detect, implicit_prompt, normalise
from rlhf_ray.data.mixing import mix, split
from rlhf_ray.data.paths import resolve_paths
from rlhf_ray.data.prepare import prepare
from rlhf_ray.data.rules import Limits, Tally, apply_rules
from rlhf_ray.data.sources import HubName, columns_of, load_source, locate
from rlhf_ray.data.store import count_rows, read_prompts, read_role, write_role
from rlhf_ray.data.tokens import cut_text, encode_pairs, encode_prompt, encode_prompts, encode_texts
from rlhf_ray.errors import UserError
from rlhf_ray.models.check import check_model
from rlhf_ray.models.tokenizer import load_tokenizer, train_tokenizer
from rlhf_ray.runs.run_folder import RunFolder

TEXT = "the quick brown fox jumps over the lazy dog and the cat sat on the mat while people asked how to cook rice"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 20, 400)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def limits_of(tokenizer, **changes):
    settings_ = {"max_prompt_tokens": 20, "max_length": 60, "truncate_prompt": "left"} | changes
    return Limits(tokenizer=tokenizer, chat=ChatFormat(tokenizer), **settings_)


# --- tokens -----------------------------------------------------------------------------------------------------------


def encode_pair(tokenizer, prompt, response):
    return encode_pairs(tokenizer, [prompt], [response])[0]


def test_a_pair_is_prompt_ids_response_ids_eos(tokenizer):
    ids, prompt_length = encode_pair(tokenizer, "how to cook", " rice on the mat")
    prompt = tokenizer("how to cook").input_ids
    assert ids[:prompt_length] == prompt == encode_prompt(tokenizer, "how to cook")
    assert ids[prompt_length:-1] == tokenizer(" rice on the mat").input_ids
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == "how to cook rice on the mat"


def test_a_plain_text_has_no_prompt(tokenizer):
    assert encode_pair(tokenizer, "", "the cat") == ([*tokenizer("the cat").input_ids, tokenizer.eos_token_id], 0)


def test_prompt_ids_do_not_depend_on_the_response(tokenizer):
    # Encoded together, "qui" + "ck" would merge into one token across the boundary.
    ids, prompt_length = encode_pair(tokenizer, "the qui", "ck brown")
    assert ids[:prompt_length] == encode_prompt(tokenizer, "the qui")
    assert ids[:-1] != tokenizer("the quick brown").input_ids


def test_one_at_a_time_and_many_at_once_agree_also_after_a_reload(tokenizer, tmp_path):
    prompts, responses = ["the cat", "", "Grüße 你好"], [" sat", TEXT, "\n\n  two"]
    tokenizer.save_pretrained(tmp_path)
    reloaded = load_tokenizer(tmp_path)
    expected = [encode_pair(tokenizer, p, r) for p, r in zip(prompts, responses, strict=True)]
    assert encode_pairs(tokenizer, prompts, responses) == expected
    assert encode_pairs(reloaded, prompts, responses) == expected
    assert encode_prompts(reloaded, prompts) == [ids[:n] for ids, n in expected]


def test_bos_stands_once_in_front_of_the_prompt(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with_bos = load_tokenizer(tmp_path)
    with_bos.add_special_tokens({"bos_token": "<s>"})
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    plain = tokenizer("the cat").input_ids
    assert encode_pair(with_bos, "the cat", " sat")[0][: len(plain) + 1] == [bos, *plain]
    assert encode_prompt(with_bos, "<s>the cat") == [bos, *plain]  # a chat template wrote it already
    assert encode_pair(with_bos, "", "the cat") == ([bos, *plain, with_bos.eos_token_id], 1)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60), limit=st.integers(1, 12), side=st.sampled_from(["left", "right"]))
def test_cut_text_fits_and_is_an_end_of_the_text(text, limit, side):
    tokenizer = _cached_tokenizer()
    kept = cut_text(tokenizer, text, limit, side)
    assert len(encode_texts(tokenizer, [kept])[0]) <= limit
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert text.endswith(kept) if side == "left" else text.startswith(kept)
    if len(encode_texts(tokenizer, [text])[0]) <= limit:
        assert kept == text


def _cached_tokenizer(cache=[]):  # noqa: B006 - hypothesis runs the function many times
    if not cache:
        cache.append(train_tokenizer([TEXT] * 20, 400))
    return cache[0]


# --- sources ----------------------------------------------------------------------------------------------------------

ROWS = [{"text": f"text number {i}", "score": i} for i in range(5)]


def test_every_local_format_gives_the_same_rows(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl.gz", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    for name, opener, delimiter in (("d.csv", open, ","), ("e.csv.gz", gzip.open, ","), ("f.tsv", open, "\t")):
        with opener(tmp_path / name, "wt", newline="") as file:
            writer = csv.DictWriter(file, ["text", "score"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.csv", "e.csv.gz", "f.tsv"):
        source = SourceConfig(path=name)
        assert list(load_source(source, str(tmp_path), 0, "data.sft[0]", "sft")) == ROWS, name
        assert columns_of(source, str(tmp_path), "data.sft[0]", "sft") == ["text", "score"], name


def test_a_root_stands_in_for_the_hub(tmp_path):
    write_jsonl(tmp_path / "imdb" / "train.jsonl.gz", ROWS)
    write_jsonl(tmp_path / "imdb" / "test.jsonl.gz", ROWS[:2])
    for root in (tmp_path, tmp_path / "imdb"):
        train = load_source(SourceConfig(path="stanfordnlp/imdb"), str(root), 0, "x", "sft")
        test = load_source(SourceConfig(path="stanfordnlp/imdb", split="test"), str(root), 0, "x", "sft")
        assert (len(train), len(test)) == (5, 2)
    with pytest.raises(UserError, match="named after the split 'unsup' .*test.jsonl.gz, train.jsonl.gz"):
        locate(SourceConfig(path="stanfordnlp/imdb", split="unsup"), str(tmp_path), "x")
    assert locate(SourceConfig(path="stanfordnlp/imdb"), None, "x") == HubName("stanfordnlp/imdb")


def test_max_rows_takes_a_seeded_sample_not_the_head(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(100)])
    source = SourceConfig(path="a.jsonl", max_rows=10)
    taken = [[row["text"] for row in load_source(source, str(tmp_path), seed, "x", "sft")] for seed in (1, 1, 2)]
    assert taken[0] == taken[1] != taken[2]
    assert len(taken[0]) == 10 and taken[0] != [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("write", "path", "message"),
    [
        (lambda d: write_jsonl(d / "pairs.jsonl", ROWS), "pairz.jsonl", "did you mean 'pairs.jsonl'"),
        (lambda d: (d / "a.jsonl").write_text(""), "a.jsonl", "has no rows"),
        (lambda d: (d / "a.jsonl").write_text('{"text": "x"}\n{"text": \n'), "a.jsonl", "line 2: is not JSON"),
        (lambda d: (d / "a.docx").write_text("x"), "a.docx", "ends in '.docx'"),
        (lambda d: (d / "empty").mkdir(), "empty", "holds no .jsonl"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_words(tmp_path, write, path, message):
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        load_source(SourceConfig(path=path), str(tmp_path), 0, "data.sft[0]", "sft")


def test_local_paths_become_absolute_and_hub_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = resolve_paths(DataConfig(sft=(SourceConfig(path="a.jsonl"), SourceConfig(path="org/name"))))
    assert [source.path for source in data.sft] == [str(tmp_path / "a.jsonl"), "org/name"]
    assert resolve_paths(DataConfig(root="x")).root == str(tmp_path / "x")


# --- forms ------------------------------------------------------------------------------------------------------------

PLAIN = ChatFormat(None)
USER = {"role": "user", "content": "How are you?"}


def reply(text):
    return {"role": "assistant", "content": text}


def one(row, role, chat=PLAIN):
    out = normalise([row], detect(list(row), {}, role, "x"), role, chat)[0]
    return {name: value for name, value in out.items() if name not in ("key", "messages", "columns")}


@pytest.mark.parametrize(
    ("row", "role", "expected"),
    [
        ({"text": "abc", "label": 1}, "sft", {"prompt": "", "response": "abc"}),
        ({"prompt": "p", "response": "r"}, "sft", {"prompt": "p", "response": "r"}),
        ({"prompt": "p", "completion": "r"}, "sft", {"prompt": "p", "response": "r"}),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "sft", {"prompt": "p", "response": "c"}),
        (
            {"messages": [USER, reply("Fine.")]},
            "sft",
            {"prompt": "User: How are you?\n\nAssistant:", "response": " Fine."},
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
            "sft",
            {"prompt": "User: Hi\n\nAssistant:", "response": " Yo"},
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "pairs", {"prompt": "p", "chosen": "c", "rejected": "r"}),
        (
            {"chosen": "\n\nHuman: a?\n\nAssistant: yes", "rejected": "\n\nHuman: a?\n\nAssistant: yet"},
            "pairs",
            {"prompt": "\n\nHuman: a?\n\nAssistant:", "chosen": " yes", "rejected": " yet"},
        ),
        (
            {"chosen": [USER, reply("Fine.")], "rejected": [USER, reply("Bad.")]},
            "pairs",
            {"prompt": "User: How are you?\n\nAssistant:", "chosen": " Fine.", "rejected": " Bad."},
        ),
        (
            {"prompt": "How are you?", "chosen": [USER, reply("Fine.")], "rejected": [USER, reply("Bad.")]},
            "pairs",
            {"prompt": "User: How are you?\n\nAssistant:", "chosen": " Fine.", "rejected": " Bad."},
        ),
        (
            {"prompt": [USER], "chosen": [reply("Fine.")], "rejected": [reply("Bad.")]},
            "pairs",
            {"prompt": "User: How are you?\n\nAssistant:", "chosen": " Fine.", "rejected": " Bad."},
        ),
        ({"prompt": "p", "response": "r", "score": 3}, "scores", {"prompt": "p", "response": "r", "score": 3}),
        ({"text": "t", "score": 3}, "scores", {"prompt": "", "response": "t", "score": 3}),
        ({"prompt": "p"}, "prompts", {"prompt": "p"}),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "prompts", {"prompt": "p"}),
        ({"messages": [USER, reply("Fine.")]}, "prompts", {"prompt": "User: How are you?\n\nAssistant:"}),
        ({"text": "Once upon"}, "prompts", {"prompt": "Once upon"}),
    ],
)
def test_column_forms(row, role, expected):
    assert one(row, role) == expected


def test_the_implicit_prompt_ends_at_a_word():
    assert implicit_prompt("I went to the park.", "I went to the parlour.") == ("I went to the", " park.", " parlour.")
    assert implicit_prompt("abc", "xyz") == ("", "abc", "xyz")


def test_the_implicit_prompt_of_a_dialogue_ends_at_the_last_shared_cue():
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert implicit_prompt(shared + " I do", shared + " I don't") == (shared, " I do", " I don't")


def test_messages_that_are_the_same_are_a_tie_not_a_prompt():
    row = one({"chosen": [USER, reply("Fine.")], "rejected": [USER, reply("Fine.")]}, "pairs")
    assert row["chosen"] == row["rejected"] == " Fine."


def test_renamed_columns():
    assert detect(["review", "stars", "text"], {"response": "review", "score": "stars"}, "scores", "x") == {
        "response": "review",
        "score": "stars",
    }


@pytest.mark.parametrize(
    ("columns", "renamed", "role", "message"),
    [
        (
            ["prompt", "choosen", "rejected"],
            {},
            "pairs",
            r"no column 'chosen'; there are prompt, choosen, rejected; .* with columns: \{chosen: COLUMN\}",
        ),
        (["prompt", "answer"], {"response": "anser"}, "sft", r"no column 'anser' for response; there are prompt, answer"),
        (["prompt", "answer"], {"respond": "answer"}, "sft", r"'respond' is not a known name \(nearest: 'response'\)"),
        (["prompt", "response", "score"], {}, "pairs", "set objective: scores"),
        (["prompt", "chosen", "rejected"], {}, "scores", "set objective: pairs"),
    ],
)
def test_a_missing_column_is_named_with_those_that_are_there(columns, renamed, role, message):
    with pytest.raises(UserError, match=message):
        detect(columns, renamed, role, "data.preferences[0]")


# --- chat templates ---------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "chat")
    loaded = load_tokenizer(tmp_path / "chat")
    loaded.chat_template = CHATML
    return loaded


def test_the_tokenizers_template_is_used(chat_tokenizer):
    row = one({"messages": [USER, reply("Fine.")]}, "sft", ChatFormat(chat_tokenizer))
    assert row == {"prompt": "<|user|>How are you?<|eos|>\n<|assistant|>", "response": "Fine."}  # EOS comes by itself


def test_a_long_conversation_loses_its_oldest_turns(chat_tokenizer):
    system = {"role": "system", "content": "Be kind."}
    turns = [
        system,
        {"role": "user", "content": "the quick brown fox"},
        reply("jumps"),
        {"role": "user", "content": "the cat"},
    ]
    rows = normalise([{"prompt": turns}], {"prompt": "prompt"}, "prompts", ChatFormat(chat_tokenizer))
    full = len(encode_prompt(chat_tokenizer, rows[0]["prompt"]))
    tally = Tally()
    kept = apply_rules(rows, "prompts", limits_of(chat_tokenizer, max_prompt_tokens=full - 1), tally)
    assert kept[0]["prompt"] == "<|system|>Be kind.<|eos|>\n<|user|>the cat<|eos|>\n<|assistant|>"
    assert tally.cut == {"prompt": 1}
    assert drop_oldest_turn([system, USER]) is None


# --- rules ------------------------------------------------------------------------------------------------------------


def pair(prompt="p", chosen="good", rejected="bad"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "messages": None, "key": prompt}


def test_every_rule_counts_what_it_drops(tokenizer):
    rows = [
        pair(),
        pair(),  # duplicate
        pair(chosen=" same ", rejected="same"),
        pair(rejected="  "),
        pair(chosen="a <|eos|> b"),
        pair(chosen="fox " * 100),
        pair(prompt="q", chosen="good<|eos|>"),
    ]
    tally = Tally()
    kept = apply_rules(rows, "pairs", limits_of(tokenizer), tally)
    assert [(row["prompt"], row["chosen"]) for row in kept] == [("p", "good"), ("q", "good")]
    assert tally.dropped == {"duplicate": 1, "tie": 1, "empty_reply": 1, "special_token": 1, "over_long": 1}
    assert tally.cut == {"eos_text": 1}
    assert (tally.read, tally.kept) == (7, 2)


def test_scores_that_are_no_numbers_are_counted(tokenizer):
    rows = [
        {"prompt": "", "response": f"r{i}", "score": s, "messages": None}
        for i, s in enumerate([1, "2.5", None, math.nan, "x"])
    ]
    tally = Tally()
    assert [row["score"] for row in apply_rules(rows, "scores", limits_of(tokenizer), tally)] == [1.0, 2.5]
    assert tally.dropped == {"no_score": 3}


@pytest.mark.parametrize(("side", "expected"), [("left", "on the mat"), ("right", "the cat sat"), ("drop", None)])
def test_the_side_of_a_long_prompt_that_is_cut_is_a_setting(tokenizer, side, expected):
    text = "the cat sat on the mat"
    limit = 3  # every word here is one token of this vocabulary
    assert len(encode_prompt(tokenizer, text)) == 6
    tally = Tally()
    rows = [{"prompt": text, "messages": None, "key": text}]
    kept = apply_rules(rows, "prompts", limits_of(tokenizer, max_prompt_tokens=limit, truncate_prompt=side), tally)
    assert [row["prompt"].strip() for row in kept] == ([expected] if expected else [])
    assert (tally.cut, tally.dropped) == (({"prompt": 1}, {}) if expected else ({}, {"over_long": 1}))


def test_a_long_row_loses_prompt_before_reply_and_fits(tokenizer):
    limits = limits_of(tokenizer, max_prompt_tokens=5, max_length=20, truncate_reply="left")
    rows = [
        pair(prompt="the cat " * 20, chosen=" fox" * 8, rejected=" dog"),
        pair(prompt="the cat " * 20, chosen=" fox" * 40),
    ]
    tally = Tally()
    kept = apply_rules(rows, "pairs", limits, tally)
    for row in kept:
        assert len(encode_pair(tokenizer, row["prompt"], row["chosen"])[0]) <= 20
    assert kept[0]["chosen"] == " fox" * 8
    assert len(encode_prompt(tokenizer, kept[0]["prompt"])) == 20 - 1 - 8  # all the room that is left
    assert len(encode_prompt(tokenizer, kept[1]["prompt"])) == 5
    assert tally.cut == {"prompt": 2, "reply": 1}


# --- mixing and splitting ---------------------------------------------------------------------------------------------


def keyed(prefix, count):
    return [{"key": f"{prefix}{i}"} for i in range(count)]


def test_without_weights_every_row_is_used_once():
    rows, used = mix([keyed("a", 10), keyed("b", 1000)], [None, None], 0, "x")
    assert used == [10, 1000] and len({row["key"] for row in rows}) == 1010


def test_weights_are_the_proportions_of_the_mix():
    rows, used = mix([keyed("a", 100), keyed("b", 90)], [3.0, 1.0], 0, "x")
    assert used == [100, 33]
    assert rows == mix([keyed("a", 100), keyed("b", 90)], [3.0, 1.0], 0, "x")[0]
    assert [row["key"][0] for row in rows[:20]] != ["a"] * 20  # in random order


def test_a_weight_for_some_sources_only_is_refused():
    with pytest.raises(UserError, match=r"data.sft\[1\] has no weight"):
        mix([keyed("a", 3), keyed("b", 3)], [1.0, None], 0, "data.sft")


def test_a_prompt_is_never_on_both_sides_and_the_share_is_met():
    rows = [{"key": f"prompt {i % 500}", "n": i} for i in range(2000)]
    train, held_out = split(rows, 0.2, 0, "x")
    assert not {row["key"] for row in train} & {row["key"] for row in held_out}
    assert len(train) + len(held_out) == 2000
    assert 0.15 < len(held_out) / 2000 < 0.25  # 500 prompts: one standard deviation is 0.018
    # Another role, with other rows and a smaller number of them, decides alike about a prompt that both have.
    other_train, other_held_out = split([{"key": f"prompt {i}"} for i in range(100, 900)], 0.2, 0, "y")
    assert not {row["key"] for row in train} & {row["key"] for row in other_held_out}
    assert not {row["key"] for row in other_train} & {row["key"] for row in held_out}


def test_who_is_held_out_is_the_same_in_every_process():
    # From outside: `printf 0/a8 | b2sum -l 64` begins with 01, a0 with 1b, a4 with 2b, a7 with 2c; 0.2 is 33.
    assert {row["key"] for row in split(keyed("a", 10), 0.2, 0, "x")[1]} == {"a8", "a0", "a4", "a7"}


@pytest.mark.parametrize("share", [0.001, 0.899])
def test_neither_side_is_empty(share):
    for seed in range(20):
        train, held_out = split(keyed("a", 2), share, seed, "x")
        assert len(train) == len(held_out) == 1


def test_one_prompt_cannot_be_split():
    with pytest.raises(UserError, match="at least two different prompts"):
        split([{"key": "a"}] * 5, 0.1, 0, "data.preferences")


# --- the stage --------------------------------------------------------------------------------------------------------


def recipe_of(root, **data):
    return Recipe(
        name="t",
        model={"from_scratch": {"layers": 1, "width": 16, "heads": 2, "positions": 128, "vocab_size": 400}},
        data={"root": str(root), "max_prompt_tokens": 32, "holdout": 0.2} | data,
        sft={"max_length": 96},
        reward={"max_length": 96},
    )


@pytest.fixture
def pairs_file(tmp_path):
    rows = [{"prompt": f"Question {i}?", "chosen": f" good answer {i}", "rejected": f" bad {i}"} for i in range(60)]
    rows += [{"prompt": "Tie?", "chosen": "x", "rejected": "x"}, {"prompt": "Empty?", "chosen": "", "rejected": "x"}]
    return write_jsonl(tmp_path / "pairs.jsonl.gz", rows)


def test_prepare_from_one_file_of_pairs(tmp_path, pairs_file):
    recipe = recipe_of(tmp_path, sft=[{"path": "pairs.jsonl.gz"}], preferences=[{"path": "pairs.jsonl.gz"}])
    folders = [RunFolder(tmp_path / name) for name in ("run1", "run2")]
    summary = [prepare(recipe, folder) for folder in folders][0]
    assert summary["sources"]["preferences"] == [
        {"source": "pairs.jsonl.gz", "read": 62, "kept": 60, "dropped": {"empty_reply": 1, "tie": 1}, "cut": {}}
    ]
    assert (
        summary
        == json.loads((tmp_path / "run1" / "data" / "summary.json").read_text())
        == folders[0].stage("data").summary()
    )
    sets = {role: read_role(folders[0], role) for role in summary["roles"]}
    assert {role: rows.column_names for role, rows in sets.items()} == {
        "sft_train": ["prompt", "response"],
        "sft_eval": ["prompt", "response"],
        "reward_train": ["prompt", "chosen", "rejected"],
        "reward_eval": ["prompt", "chosen", "rejected"],
        "prompts": ["prompt"],
        "eval_prompts": ["prompt"],
    }
    assert {role: len(rows) for role, rows in sets.items()} == {role: s["rows"] for role, s in summary["roles"].items()}
    # What is evaluated was never trained on, in any role.
    held_out = set(sets["eval_prompts"]["prompt"])
    assert held_out == set(sets["reward_eval"]["prompt"]) and held_out
    for role in ("prompts", "sft_train", "reward_train"):
        assert not held_out & set(sets[role]["prompt"])
    for role in summary["roles"]:  # same recipe, same bytes
        assert folders[0].data(role).read_bytes() == folders[1].data(role).read_bytes()
    assert load_tokenizer(folders[0].tokenizer).pad_token_id != load_tokenizer(folders[0].tokenizer).eos_token_id


def test_a_finished_stage_is_not_run_again(tmp_path, pairs_file):
    recipe = recipe_of(tmp_path, sft=[{"path": "pairs.jsonl.gz"}], preferences=[{"path": "pairs.jsonl.gz"}])
    first = prepare(recipe, RunFolder(tmp_path / "run"))
    pairs_file.unlink()
    assert prepare(recipe, RunFolder(tmp_path / "run")) == first


def test_nothing_left_says_which_rule_dropped_how_many(tmp_path, pairs_file):
    write_jsonl(tmp_path / "ties.jsonl", [{"prompt": "a", "chosen": "x", "rejected": "x"}] * 3)
    recipe = recipe_of(tmp_path, sft=[{"path": "pairs.jsonl.gz"}], preferences=[{"path": "ties.jsonl"}])
    with pytest.raises(UserError, match=r"data.preferences\[0\]: of 3 rows none is left \(tie: 3\)"):
        prepare(recipe, RunFolder(tmp_path / "run"))


def test_a_role_that_was_not_prepared_is_named(tmp_path):
    with pytest.raises(UserError, match="judge_train.parquet is not there"):
        read_role(RunFolder(tmp_path), "judge_train")


BUILDER = """
from datasets import Dataset
def build(root, seed, count=40):
    texts = {"prompt": [f"Say {i}" for i in range(count)], "response": [f" it is {i}" for i in range(count)]}
    scores = texts | {"score": [float(i % 7) for i in range(count)]}
    return {"sft": Dataset.from_dict(texts), "preferences": Dataset.from_dict(scores),
            "judge": Dataset.from_dict(scores), "preferences_eval_short": Dataset.from_dict(scores),
            "prompts": Dataset.from_dict({"prompt": [f"Say {i}" for i in range(count)]}),
            "eval_prompts": Dataset.from_dict({"prompt": ["Say 1", "Say more"]})}
def misnamed(root, seed):
    return {"sfd": Dataset.from_dict({"text": ["a"]})}
"""


@pytest.fixture
def builder_module(tmp_path, monkeypatch):
    (tmp_path / "my_builder.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_builder"
    sys.modules.pop("my_builder", None)


def test_prepare_with_a_builder_scores_and_a_judge(tmp_path, builder_module):
    recipe = recipe_of(tmp_path, builder="my_builder:build", builder_args={"count": 50})
    section = {"max_length": 96, "objective": "scores"}
    stages = {"fluency": {"max_length": 96}, "reward": section, "judge": section | {"base": "fluency"}}
    recipe = Recipe.model_validate(recipe.model_dump() | stages)
    assert check_data(recipe) == []
    summary = prepare(recipe, RunFolder(tmp_path / "run"))
    judge = read_role(RunFolder(tmp_path / "run"), "judge_train")
    assert judge.column_names == ["prompt", "response", "score"] and isinstance(judge[0]["score"], float)
    prompts = read_role(RunFolder(tmp_path / "run"), "prompts")["prompt"]
    assert "Say 1" not in prompts and len(prompts) == 49
    assert len(read_role(RunFolder(tmp_path / "run"), "reward_eval_short")) == 50
    assert summary["sources"]["prompts_not_in_eval"][0]["dropped"] == {"in_eval_prompts": 1}


def test_a_builders_mistakes_are_named(tmp_path, builder_module):
    with pytest.raises(UserError, match=r"returned a role 'sfd'.*did you mean 'sft'"):
        prepare(recipe_of(tmp_path, builder="my_builder:misnamed"), RunFolder(tmp_path / "run"))
    for changes, message in (
        ({"builder": "my_builder:biuld"}, "did you mean 'build'"),
        ({"builder": "no_such_module:build"}, "could not be imported"),
        ({"builder": "my_builder:build", "builder_args": {"counts": 3}}, "unexpected keyword argument 'counts'"),
        ({"builder": "my_builder:build", "sft": [{"path": "a.jsonl"}]}, "both set"),
    ):
        problems = check_data(recipe_of(tmp_path, **changes))
        assert len(problems) == 1 and message in problems[0]


def test_the_doctor_sees_every_data_problem_at_once(tmp_path, pairs_file):
    write_jsonl(tmp_path / "scored.jsonl", [{"prompt": "a", "response": "b", "score": 1}])
    recipe = recipe_of(
        tmp_path,
        sft=[{"path": "missing.jsonl"}, {"path": "pairs.jsonl.gz"}],
        preferences=[{"path": "scored.jsonl"}],
        prompts=[{"path": "pairs.jsonl.gz", "columns": {"prompt": "promt"}}],
    )
    problems = check_data(recipe)
    assert len(problems) == 3
    for problem, words in zip(problems, ("missing.jsonl", "objective: scores", "no column 'promt' for prompt"), strict=True):
        assert words in problem
    assert "not a folder" in check_data(recipe_of(tmp_path / "nowhere"))[0]
    assert len(check_data(recipe_of(tmp_path))) == 2  # no sft rows, no preferences
    assert not (tmp_path / "data").exists()


def test_a_hub_that_cannot_be_reached_is_said_in_words(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing.*data.root"):
        load_source(SourceConfig(path="nobody/nothing"), None, 0, "data.sft[0]", "sft")


def test_prompts_are_read_and_counted_without_the_library_of_data_sets(tmp_path):
    folder = RunFolder(tmp_path)
    write_role(folder, "prompts", [{"prompt": "a"}, {"prompt": "café\n"}, {"prompt": ""}], ("prompt",))
    code = (
        "import sys; from pathlib import Path; from rlhf_ray.data.store import count_rows, read_prompts\n"
        "from rlhf_ray.runs.run_folder import RunFolder; folder = RunFolder(Path(sys.argv[1]))\n"
        "assert read_prompts(folder) == ['a', 'café\\n', ''] and count_rows(folder, 'prompts') == 3\n"
        "assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for read in (read_prompts, count_rows):
        with pytest.raises(UserError, match="eval_prompts.parquet is not there .the run folder holds prompts"):
            read(folder, "eval_prompts")


def test_check_model_compares_lengths_with_positions(tmp_path, tokenizer):
    GPT2Config(n_positions=64).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    recipe = Recipe(name="t", model={"name_or_path": str(tmp_path)}, sft={"max_length": 64}, reward={"max_length": 80})
    problems = check_model(recipe)
    assert [problem.split(" ")[0] for problem in problems] == ["data.max_prompt_tokens", "reward.max_length"]
    assert "112 tokens is longer than the model's 64 positions" in problems[0]
    assert "there is no folder 'nobody/nothing' here" in check_model(recipe.model_copy(update={"model": recipe.model.model_copy(
        update={"name_or_path": "nobody/nothing"})}))[-1]  # fmt: skip


def test_rows_read_back_are_the_rows_written(tmp_path, pairs_file):
    recipe = recipe_of(tmp_path, sft=[{"path": "pairs.jsonl.gz"}], preferences=[{"path": "pairs.jsonl.gz"}])
    prepare(recipe, RunFolder(tmp_path / "run"))
    rows = read_role(RunFolder(tmp_path / "run"), "reward_train")
    assert isinstance(rows, Dataset)
    for row in rows:
        number = row["prompt"].removeprefix("Question ").removesuffix("?")
        assert row == {
            "prompt": f"Question {number}?",
            "chosen": f" good answer {number}",
            "rejected": f" bad {number}",
        }


def test_a_row_that_the_template_refuses_is_dropped_and_counted(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    )
    system = {"role": "system", "content": "Be kind."}
    rows = [{"messages": [system, USER, reply("Fine.")]}, {"messages": [USER, reply("Fine.")]}]
    tally = Tally()
    normalised = normalise(rows, {"messages": "messages"}, "sft", ChatFormat(chat_tokenizer))
    assert len(apply_rules(normalised, "sft", limits_of(chat_tokenizer), tally)) == 1
    assert tally.dropped == {"refused_by_template": 1}


def test_prompts_of_preferences_without_a_reward_model(tmp_path, pairs_file):
    recipe = recipe_of(tmp_path, sft=[{"path": "pairs.jsonl.gz"}], preferences=[{"path": "pairs.jsonl.gz"}])
    changes = {"reward": None, "ppo": {"reward_function": "m:f", "critic_init": "sft"}}
    recipe = Recipe.model_validate(recipe.model_dump() | changes)
    assert check_data(recipe) == []
    summary = prepare(recipe, RunFolder(tmp_path / "run"))
    assert set(summary["roles"]) == {"sft_train", "sft_eval", "prompts", "eval_prompts"}
    assert summary["sources"]["preferences"][0]["kept"] == 62  # a tie or an empty reply is a prompt all the same


def test_dpo_gets_its_pairs_where_there_is_no_reward_model(tmp_path):
    rows = [
        {"prompt": f"Question {i}?", "chosen": " good", "rejected": " bad" * (1 + 40 * (i == 7))} for i in range(30)
    ]
    source = [{"path": write_jsonl(tmp_path / "pairs.jsonl", rows).name}]
    values = recipe_of(tmp_path, sft=source, preferences=source).model_dump()
    values |= {"reward": None, "ppo": {"reward_function": "a:b", "critic_init": "sft"}}
    with_dpo = values | {"dpo": {"max_length": 12}}
    summary = prepare(Recipe.model_validate(with_dpo), RunFolder(tmp_path / "run"))
    pairs = read_role(RunFolder(tmp_path / "run"), "reward_train")
    assert pairs.column_names == ["prompt", "chosen", "rejected"]
    assert summary["sources"]["preferences"][0]["dropped"] == {"over_long": 1}  # the one reply of more than 12 tokens
    assert "reward_train" not in prepare(Recipe.model_validate(values), RunFolder(tmp_path / "none"))["roles"]
    empty = with_dpo | {"data": values["data"] | {"preferences": ()}}
    assert check_data(Recipe.model_validate(empty)) == [
        "'dpo' is set and data.preferences is empty; give it rows, or set dpo: null"
    ]
    write_jsonl(tmp_path / "scored.jsonl", [{"prompt": "a", "response": "b", "score": 1}])
    scored = with_dpo | {"data": values["data"] | {"preferences": ({"path": "scored.jsonl"},)}}
    (problem,) = check_data(Recipe.model_validate(scored))
    assert "or give pairs, which DPO needs" in problem


def test_a_long_plain_text_stays_and_is_counted_unless_it_is_packed(tokenizer):
    for plain_text, kept, cut, dropped in (
        ("trainer_cuts", 2, {"text": 1}, {}),
        ("packed", 2, {}, {}),
        ("dropped", 1, {}, {"over_long": 1}),
    ):
        rows = [{"prompt": "", "response": text, "messages": None} for text in (TEXT * 9, "the cat")]
        tally = Tally()
        assert len(apply_rules(rows, "sft", limits_of(tokenizer, plain_text=plain_text), tally)) == kept
        assert (tally.cut, tally.dropped) == (cut, dropped)

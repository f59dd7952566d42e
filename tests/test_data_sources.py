"""The data stage: where rows come from, and the forms that their columns have."""

import csv
import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_rows import USER, one, reply, write_jsonl

from rlhf_ray.config import DataConfig, SourceConfig
from rlhf_ray.data.formats import detect, implicit_prompt
from rlhf_ray.data.locate import HubName, locate
from rlhf_ray.data.paths import resolve_paths
from rlhf_ray.data.sources import columns_of, load_source
from rlhf_ray.errors import UserError

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
        # A pair that lacks one side: `rules` drops and counts it.
        (
            {"prompt": [USER], "chosen": None, "rejected": [reply("Bad.")]},
            "pairs",
            {"prompt": "User: How are you?\n\nAssistant:", "chosen": "", "rejected": " Bad."},
        ),
        ({"chosen": None, "rejected": [reply("Bad.")]}, "pairs", {"prompt": "", "chosen": "", "rejected": " Bad."}),
        (
            {"messages": [{"role": "User", "content": "Hi"}, {"role": "ASSISTANT", "content": "Yo"}]},
            "sft",
            {"prompt": "User: Hi\n\nAssistant:", "response": " Yo"},
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

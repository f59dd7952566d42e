"""Values of the wrong kind, wherever they stand, are told with file and row before a run starts: by doctor and by run."""

import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import rlhf_ray
from datasets import Dataset

from rlhf_ray.config import SourceConfig
from rlhf_ray.data.sources import check_rows, load_source
from rlhf_ray.errors import UserError

GOOD = {
    "sft": {"prompt": "Name a colour.", "response": " Blue."},
    "pairs": {"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " No."},
    "scores": {"prompt": "Name a colour.", "response": " Blue.", "score": 1.5},
    "prompts": {"prompt": "Name a colour."},
}
USER, REPLY = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}
WRONG = [
    ("sft", {"response": 5}, r"'response' is a number \(5\), and should be text.*write it in quotes"),
    ("sft", {"prompt": 5.0}, r"'prompt' is a number \(5.0\)"),
    ("sft", {"response": True}, r"'response' is true or false \(true\)"),
    ("sft", {"response": {"text": "a"}}, "'response' is an object"),
    ("sft", {"response": ["a", "b"]}, r"'response' has text \('a'\) as item 1"),
    ("sft", {"prompt": [{"role": "user", "content": 5}]}, r"'prompt' has a number \(5\) as the content of message 1"),
    ("sft", {"prompt": [{"role": "user", "text": "Hi."}]}, r"'prompt' has no content in message 1 \(its keys are role, text\)"),
    ("sft", {"prompt": [{"role": 1, "content": "a"}]}, r"'prompt' has a number \(1\) as the role of message 1"),
    ("sft", {"prompt": [{"role": "user", "content": [{"text": 1}]}]}, r"'prompt' has a number \(1\) as the content"),
    ("sft", {"prompt": [USER, {"content": "Hello!"}]}, r"'prompt' has no role in message 2 \(its keys are content\)"),
    ("sft", {"prompt": [{"role": None, "content": "a"}]}, r"'prompt' has no role in message 1"),
    (
        "sft",
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {}}],
                }
            ]
        },
        "'prompt' has a part of type 'image_url' in message 1, and only text is read",
    ),
    ("pairs", {"chosen": 2}, r"'chosen' is a number \(2\)"),
    ("pairs", {"rejected": [1]}, r"'rejected' has a number \(1\) as item 1"),
    ("pairs", {"chosen": [REPLY]}, "'chosen' is a list and 'rejected' is text"),
    ("scores", {"score": "good"}, r"'score' is text \('good'\), and should be a number"),
    ("scores", {"score": "NA"}, r"'score' is text \('NA'\)"),
    ("scores", {"score": True}, "'score' is true or false"),
    ("scores", {"score": [1]}, "'score' is a list"),
    ("scores", {"score": 10**400}, r"'score' is a number \(of 401 digits\), which is not a finite number"),
    ("prompts", {"prompt": 7}, r"'prompt' is a number \(7\)"),
    ("prompts", {"prompt": {"a": 1}}, "'prompt' is an object"),
]


def jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("form", "change", "says"), WRONG)
def test_a_value_of_another_kind_is_told_with_its_line(tmp_path, form, change, says):
    path = jsonl(tmp_path / "a.jsonl", [GOOD[form], GOOD[form] | change])
    with pytest.raises(UserError, match=rf"^data.x\[0\]: '.*a.jsonl', line 2: {says}"):
        load_source(SourceConfig(path=path), None, 0, "data.x[0]", form)


def test_what_is_missing_or_fits_is_no_mistake(tmp_path):
    for form, changes in {
        "sft": [{"prompt": [USER]}, {"response": [REPLY]}, {"response": None}, {"prompt": None}],
        "pairs": [{"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY]}, {"prompt": [USER]}],
        "scores": [{"score": "2.5"}, {"score": None}, {"score": float("nan")}, {"score": -3}, {"score": ""}],
        "prompts": [{"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]}, {"prompt": ""}],
    }.items():
        path = jsonl(tmp_path / f"{form}.jsonl", [GOOD[form] | change for change in changes])
        assert len(load_source(SourceConfig(path=path), None, 0, "data.x[0]", form)) == len(changes)
    messages = [{"messages": [USER, REPLY]}, {"messages": [USER, REPLY | {"content": None, "tool_calls": [{"id": "a"}]}]}]
    path = jsonl(tmp_path / "messages.jsonl", messages)
    assert len(load_source(SourceConfig(path=path), None, 0, "data.x[0]", "sft")) == 2


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1, 2], r"'response' is a number \(1\)"),
        ([datetime.date(2024, 1, 1)] * 2, r"'response' is a date \(2024-01-01\)"),
        ([b"a", b"b"], "'response' is a bytes"),
        ([[1], [2]], r"'response' has a number \(1\) as item 1"),
        ([{"a": 1}, {"a": 2}], "'response' is an object"),
        ([None, True], r"row 2: 'response' is true or false"),
    ],
)
def test_columns_of_parquet_that_are_no_text_are_told(tmp_path, values, says):
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": values}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a.parquet', row \d: .*{says.removeprefix('row 2: ')}"):
        load_source(SourceConfig(path=str(tmp_path / "a.parquet")), None, 0, "data.x[0]", "sft")


@pytest.mark.parametrize(
    ("form", "columns", "says"),
    [
        ("sft", {"messages": json.dumps([USER, REPLY])}, "row 1: 'messages' is text .* chat messages: a list"),
        ("prompts", {"conversations": json.dumps([USER])}, "row 1: 'conversations' is text"),
        ("scores", {"response": "a", "score": "good"}, r"row 1: 'score' is text \('good'\), and should be a number"),
        ("scores", {"response": "a", "score": "1_000"}, r"row 1: 'score' is text \('1_000'\), and should be a number"),
        ("pairs", {"chosen": "a", "rejected": [REPLY]}, "row 1: 'chosen' is text .* and 'rejected' is a list"),
    ],
)
def test_parquet_text_is_right_only_where_text_is(tmp_path, form, columns, says):
    pq.write_table(pa.table({name: [value] for name, value in columns.items()}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=says):
        load_source(SourceConfig(path=str(tmp_path / "a.parquet")), None, 0, "data.x[0]", form)


def test_numbers_that_parquet_holds_as_text_are_numbers(tmp_path):
    pq.write_table(pa.table({"response": ["a", "b"], "score": ["1.5", ""]}), tmp_path / "a.parquet")
    assert len(load_source(SourceConfig(path=str(tmp_path / "a.parquet")), None, 0, "data.x[0]", "scores")) == 2


def test_rows_of_a_builder_are_looked_at_too():
    rows = Dataset.from_dict({"prompt": ["a"], "response": [3]})
    with pytest.raises(UserError, match=r"^mine:build \(sft\): .*row 1: 'response' is a number \(3\)"):
        check_rows(rows, SourceConfig(path="mine:build#sft"), "mine:build (sft)", "sft", with_prompts=False)


def test_columns_that_stay_with_the_prompts_have_one_type(tmp_path):
    for values, says in (
        (["4", 4], r"line 2: the column 'answer' holds a number here, and text in the row before .*line 1"),
        ([1, 2**70], r"line 2: the column 'answer' holds a number beyond 64 bits"),
        ([True, "yes"], r"line 2: the column 'answer' holds text here, and true or false"),
    ):
        path = jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{value}", "answer": value} for value in values])
        with pytest.raises(UserError, match=says):
            load_source(SourceConfig(path=path), None, 0, "data.prompts[0]", "prompts", with_prompts=True)
        assert len(load_source(SourceConfig(path=path), None, 0, "data.sft[0]", "prompts")) == 2  # nobody gets the column
    path = jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2.5}, {"prompt": "c"}])
    assert len(load_source(SourceConfig(path=path), None, 0, "data.prompts[0]", "prompts", with_prompts=True)) == 3


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a", "chosen": 2, "rejected": "b"}', "line 31: 'chosen' is a number (2)"),
        ('{"prompt": "a", "chosen": ', "line 31: is not JSON"),
        ('{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}', "line 31: the key 'prompt' stands there twice"),
        ('{"prompt": "\\ud800", "chosen": "c", "rejected": "d"}', "line 31: holds half of a character"),
    ],
)
@pytest.mark.parametrize("command", ["doctor", "run"])
def test_doctor_and_run_tell_of_a_line_far_down_before_anything_starts(tmp_path, command, line, says):
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(30)]
    path = jsonl(tmp_path / "pairs.jsonl", rows)
    with open(path, "a") as file:
        file.write(line + "\n")
    recipe = {"name": "r", "data": {"sft": [{"path": path}], "preferences": [{"path": path}]}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    answer = rlhf_ray(command, str(tmp_path / "r.yaml"), "--run-dir", str(tmp_path / "run"))
    assert answer.returncode == 2 and "Traceback" not in answer.stdout + answer.stderr
    assert f"data.preferences[0]: '{path}', {says}" in answer.stderr
    assert not (tmp_path / "run").exists()


def test_which_column_is_chosen_is_never_guessed(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"question": "q", "better": "a", "worse": "b"}])
    for columns, missing in (
        ({}, "no column 'chosen', 'rejected'; there are question, better, worse"),
        ({"chosen": "best"}, "no column 'best' for chosen; no column 'rejected'; there are question, better, worse"),
        ({"chosen": "better", "rejected": "better"}, "'better' stands for two names"),
    ):
        with pytest.raises(UserError) as told:
            load_source(SourceConfig(path=path, columns=columns), None, 0, "data.preferences[0]", "pairs")
        assert missing in str(told.value)
        assert "nearest" not in str(told.value) and "chosen: worse" not in str(told.value)

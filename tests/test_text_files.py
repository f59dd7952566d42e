"""Files of rows: what is written is what is read, and what is broken is one sentence with the file and its line."""

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from rlhf_ray.config import SourceConfig
from rlhf_ray.data.sources import load_source
from rlhf_ray.data.text_files import read_text_files
from rlhf_ray.errors import UserError

#: what pandas, which read these files once, takes for a missing value, a number, a boolean or a date
LOOKALIKES = [
    "NA", "N/A", "null", "None", "nan", "NaN", "n/a", "", "2", "00501", "1e5", "-0", "inf", "True", "false", "2024-01-01",
    "2024-01-01T12:00:00Z", "0x10", "1,5", "1_000", " 7 ", "[1]", '{"a": 1}', "=1+1",
]  # fmt: skip


def read(path, form="sft", **source):
    return list(load_source(SourceConfig(path=str(path), **source), None, 0, "data.sft[0]", form))


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return sink.getvalue().to_pybytes()


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize(("name", "delimiter"), [("rows.csv", ","), ("rows.tsv", "\t"), ("rows.csv.gz", ",")])
def test_a_cell_is_text_whatever_it_looks_like(tmp_path, name, delimiter):
    with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wt", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["prompt", "response", "answer"], *([text, text, text] for text in LOOKALIKES)])
    assert read(tmp_path / name) == [{"prompt": text, "response": text, "answer": text} for text in LOOKALIKES]


def test_text_in_json_is_text_whatever_it_looks_like(tmp_path):
    rows = [{"prompt": text, "response": "2024-01-01", "answer": "2024-01-01"} for text in LOOKALIKES]
    for name, text in (("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)), ("b.json", json.dumps(rows, indent=1))):
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name) == rows


def test_columns_of_numbers_in_csv_are_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("text,score,label,rating\nx,4,1,5\ny,-2.5,0,\n")
    assert [(row["score"], row["label"], row["rating"]) for row in read(tmp_path / "a.csv", "scores")] == [
        (4, 1, "5"), (-2.5, 0, ""),
    ]  # fmt: skip
    renamed = read(tmp_path / "a.csv", "scores", columns={"score": "rating"})
    assert [row["rating"] for row in renamed] == [5, None]
    (tmp_path / "b.csv").write_text("text,label\nx,positive\ny,1\n")
    assert [row["label"] for row in read(tmp_path / "b.csv")] == ["positive", "1"]


def test_packings_are_told_from_their_first_bytes_and_long_lines_are_read(tmp_path):
    rows = [{"text": "é" * 3_000_000}, {"text": "x"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    table = f"text\n{rows[0]['text']}\nx\n".encode()
    for ending, pack in PACKED.items():
        for name, content in ((f"a.jsonl{ending}", lines), (f"a.csv{ending}", table), (f"named_{ending[1:]}.jsonl", lines)):
            (tmp_path / name).write_bytes(pack(content))
            assert read(tmp_path / name) == rows, name


def test_several_files_a_mark_at_the_start_and_empty_ones(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one", "id": 1}\r\n\r\n')
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.jsonl").write_text('{"text": "two"}')
    assert read(tmp_path / "*.jsonl") == [{"text": "one", "id": 1}, {"text": "two", "id": None}]
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbftext\r\none\r\n\r\ntwo\r\n")
    assert read(tmp_path / "d.csv") == [{"text": "one"}, {"text": "two"}]
    (tmp_path / "e.txt").write_bytes("one\u2028half\r\n\r\ntwo".encode())
    assert [row["text"] for row in read(tmp_path / "e.txt")] == ["one\u2028half", "", "two"]


def test_a_sample_is_what_the_library_of_data_sets_draws(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{number}"}}\n' for number in range(1000)))
    expected = Dataset.from_dict({"text": [str(number) for number in range(1000)]}).shuffle(seed=7).select(range(50))
    source = SourceConfig(path=str(tmp_path / "a.jsonl"), max_rows=50)
    assert list(load_source(source, None, 7, "x", "sft")) == expected.to_list()


GOOD = b'{"text": "hello"}\n'
BROKEN = {
    "lines.jsonl": (GOOD + b'{"text": "a\n', "line 2: is not JSON"),
    "cut.jsonl": (GOOD + b'{"text": "a', "line 2: is not JSON"),
    "twice.jsonl": (GOOD + b'{"text": "a", "text": "b"}\n', "line 2: the key 'text' stands there twice"),
    "deep_twice.jsonl": (b'{"text": "a", "meta": {"x": 1, "x": 1}}\n', "line 1: the key 'x' stands there twice"),
    "half.jsonl": (GOOD + b'{"text": "\\ud83d!"}\n', r"line 2: holds half of a character .*ud83d"),
    "half_key.jsonl": (b'{"text\\uDE00": "a"}\n', r"line 1: holds half of a character .*ude00"),
    "list.jsonl": (GOOD + b"[1]\n", "line 2: is a list, not an object"),
    "word.jsonl": (b'"text"\n', "line 1: is text"),
    "digits.jsonl": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "line 1: can't be read"),
    "nested.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", "line 1: can't be read"),
    "list.json": (b'[\n{"text": "a"},\n{"text": 1', "line 3: is not JSON"),
    "open.json": (b'[\n{"text": "a"}\n', "line 3: is not JSON"),
    "latin.jsonl": (GOOD + '{"text": "caf\u00e9"}\n'.encode("latin-1"), "line 2: byte 0xe9 at place 14 is not UTF-8"),
    "wide.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "wide_unmarked.jsonl": ('{"text": "a"}\n'.encode("utf-16-le"), "line 1: holds a NUL byte"),
    "nul.jsonl": (GOOD + b"\0" * 40, "line 2: holds a NUL byte"),
    "latin.csv": ("text\none\ncaf\u00e9\n".encode("cp1252"), "line 3: byte 0xe9 at place 4 is not UTF-8"),
    "nul.csv": (b"text\na\0b\n", "line 2: holds a NUL byte"),
    "nul.txt": (b"one\na\0b\n", "line 2: holds a NUL byte"),
    "many.csv": (b"text,id\na,1\nb,2,3\n", "line 3: has 3 cells, and the header has 2"),
    "few.csv": (b"text,id\na,1\nb\n", "line 3: has 1 cells"),
    "quote.csv": (b'text,id\n"a\nb",1\n"c,2\nd,3\n', "line 4: is not CSV"),
    "header.csv": (b"text,text\na,b\n", "line 1: two columns are called 'text'"),
    "table.csv": (b"PK\x03\x04\x14\xff\xfe", "is a ZIP archive or an Excel file"),
    "none.jsonl.gz": (GOOD, "is named like a gzip file and is none"),
    "cut.parquet": (b"PAR1" + b"\x15" * 100, "could not be read"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of Git LFS"),
    "pointer.parquet": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a pointer of Git LFS",
    ),
    "empty.jsonl": (b"", "has no rows"),
    "header_only.csv": (b"text\n", "has no rows"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_with_its_name_and_line(tmp_path, name):
    content, says = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^data.sft\[0\]: '.*{name}',? {says}"):
        read(tmp_path / name)


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt", "parquet"])
def test_a_packed_file_that_is_cut_off_or_damaged_is_told(tmp_path, ending, kind):
    content = "".join(f'{{"text": "{number * 7919}"}}\n' for number in range(5000)).encode()
    whole = PACKED[ending](content)
    for cut in (whole[:30], whole[: len(whole) // 2], whole[:-3]):
        (tmp_path / f"cut.{kind}{ending}").write_bytes(cut)
        with pytest.raises(UserError, match=rf"cut.{kind}{ending}' could not be read .*damaged"):
            read(tmp_path / f"cut.{kind}{ending}")


def test_parquet_that_is_cut_is_told_and_categories_are_their_texts(tmp_path):
    texts = pa.array(["NA", "2", "NA"]).dictionary_encode()
    pq.write_table(pa.table({"prompt": texts, "response": texts}), tmp_path / "a.parquet")
    assert [row["response"] for row in read(tmp_path / "a.parquet")] == ["NA", "2", "NA"]
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"cut.parquet' could not be read .*no Parquet file"):
        read(tmp_path / "cut.parquet")
    bad = pa.array([b"ok", b"caf\xe9"]).cast(pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, bad.buffers())}), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"bad.parquet' holds text that is not UTF-8"):
        read(tmp_path / "bad.parquet")


def test_what_is_no_file_is_told(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    for path in (tmp_path / "rows.jsonl", tmp_path / "*.jsonl", tmp_path / ("x" * 300 + ".jsonl")):
        with pytest.raises(UserError, match=r"^data.sft\[0\]: "):
            read(path)


def test_what_is_there_and_can_not_be_read_is_not_told_to_be_missing(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for name, says in (("pipe.jsonl", "is no file and no folder"), ("link.jsonl", "is a link that leads nowhere")):
        with pytest.raises(UserError, match=f"{name}' {says}"):
            read(tmp_path / name)


def test_columns_of_one_name_in_parquet_are_told(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet': two columns are called 'text'"):
        read(tmp_path / "a.parquet")


DIALOGUE = [{"role": "user", "content": "it's"}, {"role": "assistant", "content": 'so "be" it'}]


@pytest.mark.parametrize("written", [json.dumps, repr, lambda messages: json.dumps(messages, indent=1)])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_messages_that_are_written_out_as_text_are_no_text(tmp_path, written, kind):
    """As spreadsheets and databases keep them. They would be trained on with braces and quotes, and no turn would end."""
    rows = [{"chosen": written(DIALOGUE), "rejected": written(DIALOGUE[:1])}] * 3
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["chosen", "rejected"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(
        UserError, match=r"(line 1|line 2|row 1): 'chosen' holds chat messages that are written out as text"
    ):
        read(path, "pairs")


def test_a_reply_that_is_such_a_list_is_a_reply_where_others_are_none(tmp_path):
    rows = [{"prompt": "As JSON?", "response": json.dumps(DIALOGUE)}, {"prompt": "And now?", "response": "Fine."}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path / "a.jsonl") == rows


def test_the_place_of_a_row_is_its_file_and_line(tmp_path):
    (tmp_path / "a.csv").write_text('text\n"two\nlines"\nb\n')
    (tmp_path / "b.csv").write_text("text\nc\n")
    rows = read_text_files("csv", [("A", str(tmp_path / "a.csv")), ("B", str(tmp_path / "b.csv"))], "x")
    assert [rows.place(index) for index in range(3)] == ["'A', line 2", "'A', line 4", "'B', line 2"]
    assert np.array_equal(rows.lines, [2, 4, 2])


OPENS = """
import json, os, sys, time
from pathlib import Path
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from rlhf_ray.config import Recipe
from rlhf_ray.data.data_problems import check_data
from rlhf_ray.data.prepare import prepare
from rlhf_ray.runs.run_folder import RunFolder

folder = Path(sys.argv[1])
def counts():
    found = {name: sum(path.endswith(name) for path in opened) for name in ("a.jsonl", "b.csv")}
    opened.clear()
    return found

recipe = Recipe.model_validate({
    "name": "r", "reward": {"objective": "scores", "max_length": 64}, "ppo": {"critic_init": "sft"}, "sft": {"max_length": 64},
    "model": {"from_scratch": {"layers": 1, "width": 16, "heads": 1, "positions": 256, "vocab_size": 300}},
    "data": {"sft": [{"path": str(folder / "a.jsonl")}], "preferences": [{"path": str(folder / "b.csv"), "max_rows": 30}],
             "max_prompt_tokens": 32},
    "generation": {"max_new_tokens": 8},
})
assert check_data(recipe) == []
print(json.dumps(counts()))
first = prepare(recipe, RunFolder(folder / "one"))["sources"]
print(json.dumps(counts()))
prepare(recipe, RunFolder(folder / "two"))  # nothing is kept any more
print(json.dumps(counts()))
assert check_data(recipe) == []
(folder / "a.jsonl").write_text((folder / "a.jsonl").read_text().replace("answer", "ANSWER"))  # as long, and another time
os.utime(folder / "a.jsonl", (1, 1))
counts()
again = prepare(recipe, RunFolder(folder / "three"))["sources"]
print(json.dumps(counts()))
import pyarrow.parquet as pq
assert first == again and "ANSWER" in str(pq.read_table(folder / "three" / "data" / "sft_train.parquet").to_pylist())
"""


def test_a_file_is_read_once_for_the_check_and_the_preparation(tmp_path):
    """Python itself counts: its event "open". A file that has changed since the check is read again."""
    replies = [json.dumps({"prompt": f"q{i} ", "response": f"answer {i}"}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(replies))
    (tmp_path / "b.csv").write_text("prompt,response,score\n" + "".join(f"q{i},r{i},{i % 3}\n" for i in range(40)))
    done = subprocess.run([sys.executable, "-c", OPENS, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    both, none = {"a.jsonl": 1, "b.csv": 1}, {"a.jsonl": 0, "b.csv": 0}
    assert [json.loads(line) for line in done.stdout.splitlines()] == [both, none, both, {"a.jsonl": 1, "b.csv": 0}]

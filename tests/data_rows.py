"""Rows, tokenizers and recipes of the data stage's tests."""

import gzip
import json

import pytest

from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.formats import detect, normalise
from rlhf_ray.data.rules import RowLimits
from rlhf_ray.data.tokens import encode_pairs
from rlhf_ray.models.tokenizer import load_tokenizer, train_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog and the cat sat on the mat while people asked how to cook rice"


@pytest.fixture(name="tokenizer", scope="module")
def data_tokenizer():
    return train_tokenizer([TEXT] * 20, 400)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def limits_of(tokenizer, **changes):
    settings_ = {"max_prompt_tokens": 20, "max_length": 60, "truncate_prompt": "left"} | changes
    return RowLimits(tokenizer=tokenizer, chat=ChatFormat(tokenizer), **settings_)


def encode_pair(tokenizer, prompt, response):
    return encode_pairs(tokenizer, [prompt], [response])[0]


PLAIN = ChatFormat(None)
USER = {"role": "user", "content": "How are you?"}


def reply(text):
    return {"role": "assistant", "content": text}


def one(row, role, chat=PLAIN):
    out = normalise([row], detect(list(row), {}, role, "x"), role, chat)[0]
    return {name: value for name, value in out.items() if name not in ("key", "messages", "columns")}


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(name="chat_tokenizer")
def data_chat_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "chat")
    loaded = load_tokenizer(tmp_path / "chat")
    loaded.chat_template = CHATML
    return loaded

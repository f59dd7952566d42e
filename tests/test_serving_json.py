"""JSON by request: what comes out is read by Python's json, jsonschema and OpenAI's client, and drawn as brute force draws it."""

from __future__ import annotations

import json
import sys
from typing import Literal

import jsonschema
import numpy as np
import pytest
import torch
from pydantic import BaseModel
from served_app import ask, send, served_tiny, tiny_folder  # noqa: F401 - fixtures

from rlhf_ray.config.sampling_params import TokenRules
from rlhf_ray.errors import UserError
from rlhf_ray.generation.json_text import JsonGrammars
from rlhf_ray.generation.request_rules import RequestRules
from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.models.tokenizer import load_tokenizer, word_tokenizer

pytest.importorskip("llguidance", reason="the package llguidance (extra 'json') is not installed")

PROMPT = {"model": "tiny", "prompt": "the cat", "max_tokens": 80}
SHORT = {"type": "string", "maxLength": 4}
SCHEMAS = [
    {"enum": ["sat on the mat", 7, None]},
    {
        "type": "object",
        "properties": {"name": SHORT, "ok": {"type": "boolean"}, "legs": {"type": "integer", "minimum": 0, "maximum": 12}},
        "required": ["name", "ok", "legs"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/word"}]}, "minItems": 1, "maxItems": 3,
     "$defs": {"word": {"type": "string", "pattern": "^[a-d]{1,3}$"}}},
]  # fmt: skip


def asking(schema, **more):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}, **more}


@pytest.mark.parametrize("schema", SCHEMAS, ids=["enum", "object", "array"])
def test_an_answer_fits_its_schema_however_it_is_drawn(served, schema):
    ways = [{"temperature": 0}, {"temperature": 2, "seed": 3, "n": 4}, {"top_k": 2, "seed": 1}, {"top_p": 0.3, "seed": 2},
            {"repetition_penalty": 3.0, "logit_bias": {"5": 100}, "seed": 4}]  # fmt: skip
    for way in ways:
        for choice in send(served, "POST", "/v1/completions", json=PROMPT | asking(schema) | way).json()["choices"]:
            assert choice["finish_reason"] == "stop", choice
            value = json.loads(choice["text"])
            jsonschema.validate(value, schema)
            assert json.dumps(value, ensure_ascii=False) == choice["text"] or "\\" in choice["text"], "spaced as json.dumps does"


def test_the_likeliest_answer_is_the_one_of_brute_force(served, folder):
    """Of all tokens that keep the text a beginning of 'true' or 'false', the likeliest; then the likeliest end."""
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    ids, text = tokenizer.encode("the cat"), ""
    while text not in ("true", "false"):
        with torch.no_grad():
            likely = model(torch.tensor([ids])).logits[0, -1].double()
        fits = [
            token for token in range(len(tokenizer))
            if (piece := tokenizer.decode([token])) and any(word.startswith(text + piece) for word in ("true", "false"))
        ]  # fmt: skip
        ids.append(max(fits, key=lambda token: float(likely[token])))
        text += tokenizer.decode(ids[-1:])
    answer = send(served, "POST", "/v1/completions", json=PROMPT | asking({"type": "boolean"}, temperature=0)).json()
    assert answer["choices"][0]["text"] == text


def test_openais_client_parses_an_answer_into_its_own_types(served):
    class Animal(BaseModel):
        kind: Literal["cat", "dog"]
        asleep: bool

    async def talk(client):
        request = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 60, "seed": 1}
        parsed = await client.chat.completions.parse(**request, response_format=Animal)
        whole = await client.chat.completions.create(**request, response_format={"type": "json_object"})
        stream = await client.chat.completions.create(**request, response_format={"type": "json_object"}, stream=True)
        return parsed, whole, "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    parsed, whole, streamed = ask(served, talk)
    assert isinstance(parsed.choices[0].message.parsed, Animal)
    assert whole.choices[0].message.content == streamed and streamed.startswith("{")


@pytest.mark.parametrize(
    "extra",
    [
        asking({"type": "nonsense"}),
        asking({"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/a.json"}}}),  # nothing is fetched
        asking({"enum": []}),
        asking({"type": "string", "pattern": "(a"}),
        asking({"allOf": [{"$ref": "#"}]}),  # never ends
        asking({"type": "boolean"}, ignore_eos=True),
        asking({"type": "boolean"}, min_tokens=3),
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}},
        {"response_format": {"type": "grammar"}},
    ],
)
def test_what_can_not_be_followed_is_refused(served, extra):
    error = send(served, "POST", "/v1/completions", json=PROMPT | extra).json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"].startswith("response_format"), error


def test_a_schema_that_takes_more_work_than_the_library_does_for_a_token_costs_its_sender_alone(served):
    """It is refused or, where the library gives up later, its answer is cut; the step that it is in goes on."""
    pattern = {"type": "string", "pattern": f"^({'a?' * 2000}){'a' * 2000}$"}
    for _ in range(2):
        answer = send(served, "POST", "/v1/completions", json=PROMPT | asking(pattern))
        assert answer.status_code == 400 or answer.json()["choices"][0]["finish_reason"] == "length", answer.text
    assert send(served, "POST", "/v1/completions", json=PROMPT | asking({"type": "boolean"})).status_code == 200


def test_without_the_library_it_is_refused_with_the_remedy(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    answer = send(served, "POST", "/v1/completions", json=PROMPT | asking({"const": "of no other test"}))
    assert answer.status_code == 400 and "pip install 'rlhf-ray[json]'" in answer.json()["error"]["message"]
    assert send(served, "POST", "/v1/completions", json=PROMPT | {"response_format": {"type": "text"}}).status_code == 200


def test_a_response_that_no_token_may_continue_ends_as_cut():
    class Stuck:
        def text(self, schema):
            return self

        allowed, is_stuck = np.array([True, False, False]), False

        def take(self, token):
            self.is_stuck = True

    rules = RequestRules(
        TokenRules(json_schema="{}"), np.array([0]), (2,), vocab_size=3, device=torch.device("cpu"), grammars=Stuck()
    )
    assert rules.logits(torch.zeros(3), np.array([], np.int64)).tolist() == [0, -torch.inf, -torch.inf]
    assert rules.take(0, False) == "length"


def test_a_tokenizer_that_has_no_text_for_it_is_refused():
    tokenizer = word_tokenizer(16)
    with pytest.raises(UserError, match=r"tokenizer can't be held to JSON|JSON schema can't be followed: no token of the model"):
        JsonGrammars(tokenizer, 16, [tokenizer.eos_token_id]).text('{"type": "object"}')

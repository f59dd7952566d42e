"""What the HTTP app refuses, in the form that OpenAI's client knows."""

from __future__ import annotations

import asyncio
import json

import openai
import pydantic
import pytest
from protocol_app import ask, protocol_folder, protocol_served, send  # noqa: F401 - fixtures

from rlhf_ray.serving.api_errors import ApiError
from rlhf_ray.serving.critic_values import ValuesRequest
from rlhf_ray.serving.page.bodies import ChatBody, ComparisonRequest, PlaygroundBody
from rlhf_ray.serving.request_bodies import ChatRequest, CompletionRequest, parse
from rlhf_ray.serving.reward_app import RewardRequest

TEXT = {"model": "tiny", "prompt": "x"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("completions", {"prompt": "x"}, 400, "model", "missing_required_parameter"),
        ("completions", {"model": "tiny"}, 400, "prompt", "missing_required_parameter"),
        ("completions", {"model": "other", "prompt": "x"}, 404, "model", "model_not_found"),
        ("completions", TEXT | {"max_tokenz": 3}, 400, "max_tokenz", "unknown_parameter"),
        ("completions", TEXT | {"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ("completions", TEXT | {"max_tokens": "5"}, 400, "max_tokens", "invalid_value"),
        ("completions", TEXT | {"max_tokens": 81}, 400, "max_tokens", None),
        ("completions", TEXT | {"prompt": [7] * 40, "max_tokens": 60}, 400, "max_tokens", "context_length_exceeded"),
        ("completions", TEXT | {"prompt": [7] * 96}, 400, "prompt", "context_length_exceeded"),
        ("completions", TEXT | {"prompt": [320]}, 400, "prompt", None),
        ("completions", TEXT | {"prompt": [-1]}, 400, "prompt[0]", "invalid_value"),
        ("completions", TEXT | {"prompt": []}, 400, "prompt", "invalid_value"),
        ("completions", TEXT | {"prompt": ["a", 5]}, 400, "prompt[1]", "invalid_value"),
        ("completions", TEXT | {"prompt": ["a"] * 5}, 400, "prompt", None),
        ("completions", TEXT | {"n": 9}, 400, "n", None),
        ("completions", TEXT | {"temperature": 2.1}, 400, "temperature", "invalid_value"),
        ("completions", TEXT | {"top_p": 0}, 400, "top_p", "invalid_value"),
        ("completions", TEXT | {"stop": ["a", ""]}, 400, "stop[1]", "invalid_value"),
        ("completions", TEXT | {"stop": list("abcde")}, 400, "stop", None),
        ("completions", TEXT | {"logit_bias": {"5": 101}}, 400, "logit_bias", "invalid_value"),
        ("completions", TEXT | {"logprobs": 21}, 400, "logprobs", "invalid_value"),
        ("completions", TEXT | {"stream_options": {}}, 400, "stream_options", None),
        ("completions", [1], 400, None, None),
        ("chat/completions", CHAT | {"messages": []}, 400, "messages", "invalid_value"),
        ("chat/completions", CHAT | {"messages": "hi"}, 400, "messages", "invalid_value"),
        (
            "chat/completions",
            CHAT | {"messages": [{"role": "user"}]},
            400,
            "messages[0].content",
            "missing_required_parameter",
        ),
        (
            "chat/completions",
            CHAT | {"messages": [{"role": "wizard", "content": "x"}]},
            400,
            "messages[0].role",
            "invalid_value",
        ),
        (
            "chat/completions",
            CHAT | {"messages": [{"role": "system", "content": "x"}]},
            400,
            "messages",
            "invalid_value",
        ),
        ("chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
    ],
)
def test_bad_requests_get_openai_error_bodies(served, path, body, status, param, code):
    response = send(served, "POST", f"/v1/{path}", json=body)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"] and "Traceback" not in error["message"]


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_k": 2**31 - 1},
        {"temperature": 1e-300},
        {"temperature": 2, "top_p": 1e-300},
        {"min_p": 0.999},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
    ],
)
def test_extreme_settings_harm_nobody(served, extreme):
    async def talk(client):
        settings = {"prompt": "the", "model": "tiny", "max_tokens": 6}
        return await asyncio.gather(
            client.completions.create(**settings, temperature=0),
            client.completions.create(**settings, extra_body=extreme),
        )

    plain, odd = ask(served, talk)
    assert plain.usage.completion_tokens > 0 and odd.usage.completion_tokens > 0
    if "seed" not in extreme and "top_k" not in extreme:  # all the others leave the likeliest token alone
        assert odd.choices[0].text == plain.choices[0].text


def test_fields_that_ask_for_nothing_are_accepted(served):
    extra = {
        "presence_penalty": 0,
        "logit_bias": {},
        "user": "me",
        "tools": None,
        "response_format": {"type": "text"},
        "best_of": 1,
        "suffix": None,
        "top_k": 5,
        "min_p": 0.1,
    }
    response = send(served, "POST", "/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2} | extra)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("method", "path", "kwargs", "status", "code"),
    [
        ("GET", "/v1/nothing", {}, 404, "unknown_url"),
        ("GET", "/docs", {}, 404, "unknown_url"),
        ("GET", "/v1/completions", {}, 405, "method_not_allowed"),
        ("GET", "/v1/models/other", {}, 404, "model_not_found"),
        ("POST", "/v1/completions", {"content": b"{", "headers": JSON}, 400, None),
        ("POST", "/v1/completions", {"content": b"\xff\xfe", "headers": JSON}, 400, None),
        (
            "POST",
            "/v1/completions",
            {"content": b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "headers": JSON},
            400,
            "invalid_value",
        ),
        ("POST", "/v1/completions", {"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, None),
        ("POST", "/v1/completions", {"content": b"x" * 20_001}, 413, "request_too_large"),
    ],
)
def test_http_errors_get_openai_error_bodies(served, method, path, kwargs, status, code):
    response = send(served, method, path, **kwargs)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["code"] == code


def test_body_limit_holds_without_content_length(served):
    async def parts():
        for _ in range(30):
            yield b"x" * 1000

    assert send(served, "POST", "/v1/completions", content=parts()).status_code == 413


def test_openai_client_raises_its_own_error_classes(served):
    async def talk(client):
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="gpt-17", prompt="x")
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="tiny", prompt="x", max_tokens=10_000)
        return missing.value, bad.value

    missing, bad = ask(served, talk)
    assert missing.code == "model_not_found" and bad.param == "max_tokens" and bad.type == "invalid_request_error"


def test_api_key_guards_everything_but_health(served):
    settings = {"api_key": "s3cret"}
    for header in (None, "Bearer wrong", "Bearer s3cre", "s3cret", "Basic s3cret"):
        response = send(
            served, "GET", "/v1/models", settings=settings, headers={"Authorization": header} if header else {}
        )
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), header
    assert send(served, "GET", "/v1/nothing", settings=settings).status_code == 401
    assert send(served, "POST", "/v1/completions", settings=settings, content=b"x" * 30_000).status_code == 401
    assert send(served, "GET", "/stats", settings=settings).status_code == 401
    assert send(served, "GET", "/health", settings=settings).json() == {"status": "ok"}

    models = ask(served, lambda client: client.models.list(), **settings)
    assert [model.id for model in models.data] == ["tiny"]
    assert ask(served, lambda client: client.models.retrieve("tiny"), **settings).object == "model"

    async def wrong(client):
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="other").models.list()

    ask(served, wrong, **settings)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": ["", {}]}), (CompletionRequest, {"prompt": [[""]]}),
        (CompletionRequest, {"prompt": "", "stop": [""]}), (CompletionRequest, {"prompt": "", "stop_token_ids": [""]}),
        (ChatRequest, {"messages": [{}]}), (ChatRequest, {"messages": [{"role": "user", "content": [{}]}]}),
        (ValuesRequest, {"prompt": [-1]}), (RewardRequest, {"query": [1]}), (RewardRequest, {"query": [], "prompts": [1]}),
        (RewardRequest, {"query": [], "ended": [1]}), (ChatBody, {"messages": [1]}), (ComparisonRequest, {"skip": [""]}),
        (PlaygroundBody, {"prompt": "a", "models": [""]}),
    ],
)  # fmt: skip
def test_of_many_wrong_items_one_is_told(kind, body):
    """Each that is noted costs memory and time, in which the server does nothing else."""

    def many(value):
        if isinstance(value, list):
            return [many(each) for each in value] + [many(value[-1]) for _ in range(2000)] if value else value
        return {name: many(each) for name, each in value.items()} if isinstance(value, dict) else value

    with pytest.raises(pydantic.ValidationError) as refused:
        kind.model_validate_json(json.dumps({"model": "m"} | many(body) if kind is not RewardRequest else many(body)))
    assert refused.value.error_count() < 10


@pytest.mark.parametrize("name", ["max tokens", "1", ""])
def test_a_field_whose_name_is_none_is_named(name):
    with pytest.raises(ApiError, match=f"supplied: {name}$"):
        parse(CompletionRequest, "application/json", json.dumps(TEXT | {name: 1}).encode())

"""The HTTP app on a real tiny engine, without Ray: OpenAI's client and raw requests through httpx's ASGI transport."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from functools import partial

import openai
import pytest
import served_app
import torch
from served_app import save_tiny, start

from rlhf_ray.errors import UserError
from rlhf_ray.models.load import load_causal_lm, save_model
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.serving.app import build_app
from rlhf_ray.serving.config import (
    AppConfig,
    EngineOptions,
    Limits,
    is_loopback,
    replica_environment,
    resolve_api_key,
)
from rlhf_ray.serving.loading import load
from rlhf_ray.serving.model_folder import find_model, model_name
from rlhf_ray.serving.runner import EngineFailed, EngineRunner, Overloaded, RowRequest
from rlhf_ray.serving.streaming import EventStream
from rlhf_ray.serving.text import ResponseText

LIMITS = dataclasses.replace(served_app.LIMITS, max_tokens=80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def served(folder):
    runner, reader = start(folder, LIMITS)
    yield runner, reader
    runner.close()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


transport, ask = partial(served_app.transport, limits=LIMITS), partial(served_app.ask, limits=LIMITS)


def send(*request, settings=None, **kwargs):
    return served_app.send(*request, settings={"limits": LIMITS} | (settings or {}), **kwargs)


def reference(folder, prompt, count):
    """Greedy continuation by transformers' own generate: ids, and each one's log-prob by a plain forward pass."""
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    prompt_ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
    ids = model.generate(prompt_ids, do_sample=False, max_new_tokens=count)[0, prompt_ids.shape[1] :]
    return ids.tolist()


# ---- completions


def test_greedy_completion_is_what_transformers_generates(served, folder, tokenizer):
    expected = reference(folder, "the cat", 20)
    result = ask(
        served, lambda client: client.completions.create(model="tiny", prompt="the cat", max_tokens=20, temperature=0)
    )
    assert result.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert result.choices[0].finish_reason == ("stop" if expected[-1] == tokenizer.eos_token_id else "length")
    assert result.usage.completion_tokens == len(expected)
    assert result.usage.prompt_tokens == len(tokenizer("the cat").input_ids)
    assert result.usage.total_tokens == result.usage.prompt_tokens + len(expected)
    assert result.object == "text_completion" and result.model == "tiny" and result.id.startswith("cmpl-")


def test_logprobs_are_those_of_a_forward_pass(served, folder, tokenizer):
    result = ask(
        served,
        lambda client: client.completions.create(model="tiny", prompt="the dog", max_tokens=12, seed=3, logprobs=0),
    )
    shown = result.choices[0].logprobs
    assert "".join(shown.tokens).replace("<|eos|>", "").startswith(result.choices[0].text.split("�")[0])
    # The ids by the only way a client has: sampling them again as chat would be another prompt, so score through text.
    model = load_causal_lm(folder)
    prompt = tokenizer("the dog").input_ids
    ids, position = [], 0
    with torch.no_grad():
        for token, logprob in zip(shown.tokens, shown.token_logprobs, strict=True):
            logprobs = model(torch.tensor([prompt + ids])).logits[0, -1].log_softmax(-1)
            same = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == token]
            nearest = min(same, key=lambda i: abs(logprobs[i].item() - logprob))
            assert abs(logprobs[nearest].item() - logprob) < 1e-4
            ids.append(nearest)
            position += 1
    assert position == result.usage.completion_tokens
    assert shown.text_offset[0] == 0 and shown.text_offset == sorted(shown.text_offset)


def test_seed_repeats_n_and_prompt_lists_extend(served):
    async def talk(client):
        one = {"model": "tiny", "max_tokens": 15, "seed": 11}
        first = await client.completions.create(prompt="the", **one)
        again = await client.completions.create(prompt="the", **one)
        several = await client.completions.create(prompt=["a cat", "the"], n=3, **one)
        other = await client.completions.create(prompt="the", model="tiny", max_tokens=15, seed=12)
        unseeded = [await client.completions.create(prompt="the", model="tiny", max_tokens=15) for _ in range(2)]
        return first, again, several, other, unseeded

    first, again, several, other, unseeded = ask(served, talk)
    assert first.choices[0].text == again.choices[0].text != other.choices[0].text
    assert unseeded[0].choices[0].text != unseeded[1].choices[0].text
    assert [choice.index for choice in several.choices] == list(range(6))
    assert several.choices[3].text == first.choices[0].text
    assert len({choice.text for choice in several.choices}) == 6


def test_what_ended_responses_in_training_ends_them_here(served, folder, tmp_path):
    """A policy that was trained with stop strings learnt to end with them."""
    model = load_causal_lm(folder)
    model.config.response_stops = ["m"]
    with_stops = save_model(model, load_tokenizer(folder), tmp_path / "model", "tiny")
    runner, reader = load(EngineOptions(model=str(with_stops), precision="float32"), LIMITS)

    async def talk(client):
        create = client.completions.create
        return [(await create(model="tiny", prompt="the", max_tokens=60, seed=seed)).choices[0] for seed in range(4)]

    free, stopped = ask(served, talk), ask((runner, reader), talk)
    runner.close()
    assert any("m" in choice.text for choice in free)
    for one, other in zip(free, stopped, strict=True):
        assert other.text == one.text.split("m")[0]
        assert other.finish_reason == ("stop" if "m" in one.text else one.finish_reason)


def test_stop_ends_before_the_string_and_counts_tokens_up_to_it(served):
    async def talk(client):
        free = await client.completions.create(model="tiny", prompt="the cat", max_tokens=40, seed=5, logprobs=0)
        text = free.choices[0].text
        # Three characters, which may span tokens, and which the text has not had before.
        stop = next(
            text[i : i + 3]
            for i in range(6, len(text))
            if "�" not in text[i : i + 3] and text.find(text[i : i + 3]) == i
        )
        cut = await client.completions.create(
            model="tiny", prompt="the cat", max_tokens=40, seed=5, stop=[stop, "never"], logprobs=0
        )
        stream = await client.completions.create(
            model="tiny", prompt="the cat", max_tokens=40, seed=5, stop=stop, stream=True
        )
        return free, stop, cut, [chunk async for chunk in stream]

    free, stop, cut, chunks = ask(served, talk)
    assert cut.choices[0].text == free.choices[0].text.split(stop)[0]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < free.usage.completion_tokens
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut.choices[0].text
    assert all(offset < len(cut.choices[0].text) for offset in cut.choices[0].logprobs.text_offset)


def test_stream_has_the_same_text_usage_and_end(served):
    async def talk(client):
        request = {"model": "tiny", "prompt": "the dog", "max_tokens": 30, "seed": 1, "n": 2, "logprobs": 1}
        whole = await client.completions.create(**request)
        stream = await client.completions.create(**request, stream=True, stream_options={"include_usage": True})
        return whole, [chunk async for chunk in stream]

    whole, chunks = ask(served, talk)
    for index in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == whole.choices[index].text
        assert sum((choice.logprobs.token_logprobs for choice in mine), []) == pytest.approx(
            whole.choices[index].logprobs.token_logprobs, abs=1e-5
        )
        assert [choice.finish_reason for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == whole.choices[index].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_is_server_sent_events_ending_in_done(served):
    response = send(
        served, "POST", "/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 3, "stream": True}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "text_completion"


def test_echo_token_prompts_and_empty_prompt(served, tokenizer):
    async def talk(client):
        ids = tokenizer("the mat").input_ids
        plain = await client.completions.create(model="tiny", prompt="the mat", max_tokens=5, seed=2)
        by_ids = await client.completions.create(model="tiny", prompt=ids, max_tokens=5, seed=2)
        echoed = await client.completions.create(model="tiny", prompt=[ids, ids], max_tokens=5, seed=2, echo=True)
        empty = await client.completions.create(model="tiny", prompt="", max_tokens=5)
        return plain, by_ids, echoed, empty

    plain, by_ids, echoed, empty = ask(served, talk)
    assert plain.choices[0].text == by_ids.choices[0].text
    assert [choice.text for choice in echoed.choices] == ["the mat" + plain.choices[0].text] * 2
    assert empty.usage.prompt_tokens == 1


# ---- chat


def test_chat_without_a_template_is_a_plain_dialogue(served, tokenizer):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]

    async def talk(client):
        chat = await client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=10, seed=4, logprobs=True
        )
        text = await client.completions.create(
            model="tiny", max_tokens=10, seed=4, prompt="System: be brief\n\nUser: hello\n\nAssistant:"
        )
        stream = await client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=10, seed=4, stream=True
        )
        return chat, text, [chunk async for chunk in stream]

    chat, text, chunks = ask(served, talk)
    assert chat.choices[0].message.content == text.choices[0].text.removeprefix(" ")
    assert chat.choices[0].message.role == "assistant" and chat.object == "chat.completion"
    assert chat.usage == text.usage
    assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == chat.choices[0].finish_reason


def test_chat_uses_the_tokenizers_template(served, tokenizer):
    runner, reader = served
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    templated = (
        runner,
        type(reader)(tokenizer=tokenizer, positions=reader.positions, vocab_size=reader.vocab_size, limits=LIMITS),
    )

    async def talk(client):
        chat = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=8, seed=1
        )
        text = await client.completions.create(model="tiny", prompt="<user>hi<assistant>", max_tokens=8, seed=1)
        with pytest.raises(openai.BadRequestError, match="no system role"):
            await client.chat.completions.create(
                model="tiny", messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}]
            )
        return chat, text

    try:
        chat, text = ask(templated, talk)
    finally:
        tokenizer.chat_template = None
    assert chat.choices[0].message.content == text.choices[0].text


# ---- errors

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
        (
            "chat/completions",
            CHAT | {"response_format": {"type": "json_object"}},
            400,
            "response_format",
            "unsupported_parameter",
        ),
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


# ---- batching


def test_sixteen_requests_share_the_steps_of_one_batch(served):
    runner, _ = served
    before = runner.stats()

    async def talk(client):
        return await asyncio.gather(
            *(
                client.completions.create(
                    model="tiny",
                    prompt=[7] * (1 + i),
                    max_tokens=32,
                    seed=i,
                    temperature=0.5 + i / 10,
                    extra_body={"top_k": i},
                )
                for i in range(16)
            )
        )

    results = ask(served, talk)
    after = runner.stats()
    tokens = sum(result.usage.completion_tokens for result in results)
    assert after.tokens - before.tokens == tokens
    # One by one it would be `tokens` steps. The requests arrive within a few steps of each other.
    assert after.steps - before.steps < 2.5 * 32
    assert tokens > 4 * (after.steps - before.steps)


def test_rows_beyond_batch_and_queue_are_refused_and_leave_no_trace(served):
    async def talk(client):
        create = client.completions.create
        # 40 rows at once where 32 may be: a row or two may end by chance before the last request is seen, not eight.
        crowd = [create(model="tiny", prompt="a", n=8, max_tokens=80) for _ in range(5)]
        results = await asyncio.gather(*crowd, return_exceptions=True)
        return results, await create(model="tiny", prompt="a", max_tokens=1)

    results, fine = ask(served, talk)
    refused = [result for result in results if isinstance(result, openai.RateLimitError)]
    assert [len(result.choices) for result in results if result not in refused] == [8] * 4
    assert refused[0].status_code == 429 and refused[0].type == "rate_limit_error"
    assert refused[0].response.headers["retry-after"] == "1"
    assert fine.usage.completion_tokens == 1
    assert served[0].stats().running_rows == served[0].stats().waiting_rows == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(served, stream):
    runner, reader = served
    app = build_app(runner, reader, AppConfig(name="tiny", limits=LIMITS))
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 80, "n": 4, "stream": stream, "top_k": 1}).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "server": ("test", 80),
        "client": ("test", 1),
    }
    before = runner.stats()

    async def run():
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        started = asyncio.Event()

        async def receive():
            if messages:
                return messages.pop()
            while runner.stats().steps == before.steps:
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send_message(message):
            started.set()

        await asyncio.wait_for(app(scope, receive, send_message), 20)
        deadline = asyncio.get_running_loop().time() + 10
        while runner.stats().running_rows or runner.stats().waiting_rows:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.005)

    asyncio.run(run())
    after = runner.stats()
    assert after.cancelled_rows - before.cancelled_rows == 4
    assert after.tokens - before.tokens < 4 * 79


def test_a_stream_whose_reader_left_before_its_first_byte_is_ended():
    ended = []

    async def chunks():
        yield {}

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        raise OSError("the client has left")

    asyncio.run(EventStream(chunks(), lambda: ended.append(True))({"type": "http"}, receive, send))
    assert ended == [True]


class FailingEngine:
    """Scripted: fails at the steps it is told to; else ends every row with one token."""

    def __init__(self, fail_at):
        self.fail_at, self.step_number, self.rows, self.next = fail_at, 0, [], 0

    def submit(self, prompt_ids, seed, params, rules=None):
        if prompt_ids == [13]:
            raise UserError("13 is unlucky; choose another")
        self.next += 1
        self.rows.append(self.next)
        return self.next

    def step(self):
        from rlhf_ray.config.sampling import Completion, TokenEvent

        self.step_number += 1
        rows, self.rows = self.rows, []
        if self.step_number in self.fail_at:
            raise FloatingPointError("logits are not finite")
        done = Completion(response_ids=[1], logprobs=[0.0], finish_reason="eos")
        return [TokenEvent(request_id=row, token_id=1, logprob=0.0, completion=done) for row in rows]

    def cancel(self, request_id):
        self.rows.remove(request_id)
        return True


def draw_rows(runner, rows):
    from rlhf_ray.config.sampling import SamplingParams

    async def run():
        ticket = runner.submit([RowRequest(prompt_ids=row, seed=0, params=SamplingParams()) for row in rows])
        seen = []
        while events := await ticket.events():
            seen += events
        return seen

    return asyncio.run(asyncio.wait_for(run(), 10))


def test_a_failed_step_costs_its_rows_and_three_in_a_row_the_engine():
    runner = EngineRunner(FailingEngine(fail_at=(2, 4, 5, 6)), max_rows=4, max_waiting_rows=4)
    assert len(draw_rows(runner, [[1], [2]])) == 2
    with pytest.raises(EngineFailed, match="FloatingPointError"):
        draw_rows(runner, [[1], [2], [3], [4], [5]])
    assert runner.healthy and len(draw_rows(runner, [[1]])) == 1
    for _ in range(3):
        with pytest.raises(EngineFailed):
            draw_rows(runner, [[1]])
    runner._thread.join(5)
    assert not runner.healthy
    with pytest.raises(EngineFailed):
        draw_rows(runner, [[1]])


def test_a_request_that_the_engine_refuses_fails_alone():
    runner = EngineRunner(FailingEngine(fail_at=()), max_rows=4, max_waiting_rows=4)
    with pytest.raises(UserError, match="unlucky"):
        draw_rows(runner, [[1], [13], [2]])
    assert len(draw_rows(runner, [[1]] * 8)) == 8
    with pytest.raises(Overloaded):
        draw_rows(runner, [[1]] * 9)
    assert len(draw_rows(runner, [[1]] * 8)) == 8, "what was refused is not counted"
    runner.close()


# ---- text


def test_plain_chat_drops_the_cues_space_once(tokenizer):
    response = ResponseText(tokenizer, tokenizer("Assistant:").input_ids, ("\n\nUser:",), drop_first_space=True)
    pieces = []
    for token_id in tokenizer("  the cat\n\nUser: more").input_ids:
        response.push(token_id, -1.0)
        pieces.append(response.take(final=False)[0])
    assert "".join(pieces) == " the cat" and response.stopped


@pytest.mark.parametrize("text", ["naïve café 漢字 🙂🙂 the end", "the cat sat on the mat", "🙂", ""])
def test_pieces_add_up_and_split_no_character(tokenizer, text):
    response = ResponseText(tokenizer, tokenizer("the").input_ids, ())
    pieces = []
    for token_id in tokenizer(text).input_ids + [tokenizer.eos_token_id]:
        response.push(token_id, -1.0)
        pieces.append(response.take(final=False)[0])
    pieces.append(response.take(final=True)[0])
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_a_stop_string_never_leaks_in_part(tokenizer):
    response = ResponseText(tokenizer, [], ("STOP", "mat and"))
    seen = ""
    for token_id in tokenizer("the STOMP on the mat, mat an mat and dog").input_ids:
        response.push(token_id, 0.0)
        seen += response.take(final=False)[0]
        assert "the STOMP on the mat, mat an ".startswith(seen)
    assert response.stopped and seen + response.take(final=True)[0] == "the STOMP on the mat, mat an "


# ---- folders and settings


def test_find_model_takes_model_run_and_results_folders(folder, tmp_path):
    assert find_model(folder) == folder
    run = tmp_path / "demo"
    for stage in ("sft", "dpo", "ppo"):
        (run / stage).mkdir(parents=True)
    (run / "sft" / "model").symlink_to(folder)
    assert find_model(run) == (run / "sft" / "model")
    (run / "dpo" / "model").symlink_to(folder)
    assert find_model(run) == (run / "dpo" / "model")
    (run / "ppo" / "model").symlink_to(folder)
    assert find_model(run) == (run / "ppo" / "model") and model_name(run, find_model(run)) == "demo"
    results = tmp_path / "imdb"
    results.mkdir()
    (results / "policy").symlink_to(folder)
    reward = results / "reward"
    reward.mkdir()
    (reward / "config.json").write_text('{"architectures": ["GPT2ForSequenceClassification"]}')
    assert find_model(results).samefile(folder)
    for bad, words in ((tmp_path / "none", "not a folder"), (tmp_path, "holds no model"), (reward, "writes no text")):
        with pytest.raises(UserError, match=words):
            find_model(bad)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="safetensors"):
        find_model(pickled)


def test_only_loopback_goes_without_a_key(monkeypatch):
    monkeypatch.delenv("RLHF_RAY_API_KEY", raising=False)
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.3.2.1", "localhost", "::1"))
    assert resolve_api_key("127.0.0.1", None) is None
    for host in ("0.0.0.0", "", "::", "192.0.2.7"):
        with pytest.raises(UserError, match="RLHF_RAY_API_KEY"):
            resolve_api_key(host, None)
        assert resolve_api_key(host, "k") == "k"
    monkeypatch.setenv("RLHF_RAY_API_KEY", "from-env")
    assert resolve_api_key("0.0.0.0", None) == "from-env" and resolve_api_key("0.0.0.0", "given") == "given"
    for key in ("", "two words", "schlüssel"):
        with pytest.raises(UserError):
            resolve_api_key("127.0.0.1", key)
    assert "s3cret" not in repr(AppConfig(name="x", api_key="s3cret"))
    with pytest.raises(UserError, match="max_rows"):
        Limits(max_rows=0)


@pytest.mark.parametrize(("threads", "cores", "spin"), [(2, 2, True), (1, 2, True), (3, 2, False), (1, 0.5, False)])
def test_replicas_threads_spin_where_each_has_a_core(threads, cores, spin):
    environment = replica_environment(threads, cores)
    assert ("GOMP_SPINCOUNT" in environment) == spin and environment["OMP_WAIT_POLICY"] == "passive"

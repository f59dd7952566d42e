"""Completions and chat of the HTTP app: OpenAI's client and raw requests through httpx's ASGI transport."""

from __future__ import annotations

import json

import openai
import pytest
import torch
from protocol_app import LIMITS, ask, protocol_folder, protocol_served, send  # noqa: F401 - fixtures

from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.serving.config import EngineOptions
from rlhf_ray.serving.loading import load
from rlhf_ray.serving.response_text import ResponseText


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def reference(folder, prompt, count):
    """Greedy continuation by transformers' own generate: ids, and each one's log-prob by a plain forward pass."""
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    prompt_ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
    ids = model.generate(prompt_ids, do_sample=False, max_new_tokens=count)[0, prompt_ids.shape[1] :]
    return ids.tolist()


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

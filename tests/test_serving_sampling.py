"""Log-probs, penalties, bias and ends of served responses, against transformers' own and against float64."""

from __future__ import annotations

import pytest
import torch
from served_app import ask, send, served_tiny, tiny_folder  # noqa: F401 - fixtures
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from rlhf_ray.algorithms.token_rules import ruled_logits
from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.models.tokenizer import load_tokenizer

NONE = torch.empty(0, dtype=torch.int64)
OFF = {"bias_ids": NONE, "bias": torch.empty(0), "forbidden_ids": NONE, "repetition_penalty": 1.0,
       "frequency_penalty": 0.0, "presence_penalty": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def model(folder):
    return load_causal_lm(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def logprobs64(model, ids):
    """[len(ids), V]: what follows each token, in float64."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


# ---- the maths


def test_repetition_bias_and_least_length_are_transformers_processors():
    torch.manual_seed(0)
    logits, prompt, response = torch.randn(50), torch.tensor([3, 7, 7, 11]), torch.tensor([7, 4])
    ids, scores = torch.cat((prompt, response))[None], logits[None]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, scores)[0]
    assert torch.equal(ruled_logits(logits, prompt, response, **OFF | {"repetition_penalty": 1.7}), expected)
    bias = {(4,): 2.5, (9,): -100.0}
    expected = SequenceBiasLogitsProcessor(bias)(ids, scores)[0]
    found = ruled_logits(
        logits, prompt, response, **OFF | {"bias_ids": torch.tensor([4, 9]), "bias": torch.tensor([2.5, -100.0])}
    )
    assert torch.allclose(found, expected, atol=1e-6, rtol=0)
    expected = MinNewTokensLengthLogitsProcessor(4, 3, [5, 6], device="cpu")(ids, scores)[0]
    assert torch.equal(ruled_logits(logits, prompt, response, **OFF | {"forbidden_ids": torch.tensor([5, 6])}), expected)


def test_frequency_and_presence_are_openais_formula():
    torch.manual_seed(1)
    logits, response = torch.randn(20), [4, 4, 9, 4, 2]
    found = ruled_logits(
        logits, torch.tensor([1, 9]), torch.tensor(response), **OFF | {"frequency_penalty": 0.6, "presence_penalty": -0.3}
    )
    for token in range(20):  # mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence
        count = response.count(token)
        expected = logits[token].item() - count * 0.6 - (count > 0) * -0.3
        assert found[token].item() == pytest.approx(expected, abs=1e-6)


# ---- what is served


def text_of(tokenizer, ids):
    """Without half a character at its end, which no answer has."""
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("asked", "generates"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
        ({"logit_bias": {"100": 9, "101": -50}}, {"sequence_bias": {(100,): 9.0, (101,): -50.0}}),
    ],
)
def test_greedy_responses_are_those_of_generate(served, model, tokenizer, asked, generates):
    for prompt in ("the cat", "the dog sat", "café"):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        expected = model.generate(ids, do_sample=False, max_new_tokens=24, **generates)[0, ids.shape[1] :].tolist()
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0} | asked
        found = send(served, "POST", "/v1/completions", json=body).json()
        assert found["choices"][0]["text"] == text_of(tokenizer, expected)
        assert found["usage"]["completion_tokens"] == len(expected)


def test_what_would_overflow_a_logit_is_refused(served):
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 4, "repetition_penalty": 1e-40}
    assert send(served, "POST", "/v1/completions", json=body).status_code == 400


def test_a_banned_token_is_never_drawn_and_a_pushed_one_always(served, tokenizer):
    async def talk(client):
        create = client.completions.create
        free = await create(model="tiny", prompt="the", max_tokens=20, temperature=0, logprobs=1)
        pushed = await create(model="tiny", prompt="the", max_tokens=5, seed=1, logit_bias={"50": 100}, logprobs=0)
        return free, pushed

    free, pushed = ask(served, talk)
    assert pushed.choices[0].logprobs.tokens == [tokenizer.decode([50])] * 5
    assert free.choices[0].logprobs.tokens


def test_frequency_penalty_makes_greedy_responses_vary(served, model, tokenizer):
    """Against the same loop in float64."""
    ids = tokenizer("the cat").input_ids
    drawn: list[int] = []
    for _ in range(24):
        scores = logprobs64(model, ids + drawn)[-1].clone()
        for token in set(drawn):
            scores[token] -= 1.5 * drawn.count(token) + 0.4
        drawn.append(int(scores.argmax()))
        if drawn[-1] == tokenizer.eos_token_id:
            break
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 24, "temperature": 0, "frequency_penalty": 1.5,
            "presence_penalty": 0.4}  # fmt: skip
    found = send(served, "POST", "/v1/completions", json=body).json()["choices"][0]
    assert found["text"] == text_of(tokenizer, drawn)


def test_min_tokens_ignore_eos_and_stop_tokens(served, tokenizer):
    eos = tokenizer.eos_token_id

    async def talk(client):
        create = client.completions.create
        common = {"model": "tiny", "prompt": "the", "max_tokens": 12, "logprobs": 0}
        wish = {"logit_bias": {str(eos): 100}}  # ends at once
        ended = await create(**common, **wish)
        least = await create(**common, **wish, extra_body={"min_tokens": 5})
        ignored = await create(**common, **wish, extra_body={"ignore_eos": True})
        stopped = await create(**common, logit_bias={"60": 100}, extra_body={"stop_token_ids": [60, 61]})
        both = await create(**common, logit_bias={"60": 100}, extra_body={"stop_token_ids": [60], "min_tokens": 3})
        return ended, least, ignored, stopped, both

    ended, least, ignored, stopped, both = ask(served, talk)
    assert ended.usage.completion_tokens == 1 and ended.choices[0].finish_reason == "stop"
    assert least.usage.completion_tokens == 6 and least.choices[0].finish_reason == "stop"
    assert tokenizer.eos_token not in least.choices[0].logprobs.tokens[:5]
    assert ignored.usage.completion_tokens == 12 and ignored.choices[0].finish_reason == "length"
    assert stopped.usage.completion_tokens == 1 and stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == "" and stopped.choices[0].logprobs.tokens == [tokenizer.decode([60])]
    assert both.usage.completion_tokens == 4 and both.choices[0].finish_reason == "stop"


def test_stop_strings_count_after_min_tokens_only(served, tokenizer):
    async def talk(client):
        create = client.completions.create
        common = {"model": "tiny", "prompt": "the", "max_tokens": 8, "logit_bias": {"70": 100}}
        free = await create(**common)
        piece = tokenizer.decode([70])
        early = await create(**common, stop=piece)
        late = await create(**common, stop=piece, extra_body={"min_tokens": 3})
        return piece, free.choices[0].text, early.choices[0], late.choices[0], late.usage

    piece, free, early, late, usage = ask(served, talk)
    assert free == piece * 8 and early.text == "" and late.text == piece * 3
    assert (early.finish_reason, late.finish_reason, usage.completion_tokens) == ("stop", "stop", 4)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_models_own_under_any_sampling(served, model, tokenizer, stream):
    body = {"model": "tiny", "prompt": "the dog", "max_tokens": 16, "seed": 3, "temperature": 0.4, "top_p": 0.7}
    rules = {"top_k": 5, "repetition_penalty": 1.2}

    async def talk(client):
        found = await client.completions.create(**body, logprobs=20, stream=stream, extra_body=rules)
        choices = [chunk.choices[0] async for chunk in found] if stream else [found.choices[0]]
        return [one.logprobs for one in choices if one.logprobs is not None]

    parts = ask(served, talk)
    tokens = sum((part.tokens for part in parts), [])
    logprobs = sum((part.token_logprobs for part in parts), [])
    tops = sum((part.top_logprobs for part in parts), [])
    ids = tokenizer("the dog").input_ids
    assert len(tokens) == len(logprobs) == len(tops) > 3
    for token, logprob, top in zip(tokens, logprobs, tops, strict=True):
        expected = logprobs64(model, ids)[-1]
        same = [number for number in range(len(expected)) if tokenizer.decode([number]) == token]
        drawn = min(same, key=lambda number: abs(expected[number].item() - logprob))
        assert logprob == pytest.approx(expected[drawn].item(), abs=1e-4)
        best = expected.topk(20)
        texts = [tokenizer.decode([number]) for number in best.indices.tolist()]
        assert set(top) == {*texts, token}
        assert top[texts[0]] == pytest.approx(best.values[0].item(), abs=1e-4)
        ids = [*ids, drawn]


def test_chat_shows_alternatives(served, model, tokenizer):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
    found = ask(served, lambda client: client.chat.completions.create(**chat, logprobs=True, top_logprobs=3))
    ids = tokenizer("User: hi\n\nAssistant:").input_ids
    for item in found.choices[0].logprobs.content:
        best = logprobs64(model, ids)[-1].topk(3)
        assert [one.token for one in item.top_logprobs] == [tokenizer.decode([number]) for number in best.indices]
        assert [one.logprob for one in item.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert item.token == item.top_logprobs[0].token and item.logprob == item.top_logprobs[0].logprob
        ids = [*ids, int(best.indices[0])]


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_an_echo_has_the_prompts_logprobs(served, model, tokenizer, max_tokens):
    prompts = [tokenizer("the cat sat on the mat").input_ids, tokenizer("naïve 漢字").input_ids]
    body = {"model": "tiny", "prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1, "echo": True}
    found = send(served, "POST", "/v1/completions", json=body).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    for prompt, choice in zip(prompts, found["choices"], strict=True):
        shown = choice["logprobs"]
        assert choice["text"].startswith(tokenizer.decode(prompt)) and choice["finish_reason"] in ("length", "stop")
        assert len(shown["tokens"]) == len(prompt) + max_tokens or choice["finish_reason"] == "stop"
        assert shown["token_logprobs"][0] is shown["top_logprobs"][0] is None
        expected = logprobs64(model, prompt)
        for place in range(1, len(prompt)):
            value = shown["token_logprobs"][place]
            assert value == pytest.approx(expected[place - 1, prompt[place]].item(), abs=1e-4)
            # As evaluation harnesses tell whether greedy decoding would have written the token.
            greedy = int(expected[place - 1].argmax()) == prompt[place]
            assert (value == max(shown["top_logprobs"][place].values())) == greedy
        assert shown["text_offset"] == sorted(shown["text_offset"])
        for token, offset, after in zip(shown["tokens"], shown["text_offset"], shown["text_offset"][1:], strict=False):
            if "�" not in token and token != tokenizer.eos_token:
                assert choice["text"][offset:after] == token
    assert found["usage"]["completion_tokens"] <= 2 * max_tokens


def test_an_echo_is_streamed_too(served):
    async def talk(client):
        request = {"model": "tiny", "prompt": "the cat", "max_tokens": 3, "seed": 1, "logprobs": 2, "echo": True}
        whole = await client.completions.create(**request)
        chunks = [chunk async for chunk in await client.completions.create(**request, stream=True)]
        nothing = [chunk async for chunk in await client.completions.create(**request | {"max_tokens": 0}, stream=True)]
        return whole.choices[0], [chunk.choices[0] for chunk in chunks], [chunk.choices[0] for chunk in nothing]

    whole, chunks, nothing = ask(served, talk)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert sum((chunk.logprobs.tokens for chunk in chunks), []) == whole.logprobs.tokens
    assert sum((chunk.logprobs.text_offset for chunk in chunks), []) == whole.logprobs.text_offset
    assert "".join(chunk.text for chunk in nothing) == "the cat" and nothing[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"stop_token_ids": [320]}, "stop_token_ids"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_can_not_be_had_is_refused_in_words(served, extra, param):
    for stream in (False, True):
        body = {"model": "tiny", "prompt": "x", "max_tokens": 8, "stream": stream} | extra
        response = send(served, "POST", "/v1/completions", json=body)
        assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_rules_of_one_request_leave_the_others_alone(served):
    import asyncio

    async def talk(client):
        create = client.completions.create
        plain = {"model": "tiny", "prompt": "the", "max_tokens": 20, "seed": 5}
        alone = await create(**plain)
        crowd = await asyncio.gather(
            create(**plain),
            create(**plain, logprobs=5, frequency_penalty=1.0),
            create(**plain | {"seed": 6}, extra_body={"repetition_penalty": 2.0, "min_tokens": 20}),
        )
        return alone, crowd

    alone, crowd = ask(served, talk)
    assert crowd[0].choices[0].text == alone.choices[0].text

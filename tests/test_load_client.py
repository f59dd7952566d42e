"""What `bench load` counts: requests that OpenAI's library would send again or give up, and mixed answers."""

import asyncio
import json
import random

import httpx
import pytest

from rlhf_ray.bench import load_client
from rlhf_ray.bench.load_client import LoadRequest, failures, retries
from rlhf_ray.bench.under_load import is_mixed, mark, summary

BODY = {"choices": [{"text": "t1 t4 t7"}], "system_fingerprint": "one"}
HEADERS = {"x-model-version": "one"}
DONE = "data: [DONE]\n\n"


def event(text, version="one"):
    return "data: " + json.dumps({"choices": [{"text": text}], "system_fingerprint": version}) + "\n\n"


def asked(answers, streams=False):
    """Of a request whose tries are answered by these in turn; an exception is what the connection does."""
    left = iter(answers)

    def handle(request):
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def run():
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle), base_url="http://test") as http:
            return await load_client.ask(http, {"stream": streams}, random.Random(0))

    found = asyncio.run(run())
    assert next(left, None) is None
    return found


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds between tries, which are not waited for."""
    found = []

    async def sleep(seconds):
        found.append(seconds)

    monkeypatch.setattr(load_client.asyncio, "sleep", sleep)
    return found


def test_what_the_library_sends_again_is_counted_by_what_ended_it(waits):
    full = httpx.Response(503, headers={"Retry-After": "5"})
    found = asked([full, httpx.ReadError("gone"), httpx.Response(200, json=BODY, headers=HEADERS)])
    assert found.tries == ["503", "ReadError"] and found.failed is None
    assert waits[0] == 5 and 0.75 <= waits[1] <= 1.0  # Retry-After; else half a second doubled, less a quarter at most
    assert found.versions == {"one"} and found.words == [1, 4, 7] and found.tokens == 3
    assert retries([found, found]) == {"503": 2, "ReadError": 2} and not failures([found])


def test_a_third_failure_and_a_refusal_are_final():
    assert asked([httpx.Response(429)] * 3).failed == "429"
    refused = asked([httpx.Response(404)])
    assert refused.failed == "404" and refused.tries == []


def test_a_stream_that_has_begun_is_not_sent_again():
    cut = asked([httpx.Response(200, text=event("t1"))], streams=True)
    assert cut.failed == "cut off in a stream" and cut.tries == []
    error = asked([httpx.Response(200, text=event("t1") + 'data: {"error": {}}\n\n' + DONE)], streams=True)
    assert error.failed == "error in a stream"
    whole = asked([httpx.Response(503), httpx.Response(200, text=event("t1") + event(" t4") + DONE)], streams=True)
    assert whole.failed is None and whole.tries == ["503"] and whole.words == [1, 4]


def test_an_answer_of_two_versions_is_seen_by_name_and_by_words():
    two_names = asked([httpx.Response(200, text=event("t1") + event("t4", "two") + DONE)], streams=True)
    assert is_mixed(two_names, 3)
    assert is_mixed(LoadRequest(streams=False, versions={"one"}, words=[1, 4, 5]), 3)  # 1, 1 and 2 modulo 3
    assert not is_mixed(LoadRequest(streams=False, versions={"one"}, words=[1, 4, 7]), 3)


def test_quantiles_are_of_what_was_answered():
    found = [LoadRequest(streams=False, seconds=float(number), tokens=2) for number in range(1, 101)]
    found.append(LoadRequest(streams=True, seconds=1e6, failed="cut off in a stream"))
    row = summary("x", found, 10.0, versions=3)
    assert (row["requests"], row["answered"], row["p50_s"], row["p99_s"]) == (101, 100, 50.0, 99.0)
    assert row["tokens_per_s"] == 20.0 and row["failed"] == {"cut off in a stream": 1} and row["mixed"] == 0


def test_a_marked_model_draws_words_of_its_own_class_alone(tmp_path):
    from rlhf_ray.bench.flops import Work, shape_of
    from rlhf_ray.bench.random_run import bench_recipe, write_random_run
    from rlhf_ray.config.sampling_params import SamplingParams
    from rlhf_ray.generation.engine import GenerationEngine
    from rlhf_ray.models.load import load_causal_lm
    from rlhf_ray.models.tokenizer import load_tokenizer
    from rlhf_ray.runs.run_folder import RunFolder

    shape = shape_of("4m", layers=1, width=32, heads=2, vocabulary=262)
    recipe = bench_recipe(shape, Work(rows=1, prompt=4, response=20, epochs=1), microbatch=1, precision="float32", resources={})
    write_random_run(recipe, RunFolder(tmp_path), prompts=1, length=1, reward=False)
    model = RunFolder(tmp_path).stage("sft").model
    mark(model, 2, 4)
    engine = GenerationEngine(load_causal_lm(model), load_tokenizer(model))
    (one,) = engine.generate([[3, 9, 4]], [0], SamplingParams(max_new_tokens=20))
    assert len(one.response_ids) >= 1 and {int(token) % 4 for token in one.response_ids} == {2}
    assert len(set(one.response_ids.tolist())) > 1

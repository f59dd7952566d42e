"""vLLM as a server's engine, against plain forward passes of the Hugging Face model. Real vLLM: `make test-vllm`.

Those without the marker need no vLLM: what a server that asks too much of it is told.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_vllm import forward, start_of

from rlhf_ray.config.sampling_params import SamplingParams, TokenRules
from rlhf_ray.errors import UserError
from rlhf_ray.generation.engine_protocol import EngineSetting
from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.serving import loading
from rlhf_ray.serving.config import EngineOptions, Limits
from rlhf_ray.serving.tickets import RowRequest

needs_vllm = pytest.mark.vllm
PROMPTS = [[5, 6, 7, 8], [40, 41, 42], [100, 3, 9, 9, 9], [17]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where there is a GPU, vLLM's build is for it
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return start_of("llama", tmp_path_factory.mktemp("llama") / "run")[2]


@pytest.fixture(scope="module")
def engine(start):
    from rlhf_ray.generation.vllm_serving import VllmServing

    setting = EngineSetting(
        folder=start, model=load_causal_lm(start), tokenizer=load_tokenizer(start), rows=4, max_cache_tokens=3 * 128,
        device=DEVICE,
    )
    return VllmServing(setting)


def run(engine, requests, until=lambda: False):
    """{request: its events}, until all have ended."""
    events = {number: [] for number in requests}
    while any(not found or found[-1].completion is None for found in events.values()) and not until():
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return events


@needs_vllm
def test_rows_join_and_leave_the_batch_and_tell_the_models_own_log_probs(engine, start):
    model, rules = load_causal_lm(start), TokenRules(alternatives=3, ignore_eos=True)
    first = [engine.submit(ids, 0, GREEDY, rules) for ids in PROMPTS[:2]]
    early = [event for _ in range(4) for event in engine.step()]
    gone = engine.submit(PROMPTS[2], 0, GREEDY, rules)
    engine.step()
    assert engine.cancel(gone) and not engine.cancel(gone)
    late = engine.submit(PROMPTS[3], 0, GREEDY, rules)
    events = run(engine, [late])
    for event in early:
        events.setdefault(event.request_id, []).insert(0, event)
    assert engine.step() == [] and gone not in events
    assert len(events[late]) == 12 and [event.completion is None for event in events[late]] == [True] * 11 + [False]
    tokens, done = [event.token_id for event in events[late]], events[late][-1].completion
    assert done.response_ids.tolist() == tokens and done.finish_reason == "length"
    logprobs = torch.from_numpy(forward(model, PROMPTS[3], tokens)).log_softmax(-1)
    assert tokens == logprobs.argmax(-1).tolist()
    for event, line in zip(events[late], logprobs, strict=True):
        top = line.topk(3)
        assert [token for token, _ in event.raw.top] == top.indices.tolist()
        np.testing.assert_allclose([value for _, value in event.raw.top], top.values, atol=1e-4)
        assert event.raw.logprob == pytest.approx(float(line[event.token_id]), abs=1e-4) == event.logprob
    assert {len(events[number]) for number in first} <= {11, 12}


@needs_vllm
def test_a_seed_is_the_draw_whatever_ran_before(engine):
    params = SamplingParams(max_new_tokens=16, temperature=1.3)

    def drawn(seed):
        number = engine.submit(PROMPTS[0], seed, params, TokenRules(ignore_eos=True))
        return [event.token_id for event in run(engine, [number])[number]]

    assert drawn(1) == drawn(1) != drawn(2)


@needs_vllm
def test_rules_and_stops_are_those_of_the_request(engine):
    number = engine.submit(PROMPTS[1], 0, GREEDY, TokenRules(ignore_eos=True))
    plain = [event.token_id for event in run(engine, [number])[number]]
    number = engine.submit(PROMPTS[1], 0, GREEDY, TokenRules(ignore_eos=True, stop_token_ids=(plain[2],)))
    ended = run(engine, [number])[number]
    assert [event.token_id for event in ended] == plain[: plain.index(plain[2]) + 1]
    assert ended[-1].completion.finish_reason == "eos"  # a token that ends the response, and is part of it
    number = engine.submit(PROMPTS[1], 0, GREEDY, TokenRules(ignore_eos=True, logit_bias=((7, 100.0),)))
    assert {event.token_id for event in run(engine, [number])[number]} == {7}


@needs_vllm
def test_a_prompt_is_scored_while_rows_run_and_no_token_of_theirs_is_lost(engine, start):
    number = engine.submit(PROMPTS[0], 0, GREEDY, TokenRules(ignore_eos=True))
    before = engine.step()
    scores = engine.score(PROMPTS[2], 2)
    events = before + run(engine, [number])[number]
    assert len(events) == 12
    logprobs = torch.from_numpy(forward(load_causal_lm(start), PROMPTS[2][:1], PROMPTS[2][1:])).log_softmax(-1)
    assert scores[0] is None and len(scores) == len(PROMPTS[2])
    for one, token, line in zip(scores[1:], PROMPTS[2][1:], logprobs, strict=True):
        assert one.logprob == pytest.approx(float(line[token]), abs=1e-4)
        assert [each for each, _ in one.top] == line.topk(2).indices.tolist()


@needs_vllm
def test_what_it_can_not_do_is_told_in_words(engine):
    assert engine.max_length == 2 * 128  # of three blocks one is left over
    for ids, params, rules, words in (
        ([], GREEDY, None, "no tokens"), ([300], GREEDY, None, "token id 300 is beyond"),
        ([1], replace(GREEDY, max_new_tokens=2 * 128), None, "shorten the prompt"),
        ([1], replace(GREEDY, temperature=0.001), None, "vLLM's least"),
        ([1], GREEDY, TokenRules(alternatives=21), "vLLM tells 20"),
        ([1], GREEDY, TokenRules(json_schema="{}"), "leave response_format out"),
        ([1], GREEDY, TokenRules(logit_bias=((300, 1.0),)), "token id 300 is beyond"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            engine.submit(ids, 0, params, rules)


@needs_vllm
def test_a_server_loads_it_behind_the_same_runner(start):
    threads = torch.get_num_threads()
    try:
        options = EngineOptions(model=str(start), engine="vllm", precision="float32", device=DEVICE)
        limits = Limits(max_rows=2, max_cache_tokens=4 * 128)
        with ThreadPoolExecutor(1) as thread:  # as a replica loads a version
            runner, reader = thread.submit(loading.load, options, limits, loading.Bases()).result()
    finally:
        torch.set_num_threads(threads)
    try:
        assert reader.vocab_size == 300 and type(runner.engine).__name__ == "VllmServing"
        assert len(runner.engine.score(PROMPTS[0], 0)) == len(PROMPTS[0])  # as `publish` compares a version with training

        async def answer():
            ticket, events = runner.submit([RowRequest(prompt_ids=PROMPTS[0], seed=0, params=GREEDY)]), []
            while more := await ticket.events():
                events += more
            return events

        events = asyncio.run(answer())
        assert events[-1][1].completion is not None and len(events) == len(events[-1][1].completion.response_ids)
    finally:
        runner.close()


@pytest.mark.parametrize(
    "options, beside, words",
    [({"adapter": "/some/adapter"}, False, "serves no adapter .*merge it"), ({}, True, "start the server again")],
)
def test_a_second_version_and_adapters_are_refused(options, beside, words):
    threads = torch.get_num_threads()
    try:
        with pytest.raises(UserError, match=words):
            loading.load(EngineOptions(model="/nowhere", engine="vllm", threads=threads, **options), Limits(), beside=beside)
    finally:
        torch.set_num_threads(threads)


def test_a_cache_larger_than_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(loading, "available_memory", lambda: 1000)
    assert loading.check_cache(None, torch.device("cpu"), 10) is None and loading.check_cache(100, torch.device("cpu"), 10) == 100
    with pytest.raises(UserError, match="--max-cache-tokens 101 .*lower it to 100"):
        loading.check_cache(101, torch.device("cpu"), 10)

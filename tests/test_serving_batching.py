"""Requests that share the engine: order, limits, clients that leave, an engine that fails; folders and settings."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from protocol_app import LIMITS, ask, protocol_folder, protocol_served  # noqa: F401 - fixtures

from rlhf_ray.errors import UserError
from rlhf_ray.serving.app import build_app
from rlhf_ray.serving.config import (
    AppConfig,
    Limits,
    is_loopback,
    replica_environment,
    resolve_api_key,
)
from rlhf_ray.serving.model_folder import find_model, model_name
from rlhf_ray.serving.runner import EngineFailed, EngineRunner, Overloaded, RowRequest
from rlhf_ray.serving.streaming import EventStream


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
        from rlhf_ray.config.sampling_params import Completion, TokenEvent

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
    from rlhf_ray.config.sampling_params import SamplingParams

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

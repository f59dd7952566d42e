"""`rlhf-ray bench serve`: requests over HTTP to `rlhf-ray serve`, against the same engine fed in this process.

Each client sends its next request when the last one is answered. The engine alone gets the same requests, as many at a time.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rlhf_ray.bench.flops import Shape, Work
from rlhf_ray.bench.random_run import bench_recipe, cores, random_prompts, torch_that_spins, write_random_run
from rlhf_ray.bench.results import hardware, in_brackets, on_hardware, ratios, show, spread
from rlhf_ray.bench.served_process import NAME, own_server
from rlhf_ray.config import Precision
from rlhf_ray.runs.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Round:
    """What became of a round of requests."""

    seconds: float
    tokens: int
    latencies: list[float]


def measure_serve(
    shape: Shape, work: Work, *, clients: list[int], repeats: int, threads: int, precision: Precision
) -> dict:
    """work.rows requests per round; a row of the result for each number of clients."""
    torch = torch_that_spins()
    threads, before = threads or cores(), torch.get_num_threads()
    torch.set_num_threads(threads)
    recipe = bench_recipe(shape, work, microbatch=work.rows, precision=precision, resources={})
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_bench_") as path:
        folder = RunFolder(Path(path))
        write_random_run(recipe, folder, prompts=1, length=1, reward=False)
        model = folder.stage("sft").model
        engine = _load_engine(model, precision)
        prompts = random_prompts(shape.vocabulary, work.rows, work.prompt, recipe.seed)
        try:
            with own_server(model, "--threads", str(threads), "--precision", precision) as server:
                rows = [_one_number(server.url, engine, prompts, work.response, number, repeats) for number in clients]
        finally:
            torch.set_num_threads(before)
    return {
        "clients": rows,
        "work": {"layers": shape.layers, "width": shape.width, "heads": shape.heads, "vocabulary": shape.vocabulary,
                 "requests": work.rows, "prompt_tokens": work.prompt, "response_tokens": work.response,
                 "precision": precision, "threads": threads, "repeats": repeats},
        "hardware": hardware(),
    }  # fmt: skip


def _one_number(url: str, engine, prompts: list[list[int]], response: int, clients: int, repeats: int) -> dict:
    """HTTP and engine in turn, after a round of each to warm up."""
    served, alone = [], []
    for number in range(repeats + 1):
        over_http = http_round(url, prompts, response, clients)
        by_engine = engine_round(engine, prompts, response, clients)
        if number > 0:
            served.append(over_http)
            alone.append(by_engine)
    latencies = sorted(each for one in served for each in one.latencies)
    rates = [one.tokens / one.seconds for one in served]
    engine_rates = [one.tokens / one.seconds for one in alone]
    return {
        "clients": clients,
        "requests_per_s": spread([len(prompts) / one.seconds for one in served]),
        "tokens_per_s": spread(rates),
        "engine_tokens_per_s": spread(engine_rates),
        "ratio": ratios(rates, engine_rates),
        "latency_p50_s": quantile(latencies, 0.5),
        "latency_p95_s": quantile(latencies, 0.95),
    }


def quantile(ordered: list[float], share: float) -> float:
    """The least value that at least this share of them does not exceed."""
    return ordered[max(0, -(-int(round(share * 1e6)) * len(ordered) // 1_000_000) - 1)]


def http_round(url: str, prompts: list[list[int]], response: int, clients: int) -> Round:
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        parts = list(pool.map(lambda first: list(_client(url, prompts, response, first, clients)), range(clients)))
    seconds = time.perf_counter() - started
    answers = [answer for part in parts for answer in part]
    return Round(seconds, sum(tokens for _, tokens in answers), [latency for latency, _ in answers])


def _client(url: str, prompts: list[list[int]], response: int, first: int, clients: int) -> Iterator[tuple[float, int]]:
    """(latency, tokens) of every clients-th request, over one connection."""
    place = urlsplit(url)
    assert place.hostname is not None  # a server's own URL
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=600)
    for number in range(first, len(prompts), clients):
        body = {"model": NAME, "prompt": prompts[number], "max_tokens": response, "temperature": 1.0, "seed": number}
        sent = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found = json.loads(answer.read())
        assert answer.status == 200, found
        yield time.perf_counter() - sent, found["usage"]["completion_tokens"]
    connection.close()


def _load_engine(model: Path, precision: Precision):
    """As a replica has it."""
    from rlhf_ray.generation.engine import GenerationEngine
    from rlhf_ray.models.load import load_causal_lm
    from rlhf_ray.models.tokenizer import load_tokenizer
    from rlhf_ray.serving.config import Limits
    from rlhf_ray.training.precision import resolve_precision

    causal = load_causal_lm(model, resolve_precision(precision, "cpu"))
    return GenerationEngine(causal, load_tokenizer(model), max_rows=Limits().max_rows)


def engine_round(engine, prompts: list[list[int]], response: int, clients: int) -> Round:
    """Each row's place is taken by the next request as soon as it has ended."""
    from rlhf_ray.config.sampling_params import SamplingParams

    params = SamplingParams(max_new_tokens=response, temperature=1.0)
    left = iter(enumerate(prompts))
    started, tokens, latencies = time.perf_counter(), 0, []
    sent: dict[int, float] = {}

    def submit() -> None:
        for number, prompt in left:
            sent[engine.submit(prompt, number, params)] = time.perf_counter()
            return

    for _ in range(clients):
        submit()
    while events := engine.step():
        tokens += len(events)
        for event in events:
            if event.completion is not None:
                latencies.append(time.perf_counter() - sent.pop(event.request_id))
                submit()
    return Round(time.perf_counter() - started, tokens, latencies)


def show_serve(result: dict, *, as_json: bool) -> None:
    rows = [
        (str(row["clients"]), f"{row['requests_per_s']['median']:.1f}", f"{row['tokens_per_s']['median']:,.0f}",
         f"{row['engine_tokens_per_s']['median']:,.0f}", in_brackets(row["ratio"]),
         f"{1e3 * row['latency_p50_s']:.0f}", f"{1e3 * row['latency_p95_s']:.0f}")
        for row in result["clients"]
    ]  # fmt: skip
    work = result["work"]
    lines = [
        f"{work['requests']} requests per round, {work['prompt_tokens']} + {work['response_tokens']} tokens, "
        f"{work['repeats']} rounds, each followed by the engine's; clients on the same machine ({on_hardware(result)})"
    ]
    columns = ("clients", "requests/s", "tokens/s", "engine tokens/s", "ratio", "p50 ms", "p95 ms")
    show(result, lines, as_json=as_json, columns=columns, rows=rows)

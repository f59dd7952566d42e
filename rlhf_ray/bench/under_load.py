"""`rlhf-ray bench load`: many clients for minutes, while replicas are killed and new versions are published; then the same clients
on the server undisturbed and, if asked, on vLLM's own server with the same model.

Each version writes words of a class of its own (number modulo VERSIONS), so an answer that two versions wrote shows it.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from rlhf_ray.bench.flops import Shape, Work
from rlhf_ray.bench.load_client import LoadRequest, failures, load, retries
from rlhf_ray.bench.random_run import bench_recipe, random_prompts, torch_that_spins, write_random_run
from rlhf_ray.bench.results import hardware, on_hardware, show
from rlhf_ray.bench.serve import quantile
from rlhf_ray.bench.served_process import ServedProcess, own_server, replicas_of, vllm_server
from rlhf_ray.config import Precision
from rlhf_ray.runs.run_folder import RunFolder

PROMPTS = 256
_MARK = 60.0  # logits of a version's own class stand above the others by its square


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a measurement puts on a server. Times in seconds."""

    clients: int = 64
    seconds: float = 600.0
    kill_every_s: float = 30.0
    swaps: int = 3
    replicas: int = 2
    response: int = 48


def measure_load(
    shape: Shape, work: Work, given: Load, *, precision: Precision, vllm_python: Path | None, say: Callable[[str], None]
) -> dict:
    """A row for the server under kills and swaps, one for it undisturbed, and one for vLLM's where there is one."""
    torch_that_spins()
    recipe = bench_recipe(shape, work, microbatch=work.rows, precision=precision, resources={})
    prompts = random_prompts(shape.vocabulary, PROMPTS, work.prompt, recipe.seed)
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_bench_") as path:
        versions = []
        for version in range(given.swaps + 1):
            folder = RunFolder(Path(path) / str(version))
            write_random_run(recipe, folder, prompts=1, length=1, reward=False)
            versions.append(folder.stage("sft").model)
            mark(versions[-1], version, given.swaps + 1)
        options = ("--replicas", str(given.replicas), "--precision", precision)
        with own_server(versions[0], *options) as server:
            say(f"{given.clients} clients for {given.seconds:.0f} s, replicas killed and versions published")
            rows = [_disturbed(server, prompts, versions, given, say)]
            say(_in_words(rows[-1]))
        with own_server(versions[0], *options) as server:
            say(f"{given.clients} clients for {given.seconds:.0f} s, undisturbed")
            rows.append(_quiet("rlhf-ray serve, undisturbed", server, prompts, given))
            say(_in_words(rows[-1]))
        if vllm_python is not None:
            chosen = "bfloat16" if precision == "bfloat16" else "float32" if precision == "float32" else "auto"
            positions = max(512, work.prompt + work.response)
            with vllm_server(vllm_python, versions[0], positions=positions, precision=chosen) as server:
                say(f"{given.clients} clients for {given.seconds:.0f} s, vLLM's server, undisturbed")
                rows.append(_quiet("vLLM's server, undisturbed", server, prompts, given))
    return {"rows": rows, "load": asdict(given), "precision": precision, "hardware": hardware()}


def mark(model: Path, version: int, versions: int) -> None:
    """Rewrite a GPT-2 so that it draws the tokens whose number modulo `versions` is `version`, and no others."""
    import torch
    from safetensors.torch import load_file, save_file

    place = model / "model.safetensors"
    weights = load_file(place)
    table = weights["transformer.wte.weight"]
    for token in range(len(table)):
        table[token, :versions] = 0.0
        table[token, token % versions] = _MARK
    weights["transformer.ln_f.weight"][:versions] = 0.0
    weights["transformer.ln_f.bias"][:versions] = 0.0
    weights["transformer.ln_f.bias"][version] = _MARK
    save_file({name: torch.clone(one) for name, one in weights.items()}, place, metadata={"format": "pt"})


def _quiet(name: str, server: ServedProcess, prompts: list[list[int]], given: Load) -> dict:
    started = time.monotonic()

    def over() -> bool:
        return time.monotonic() > started + given.seconds

    found = asyncio.run(load(server.url, prompts, clients=given.clients, response=given.response, until=over))
    return summary(name, found, time.monotonic() - started, versions=given.swaps + 1)


def _disturbed(
    server: ServedProcess, prompts: list[list[int]], versions: list[Path], given: Load, say: Callable[[str], None]
) -> dict:
    started, killed, published = time.monotonic(), [0], [0]

    async def kill() -> None:
        draws = random.Random(0)
        while True:
            await asyncio.sleep(given.kill_every_s)
            there = replicas_of(server.pid)
            if there:
                os.kill(draws.choice(there), signal.SIGKILL)
                killed[0] += 1

    async def publish() -> None:
        for number, version in enumerate(versions[1:], start=1):
            await asyncio.sleep(max(0.0, started + number * given.seconds / len(versions) - time.monotonic()))
            command = [
                sys.executable,
                "-m",
                "rlhf_ray",
                "publish",
                str(version),
                "--port",
                str(server.port),
                "--watch-s",
                "1",
            ]
            process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            said, _ = await process.communicate()
            published[0] += process.returncode == 0
            if process.returncode != 0:
                say(f"publish failed: {said.decode(errors='replace')[-500:]}")

    async def run() -> list[LoadRequest]:
        killing, publishing = asyncio.ensure_future(kill()), asyncio.ensure_future(publish())

        def until() -> bool:
            return time.monotonic() > started + given.seconds and publishing.done()

        try:
            return await load(server.url, prompts, clients=given.clients, response=given.response, until=until)
        finally:
            killing.cancel()
            await asyncio.gather(killing, publishing, return_exceptions=True)

    found = asyncio.run(run())
    row = summary("rlhf-ray serve, kills and swaps", found, time.monotonic() - started, versions=given.swaps + 1)
    return row | {"killed": killed[0], "published": published[0], "taken_over": taken_over(server.url)}


def taken_over(url: str) -> int:
    """Answers of a server whose replica ended, and that another one took over."""
    page = httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text
    return round(sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("rlhf_ray_taken_over_answers_total")))


def summary(name: str, found: Sequence[LoadRequest], seconds: float, *, versions: int) -> dict:
    """The figures of a measurement. Latencies are of what was answered."""
    answered = [asked for asked in found if asked.failed is None]
    taken = sorted(asked.seconds for asked in answered) or [float("nan")]
    return {
        "name": name,
        "requests": len(found),
        "answered": len(answered),
        "retried": dict(retries(found)),
        "failed": dict(failures(found)),
        "mixed": sum(is_mixed(asked, versions) for asked in found),
        "versions": len({version for asked in found for version in asked.versions}),
        "p50_s": quantile(taken, 0.5),
        "p99_s": quantile(taken, 0.99),
        "tokens_per_s": sum(asked.tokens for asked in answered) / seconds,
        "seconds": seconds,
    }


def is_mixed(asked: LoadRequest, versions: int) -> bool:
    """Whether two versions have written it: it names two, or its words are of two classes."""
    return len(asked.versions) > 1 or len({word % versions for word in asked.words}) > 1


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{status}: {number}" for status, number in sorted(found.items())) or "none"


def _in_words(row: dict) -> str:
    """A row as soon as it is there: what comes after it may fail."""
    over = f", {row['taken_over']} taken over by another replica" if "taken_over" in row else ""
    return (
        f"  {row['answered']} of {row['requests']} answered{over}, sent again {_counts(row['retried'])}, "
        f"failed {_counts(row['failed'])}, by two versions {row['mixed']}, p50 {row['p50_s']:.2f} s, p99 {row['p99_s']:.2f} s"
    )


def show_load(result: dict, *, as_json: bool) -> None:
    rows = [
        (row["name"], str(row["requests"]), str(row["answered"]), _counts(row["retried"]), _counts(row["failed"]),
         str(row["mixed"]),
         f"{row['p50_s']:.2f}", f"{row['p99_s']:.2f}", f"{row['tokens_per_s']:,.0f}")
        for row in result["rows"]
    ]  # fmt: skip
    first, given = result["rows"][0], result["load"]
    did = f"{first['killed']} replicas killed, {first['published']} versions published, {first['taken_over']} answers taken over"
    lines = [
        f"{given['clients']} clients, every other one streaming; {given['seconds']:.0f} s for each row; "
        f"{given['replicas']} replicas ({on_hardware(result)})",
        f"First row: {did} by another replica, {first['versions']} versions in the answers.",
        "sent again: what OpenAI's library would send again, by status or what the connection did; failed: what it would give up.",
    ]
    columns = (
        "server",
        "requests",
        "answered",
        "sent again",
        "failed",
        "by two versions",
        "p50 s",
        "p99 s",
        "tokens/s",
    )
    show(result, lines, as_json=as_json, columns=columns, rows=rows)

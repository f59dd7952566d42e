"""The commands of `rlhf-ray bench`: only their options; what a command does is in the module of its name."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.bench.flops import Work, shape_of
from rlhf_ray.cli.command_errors import in_words
from rlhf_ray.errors import UserError

bench_app = typer.Typer(no_args_is_help=True, help="Benchmarks, as ratios measured in one run.")

Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Size = Annotated[
    str,
    typer.Option(
        help="4m, 14m, 124m (GPT-2), smollm2 or 1b (Llama's blocks); --layers, --width, --heads, --vocab override it"
    ),
]
Layers = Annotated[int | None, typer.Option(help="transformer blocks", min=1)]
Width = Annotated[int | None, typer.Option(help="hidden size", min=1)]
Heads = Annotated[int | None, typer.Option(help="attention heads", min=1)]
Vocab = Annotated[int | None, typer.Option(help="vocabulary", min=260)]
Threads = Annotated[int, typer.Option(help="torch threads; 0: all cores", min=0)]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16")]
Prompt = Annotated[int, typer.Option(help="tokens per prompt", min=1)]
Response = Annotated[int, typer.Option(help="tokens per response", min=1)]
Repeats = Annotated[int, typer.Option(help="rounds after one to warm up", min=1)]


def _precision(value: str):
    if value not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--precision {value!r} is none of auto, float32, bfloat16")
    return value


def _gpu_or_refuse() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("--gpu needs a GPU, and torch finds none here; leave it out, or install torch with CUDA")


def _say(line: str) -> None:
    """To stderr: what is printed with --json is one object."""
    typer.echo(line, err=True)


@bench_app.command("ppo")
@in_words
def bench_ppo(
    size: Size = "4m",
    layers: Layers = None,
    width: Width = None,
    heads: Heads = None,
    vocab: Vocab = None,
    batch: Annotated[int, typer.Option(help="prompts per iteration", min=1)] = 64,
    prompt: Prompt = 32,
    response: Response = 48,
    epochs: Annotated[int, typer.Option(help="PPO epochs", min=1)] = 4,
    lora: Annotated[
        int | None,
        typer.Option(help="rank of adapters at policy and critic, which alone train; default: all weights do", min=1),
    ] = None,
    microbatch: Annotated[
        int, typer.Option(help="rollouts per forward pass, TRL's too; lowered to a divisor of --batch", min=1)
    ] = 32,
    iterations: Annotated[int, typer.Option(help="after one to warm up", min=1)] = 5,
    threads: Threads = 0,
    precision: Precision = "auto",
    against_trl: Annotated[
        bool, typer.Option("--against-trl", help="also TRL's PPOTrainer, in an environment that is made once")
    ] = False,
    trl_python: Annotated[
        Path | None, typer.Option("--trl-python", help="an interpreter that has TRL 1.11, in place of that environment")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="all roles on one GPU, and TRL on it too")] = False,
    json_output: Json = False,
):
    """Whole PPO iterations on random prompts of fixed length, against their arithmetic and, if asked, against TRL."""
    from rlhf_ray.bench import ppo, trl
    from rlhf_ray.training.precision import has_bfloat16

    if gpu:
        _gpu_or_refuse()

    shape = shape_of(size, layers=layers, width=width, heads=heads, vocabulary=vocab)
    work = Work(rows=batch, prompt=prompt, response=response, epochs=epochs, lora_rank=lora)
    python = trl_python or (trl.trl_python(trl.environment_folder(), _say) if against_trl else None)
    microbatch = math.gcd(microbatch, batch)
    settings = {"microbatch": microbatch, "iterations": iterations, "threads": threads, "gpu": gpu}
    result = ppo.measure_ppo(shape, work, precision=_precision(precision), **settings)
    if python is not None:
        bfloat16 = has_bfloat16("cuda" if gpu else "cpu")
        found = trl.measure_trl(shape, work, bfloat16=bfloat16, python=python, **settings)
        result["trl"] = found | {"ratio": result["samples_per_s"] / found["best"]["samples_per_s"]}
    ppo.show_ppo(result, as_json=json_output)


@bench_app.command("generate")
@in_words
def bench_generate(
    size: Size = "4m",
    layers: Layers = None,
    width: Width = None,
    heads: Heads = None,
    vocab: Vocab = None,
    batch: Annotated[int, typer.Option(help="prompts in one batch", min=1)] = 64,
    prompt: Prompt = 32,
    response: Response = 48,
    repeats: Repeats = 5,
    threads: Threads = 0,
    precision: Precision = "auto",
    json_output: Json = False,
):
    """Tokens per second of the generation engine, against model.generate of transformers and, where installed, vLLM."""
    from rlhf_ray.bench.generate import measure_generate, show_generate
    from rlhf_ray.bench.results import take_stdout

    out = take_stdout() if json_output and find_spec("vllm") is not None else None
    shape = shape_of(size, layers=layers, width=width, heads=heads, vocabulary=vocab)
    work = Work(rows=batch, prompt=prompt, response=response, epochs=1)
    result = measure_generate(shape, work, repeats=repeats, threads=threads, precision=_precision(precision))
    show_generate(result, as_json=json_output, out=out)


@bench_app.command("sync")
@in_words
def bench_sync(
    megabytes: Annotated[list[float] | None, typer.Option(help="of the weights (repeatable); 17, 100 and 500")] = None,
    generators: Annotated[int, typer.Option(help="generation actors that get them", min=1)] = 1,
    repeats: Repeats = 5,
    precision: Precision = "auto",
    json_output: Json = False,
):
    """The weight sync over real actors in GB per second, against a copy of as many bytes in memory."""
    from rlhf_ray.bench.sync import measure_sync, show_sync

    sizes = megabytes or [17.0, 100.0, 500.0]
    if min(sizes) < 8:
        raise UserError(
            f"--megabytes {min(sizes):g} is smaller than the smallest model of this benchmark; give 8 or more"
        )
    result = measure_sync(sizes, generators=generators, repeats=repeats, precision=_precision(precision))
    show_sync(result, as_json=json_output)


@bench_app.command("controller")
@in_words
def bench_controller(
    generators: Annotated[int, typer.Option(help="generation actors, pretended", min=1)] = 256,
    processes: Annotated[int, typer.Option(help="that simulate all actors", min=1)] = 2,
    chunks: Annotated[int, typer.Option(help="chunks per step for each generation actor", min=1)] = 1,
    rows: Annotated[int, typer.Option(help="prompts per chunk", min=1)] = 4,
    prompt: Prompt = 64,
    response: Response = 128,
    ranks: Annotated[int, typer.Option(help="of the policy, and of the critic", min=1)] = 4,
    weight_mb: Annotated[int, typer.Option(help="megabytes of a weight sync", min=1)] = 8,
    steps: int = 100,
    json_output: Json = False,
):
    """The controller with many actors: chunks per second, its own CPU time and memory, and whether they stay flat."""
    from rlhf_ray.bench.controller import Crowd, measure_controller, show_controller

    work = Work(rows=generators * chunks * rows, prompt=prompt, response=response, epochs=1)
    crowd = Crowd(generators=generators, processes=processes, rows=rows, work=work, weight_bytes=weight_mb << 20,
                  ranks=ranks)  # fmt: skip
    show_controller(measure_controller(crowd, steps=steps), as_json=json_output)


@bench_app.command("serve")
@in_words
def bench_serve(
    size: Size = "4m",
    layers: Layers = None,
    width: Width = None,
    heads: Heads = None,
    vocab: Vocab = None,
    clients: Annotated[list[int] | None, typer.Option(help="at a time (repeatable); 1, 16 and 64", min=1)] = None,
    requests: Annotated[int, typer.Option(help="a round", min=1)] = 64,
    prompt: Prompt = 32,
    response: Response = 48,
    repeats: Repeats = 3,
    threads: Threads = 0,
    precision: Precision = "auto",
    json_output: Json = False,
):
    """Requests and tokens per second and latencies of the server, against its engine without HTTP."""
    from rlhf_ray.bench.serve import measure_serve, show_serve

    shape = shape_of(size, layers=layers, width=width, heads=heads, vocabulary=vocab)
    work = Work(rows=requests, prompt=prompt, response=response, epochs=1)
    result = measure_serve(
        shape, work, clients=clients or [1, 16, 64], repeats=repeats, threads=threads, precision=_precision(precision)
    )
    show_serve(result, as_json=json_output)


@bench_app.command("load")
@in_words
def bench_load(
    size: Size = "4m",
    layers: Layers = None,
    width: Width = None,
    heads: Heads = None,
    vocab: Vocab = None,
    clients: Annotated[int, typer.Option(help="at a time", min=1)] = 64,
    minutes: Annotated[float, typer.Option(help="of each measurement", min=0.05)] = 10.0,
    kill_every: Annotated[float, typer.Option(help="seconds between two kills of a replica", min=1)] = 30.0,
    swaps: Annotated[int, typer.Option(help="versions that are published meanwhile", min=0, max=7)] = 3,
    replicas: Annotated[int, typer.Option(help="of the server", min=1)] = 2,
    prompt: Prompt = 32,
    response: Response = 48,
    vllm_python: Annotated[
        Path | None, typer.Option("--vllm-python", help="an interpreter with vLLM, whose own server is measured too")
    ] = None,
    precision: Precision = "auto",
    json_output: Json = False,
):
    """Many clients for minutes while replicas are killed and versions published: what fails, what is mixed, how long it takes."""
    from rlhf_ray.bench.under_load import Load, measure_load, show_load

    shape = shape_of(size, layers=layers, width=width, heads=heads, vocabulary=vocab)
    if shape.gated:
        raise UserError(
            f"--size {size} is no GPT-2, and versions are marked in a GPT-2's weights; take 4m, 14m or 124m"
        )
    given = Load(
        clients=clients,
        seconds=60 * minutes,
        kill_every_s=kill_every,
        swaps=swaps,
        replicas=replicas,
        response=response,
    )
    work = Work(rows=clients, prompt=prompt, response=response, epochs=1)
    result = measure_load(shape, work, given, precision=_precision(precision), vllm_python=vllm_python, say=_say)
    show_load(result, as_json=json_output)


@bench_app.command("scale")
@in_words
def bench_scale(
    gpu: Annotated[str, typer.Option(help="h100 or h200")] = "h200",
    batch: Annotated[int, typer.Option(help="prompts per iteration", min=1)] = 1024,
    prompt: Prompt = 512,
    response: Response = 512,
    epochs: Annotated[int, typer.Option(help="PPO epochs", min=1)] = 1,
    json_output: Json = False,
):
    """On paper: seconds and memory of an iteration for models of 7 and 70 billion parameters on 8 to 512 GPUs."""
    from rlhf_ray.bench.scale_model import compute_scale, show_scale

    work = Work(rows=batch, prompt=prompt, response=response, epochs=epochs)
    show_scale(compute_scale(work, gpu=gpu), as_json=json_output)

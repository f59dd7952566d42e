"""How fast this machine multiplies the matrices of a shape: the peak that the benchmarks' arithmetic is held against."""

from __future__ import annotations

import time
from multiprocessing import get_context

from rlhf_ray.bench.flops import Shape

ROUNDS = 7
CALLS = 1000  # per round at most
TIMEOUT_S = 600


def products(shape: Shape, tokens: int, logits: int) -> list[tuple[int, int, int, int]]:
    """(times, rows, inputs, outputs) of a forward pass over `tokens` tokens with the head at `logits` of them."""
    width, inner = shape.width, shape.feed_forward or 4 * shape.width
    return [
        (shape.layers, tokens, width, width + 2 * shape.key_value_width),
        (shape.layers, tokens, width, width),
        (shape.layers * (2 if shape.gated else 1), tokens, width, inner),
        (shape.layers, tokens, inner, width),
        (1, logits, width, shape.vocabulary),
    ]


def matmul_rate(shape: Shape, *, tokens: int, logits: int, threads: int, device: str = "cpu") -> dict:
    """FLOP per second over a forward pass's products, each at the best of its repeats, on `threads` threads of a CPU, or on a GPU.

    In bfloat16 where the device multiplies in it, else float32. In a process of its own: its memory is not the job's.
    """
    spawn = get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send_rate, args=(there, shape, tokens, logits, threads, device))
    process.start()
    there.close()  # so that the process's end is seen
    try:
        if not here.poll(TIMEOUT_S):
            raise RuntimeError(f"the rate of matrix products was not measured within {TIMEOUT_S} s")
        return here.recv()
    except EOFError:
        raise RuntimeError("the process that measures the rate of matrix products ended before it had") from None
    finally:
        process.kill()
        process.join()


def _send_rate(there, *arguments) -> None:
    there.send(_matmul_rate(*arguments))


def _matmul_rate(shape: Shape, tokens: int, logits: int, threads: int, device: str) -> dict:
    import torch

    from rlhf_ray.training.precision import resolve_precision

    dtype = resolve_precision("auto", device)
    torch.set_num_threads(threads)
    flop = seconds = 0.0
    for times, rows, inputs, outputs in products(shape, tokens, logits):
        left = torch.randn(rows, inputs, device=device).to(dtype)
        right = torch.randn(outputs, inputs, device=device).to(dtype)
        of_one = 2.0 * rows * inputs * outputs
        flop += times * of_one
        linear = torch.nn.functional.linear
        seconds += times * min(_timed(device, of_one, linear, left, right) for _ in range(ROUNDS))
    return {
        "flop_per_s": flop / seconds,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "device": device,
    }


def _timed(device: str, flop: float, function, *args) -> float:
    """Seconds per call, over as many as take some milliseconds: a single one includes waking the threads, or a launch."""
    import torch

    again = min(CALLS, max(1, round(5e9 / flop))) if device == "cpu" else 20
    started = time.perf_counter()
    for _ in range(again):
        function(*args)
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / again

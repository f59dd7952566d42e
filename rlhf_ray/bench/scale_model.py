"""`rlhf-ray bench scale`: the cost model of `bench.scale` as a table."""

from __future__ import annotations

from dataclasses import asdict

from rlhf_ray.bench.flops import Work
from rlhf_ray.bench.results import show
from rlhf_ray.bench.scale import GPUS, MODELS, Rates, broadcast_seconds, iteration
from rlhf_ray.errors import UserError

COUNTS = (8, 16, 32, 64, 128, 256, 512)
PHASES = ("generate", "score", "assemble", "update", "sync", "calls")


def compute_scale(work: Work, *, gpu: str, chunk_size: int) -> dict:
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu!r} is none of {', '.join(GPUS)}")
    rates = Rates()
    rows = []
    for name, shape in MODELS.items():
        for count in COUNTS:
            found = iteration(shape, work, count, GPUS[gpu], rates, chunk_size=chunk_size)
            broadcast = broadcast_seconds(shape, GPUS[gpu])
            rows.append(
                {"model": name, "gpus": count, "seconds": found.seconds, "broadcast": broadcast, **asdict(found)}
            )
    return {"gpu": gpu, "rows": rows, "work": asdict(work) | {"chunk_size": chunk_size}, "rates": asdict(rates)}


def show_scale(result: dict, *, as_json: bool) -> None:
    rows, misfits = [], []
    for row in result["rows"]:
        name = f"{row['model']} on {row['gpus']}"
        if row["misfit"]:
            misfits.append(f"{name}: {row['misfit']}")
            continue
        cells = [f"{row['phases'][phase]:.1f}" for phase in PHASES]
        rows.append([name, *cells, f"{row['seconds']:.0f}", f"{row['peak_share']:.0%}", f"{row['broadcast']:.1f}"])
    work = result["work"]
    lines = [
        *misfits,
        *(f"{model}: one generator stands on {split} GPUs, so it takes an engine that splits a model (the in-process one "
          "does not)" for model, split in _splits(result).items()),
        "seconds; peak: share of all GPUs' arithmetic; sync*: as one collective over the GPUs, which this design has not",
        f"a model of costs, no measurement: {work['rows']} prompts of {work['prompt']} tokens, {work['response']} new ones "
        f"each, {work['epochs']} epoch(s), {result['gpu'].upper()}s, nodes of 8; assumptions in "
        "rlhf_ray/bench/scale.py:Rates",
    ]  # fmt: skip
    columns = (f"{result['gpu'].upper()}s", *PHASES, "all", "peak", "sync*")
    show(result, lines, as_json=as_json, columns=columns, rows=rows)


def _splits(result: dict) -> dict[str, int]:
    """Models whose generator one GPU does not hold."""
    return {row["model"]: row["split"] for row in result["rows"] if (row["split"] or 1) > 1}

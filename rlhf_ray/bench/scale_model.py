"""`rlhf-ray bench scale`: the cost model of `bench.scale` as a table."""

from __future__ import annotations

from dataclasses import asdict

from rlhf_ray.bench.flops import Work
from rlhf_ray.bench.results import show
from rlhf_ray.bench.scale import GPUS, MODELS, Rates, bend_of, copy_misfit, iteration
from rlhf_ray.bench.scale_published import PUBLISHED
from rlhf_ray.errors import UserError

COUNTS = (8, 16, 32, 64, 128, 256, 512)
PHASES = ("generate", "score", "assemble", "update", "sync", "calls")


def compute_scale(work: Work, *, gpu: str, chunk_size: int) -> dict:
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu!r} is none of {', '.join(GPUS)}")
    rates, rows, bends = Rates(), [], {}
    for name, shape in MODELS.items():
        found = [(count, iteration(shape, work, count, GPUS[gpu], rates, chunk_size=chunk_size)) for count in COUNTS]
        rows += [{"model": name, "gpus": count, "seconds": each.seconds, **asdict(each)} for count, each in found]
        bends[name] = [words for words in (copy_misfit(shape, GPUS[gpu]), bend_of(found)) if words]
    return {
        "gpu": gpu, "rows": rows, "bends": bends, "work": asdict(work) | {"chunk_size": chunk_size}, "rates": asdict(rates),
        "published": [asdict(each) for each in PUBLISHED],
    }  # fmt: skip


def show_scale(result: dict, *, as_json: bool) -> None:
    rows, misfits = [], []
    for row in result["rows"]:
        name = f"{row['model']} on {row['gpus']}"
        if row["misfit"]:
            misfits.append(f"{name}: {row['misfit']}")
            continue
        cells = [f"{row['phases'][phase]:.1f}" for phase in PHASES]
        rows.append([name, *cells, f"{row['seconds']:.0f}", f"{row['peak_share']:.0%}", f"{row['by_store']:.1f}"])
    work = result["work"]
    lines = [
        *misfits,
        *(f"{model}: one generator stands on {split} GPUs, so it takes vLLM, which splits a model" for model, split in
          _splits(result).items()),
        *(f"{model} bends: {words}" for model, each in result["bends"].items() for words in each),
        "seconds; peak: share of all GPUs' arithmetic; sync: as one collective; store: through the object store instead",
        f"a model of costs, no measurement: {work['rows']} prompts of {work['prompt']} tokens, {work['response']} new ones "
        f"each, {work['epochs']} epoch(s), {result['gpu'].upper()}s, nodes of 8; assumptions in "
        "rlhf_ray/bench/scale.py:Rates",
        "",
        "published by others, of other work on other GPUs (seconds of a step, except where it says what). They are no race, and "
        "a warning: verl's broadcast of 7 B takes 5.5 s or more, where its bytes over the network's rate give less than 1",
        *(f"  {each['system']}, {each['model']} on {each['gpus']}: {each['seconds']} s. {each['work']} ({each['source']})"
          for each in result["published"]),
    ]  # fmt: skip
    columns = (f"{result['gpu'].upper()}s", *PHASES, "all", "peak", "store")
    show(result, lines, as_json=as_json, columns=columns, rows=rows)


def _splits(result: dict) -> dict[str, int]:
    """Models whose generator one GPU does not hold."""
    return {row["model"]: row["split"] for row in result["rows"] if (row["split"] or 1) > 1}

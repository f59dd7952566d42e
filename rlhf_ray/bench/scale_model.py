"""`rlhf-ray bench scale`: the cost model of `bench.scale` as a table, with the memory plan of each row."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_ray.actors.nodes import rented_nodes
from rlhf_ray.bench.flops import Shape, Work
from rlhf_ray.bench.results import show
from rlhf_ray.bench.scale import GPUS, Gpu, Iteration, Rates, bend_of, evaluation_seconds, iteration, step_seconds
from rlhf_ray.bench.scale_plan import APART, MODELS, NODE, WAYS, Misfit, Plan, examined, planned, write_config
from rlhf_ray.bench.scale_published import PUBLISHED
from rlhf_ray.errors import UserError
from rlhf_ray.models.evaluation_memory import SERVED_ROWS

COUNTS = (8, 16, 32, 64, 128, 256, 512)
PHASES = ("generate", "score", "update", "turns", "sync")


def compute_scale(work: Work, *, gpu: str, counts: Sequence[int] = COUNTS) -> dict[str, Any]:
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu!r} is none of {', '.join(GPUS)}")
    rates, rows, bends, alone = Rates(), [], {}, {}
    with tempfile.TemporaryDirectory() as place:
        for name, shape in MODELS.items():
            folder = Path(place) / name
            write_config(folder, shape)
            for way in WAYS:
                found: list[tuple[int, Iteration]] = []
                for count in counts:
                    plan = planned(folder, work, way, count, gpu.upper())
                    row: dict[str, Any] = {"model": name, "way": way, "gpus": count}
                    if isinstance(plan, Misfit):
                        rows.append(row | {"misfit": plan.words})
                        continue
                    found.append((count, iteration(shape, work, plan, GPUS[gpu], rates)))
                    rows.append(row | {"misfit": "", "plan": asdict(plan), "seconds": found[-1][1].seconds} | asdict(found[-1][1]))
                bends[f"{name}, {way}"] = bend_of(found) if found else "it fits nowhere up to here"
            alone[name] = _alone(folder, shape, work, gpu, rates)
    return {
        "gpu": gpu, "rows": rows, "bends": bends, "alone": alone, "work": asdict(work), "rates": asdict(rates),
        "published": [asdict(each) for each in PUBLISHED],
    }  # fmt: skip


def _alone(folder: Path, shape: Shape, work: Work, kind: str, rates: Rates) -> dict[str, dict[str, Any]]:
    """Evaluation and server: one process each, however many GPUs there are; the fewest that hold a generator."""
    nodes, gpu = rented_nodes(f"1x{NODE}x{kind.upper()}"), GPUS[kind]
    found: dict[str, dict[str, Any]] = {}
    for stage in ("evaluation", "serving"):
        plan: Plan | Misfit = Misfit("")
        for split in (1, 2):  # an eighth and a quarter of these
            tried = Plan(way=APART, count=NODE, split=split, rows=64, microbatch_rows=1, offloads=False)
            plan = examined(folder, work, tried, nodes, stage)
            if isinstance(plan, Plan):
                break
        if isinstance(plan, Misfit):
            found[stage] = {"misfit": plan.words}
        else:
            found[stage] = {"misfit": "", "fullest": plan.fullest, "split": plan.split, "rows": plan.rows}
            found[stage] |= _rate(stage, shape, work, plan, gpu, rates)
    return found


def _rate(stage: str, shape: Shape, work: Work, plan: Plan, gpu: Gpu, rates: Rates) -> dict[str, float]:
    if stage == "evaluation":
        return {"seconds": evaluation_seconds(shape, work, plan, gpu, rates)}
    return {"tokens_per_s": SERVED_ROWS / step_seconds(shape, work, SERVED_ROWS, 1, gpu, rates)}


def show_scale(result: dict[str, Any], *, as_json: bool) -> None:
    rows, work = [], result["work"]
    for row in result["rows"]:
        if row["misfit"]:
            continue
        plan = row["plan"]
        phases = row["phases"] | row["slower"]
        cells = [*(phases[phase] for phase in PHASES), phases["assemble"] + phases["calls"], row["seconds"]]
        more = [f"{row['peak_share']:.0%}", f"{plan['fullest'] / 1e9:.0f}"]
        rows.append([_name(row), *(f"{cell:.1f}" for cell in cells), *more])
    lines = [
        *(f"{_name(row)} does not fit: {row['misfit']}" for row in result["rows"] if row["misfit"]),
        *(f"{name} bends: {words}" for name, words in result["bends"].items()),
        *_of_one_process(result),
        "",
        *(f"{way}: {words}" for way, words in WAYS.items()),
        "seconds; turns: what shared GPUs send to the host and back; sync: the weights' way, by one broadcast, or on shared GPUs "
        "by the object store; rest: experience and calls; all: of an iteration, ahead the slower side's; peak: share of all GPUs' "
        "arithmetic; GB: of the fullest GPU in PPO, by the memory plan (--json has the recipe's sizes)",
        f"a model of costs, no measurement: {work['rows']} prompts of {work['prompt']} tokens, {work['response']} new ones "
        f"each, {work['epochs']} epoch(s), {result['gpu'].upper()}s, nodes of {NODE}; Llama 2's shapes, vLLM, ZeRO-3, gradient "
        "checkpoints; assumptions in rlhf_ray/bench/scale.py:Rates",
        "",
        "published by others, of other work on other GPUs (seconds of a step, except where it says what). They are no race, and "
        "a warning: verl's broadcast of 7 B takes 5.5 s or more, where its bytes over the network's rate give less than 1",
        *(f"  {each['system']}, {each['model']} on {each['gpus']}: {each['seconds']} s. {each['work']} ({each['source']})"
          for each in result["published"]),
    ]  # fmt: skip
    columns = (f"{result['gpu'].upper()}s", *PHASES, "rest", "all", "peak", "GB")
    show(result, lines, as_json=as_json, columns=columns, rows=rows)


def _name(row: dict[str, Any]) -> str:
    return f"{row['model']} on {row['gpus']} {row['way']}"


def _of_one_process(result: dict[str, Any]) -> Iterator[str]:
    rows = result["work"]["rows"]
    for model, stages in result["alone"].items():
        for stage, found in stages.items():
            begin = f"{model}, {stage}, one process however many GPUs there are: "
            if found["misfit"]:
                yield f"{begin}does not fit: {found['misfit']}"
            elif stage == "evaluation":
                yield f"{begin}{found['seconds']:.0f} s for {rows} responses of two models each, {found['fullest'] / 1e9:.0f} GB"
            else:
                yield f"{begin}{found['tokens_per_s']:.0f} tokens/s of {SERVED_ROWS} rows, {found['fullest'] / 1e9:.0f} GB"

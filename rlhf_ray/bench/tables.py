"""The JSON of `results/bench/run.sh` as the tables of table.md and as plot.png: python -m rlhf_ray.bench.tables [FOLDER]"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("results/bench")
SIZES = ("4m", "14m", "124m")
PHASES = ("generate", "score", "assemble", "update", "sync")


def load(name: str) -> dict | None:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def three(found: dict[str, float], digits: int = 2) -> str:
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def ppo_lines(runs: dict[str, dict]) -> list[str]:
    lines = [
        "| PPO iteration | samples per second | TRL 1.11, float32 | TRL 1.11, bf16 autocast | times TRL's better one | "
        "memory, GB | TRL's |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, run in runs.items():
        trl = {each["precision"]: each for each in run["trl"]["runs"]}
        rates = [f"{run['samples_per_s']:.3g}"] + [
            f"{trl[name]['samples_per_s']:.3g}" if name in trl else "–" for name in ("float32", "bf16 autocast")
        ]
        lines.append(
            f"| {size}, {run['work']['prompts']} prompts | "
            + " | ".join(rates)
            + f" | {run['trl']['ratio']:.2f} | {run['pss_gb']:.2f} | {run['trl']['best']['pss_gb']:.2f} |"
        )
    lines += [
        "", "| seconds (share of the matmul rate's arithmetic, all of it) | " + " | ".join(PHASES) + " | iteration | "
        "of what is needed | Ray's share |", "|---|" + "---|" * (len(PHASES) + 3),
    ]  # fmt: skip
    for size, run in runs.items():
        cells = [
            f"{row['seconds']:.2f}" + (f" ({row['peak_share']:.0%})" if row["flop"] else "") for row in run["floor"]
        ]
        rate = run["matmul"]["flop_per_s"] / 1e9
        lines.append(
            f"| {size}, {rate:,.0f} GFLOP/s | " + " | ".join(cells) + f" | {run['computed'][-1]['peak_share']:.0%} | "
            f"{run['waiting']['iteration']:.1%} |"
        )
    return lines


def generate_lines(runs: dict[str, dict]) -> list[str]:
    names = ["engine", "model.generate, bfloat16", "model.generate, float32", "vLLM"]
    lines = ["| tokens per second (engine: times as fast) | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for size, run in runs.items():
        ways = {way["way"]: way for way in run["ways"]}
        cells = []
        for name in names:
            way = ways.get(name)
            cell = "–" if way is None else f"{way['tokens_per_s']['median']:,.0f}"
            cells.append(cell + (f" ({three(way['ratio'])})" if way and way["ratio"] else ""))
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return lines


def other_lines() -> list[str]:
    lines = ["| command | yardstick | ratio: median (least to most) | besides |", "|---|---|---|---|"]
    for size in (load("sync") or {"sizes": []})["sizes"]:
        lines.append(
            f"| `bench sync`, {size['megabytes']:.0f} MB | a copy in memory by one thread | {three(size['ratio'], 3)} | "
            f"{three(size['gb_per_s'])} GB/s |"
        )
    if controller := load("controller"):
        work, cpu = controller["work"], controller["cpu_s_per_step"]["median"]
        lines.append(
            f"| `bench controller`, {work['generators']} generators | as many bare Ray calls | {three(controller['ratio'])} | "
            f"{controller['chunks_per_s']:.0f} chunks per second, {cpu:.2f} s of CPU per step |"
        )
    for one in (load("serve") or {"clients": []})["clients"]:
        lines.append(
            f"| `bench serve`, clients: {one['clients']} | the engine without HTTP | {three(one['ratio'])} | "
            f"latency {one['latency_p50_s'] * 1000:.0f} ms, {one['latency_p95_s'] * 1000:.0f} at 95 % |"
        )
    return lines


def plot(ppo: dict[str, dict], generate: dict[str, dict]) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 3.6))
    for place, run in enumerate(ppo.values()):
        bars = [run["samples_per_s"], *(each["samples_per_s"] for each in run["trl"]["runs"])]
        base = run["trl"]["best"]["samples_per_s"]
        for number, bar in enumerate(bars):
            left.bar(place + 0.27 * (number - 1), bar / base, 0.25, color=f"C{number}")
        seconds = {row["phase"]: row["seconds"] for row in run["floor"]}
        bottom = 0.0
        for number, phase in enumerate(("generate", "score", "update")):
            share = seconds[phase] / seconds["iteration"]
            middle.bar(place, share, 0.5, bottom=bottom, color=f"C{number + 3}")
            bottom += share
        middle.hlines(run["floor"][-1]["peak_share"], place - 0.3, place + 0.3, color="black", linewidth=2)
    left.set_ylim(top=1.3 * max(run["trl"]["ratio"] for run in ppo.values()))
    middle.set_ylim(top=1.35)
    left.set_title("samples per second over TRL's better precision", fontsize=10)
    who = ["rlhf_ray", *(f"TRL, {each['precision']}" for each in next(iter(ppo.values()))["trl"]["runs"])]
    left.legend([plt.Rectangle((0, 0), 1, 1, color=f"C{number}") for number in range(len(who))], who, fontsize=8)
    middle.set_title("share of an iteration; line: arithmetic at the matmul rate", fontsize=10)
    middle.legend(
        [plt.Rectangle((0, 0), 1, 1, color=f"C{number + 3}") for number in range(3)],
        ["generate", "score", "update"], fontsize=8, loc="upper right",
    )  # fmt: skip
    for axis in (left, middle):
        axis.set_xticks(range(len(ppo)), list(ppo))
    names: dict[str, int] = {}
    for place, run in enumerate(generate.values()):
        for number, way in enumerate(run["ways"]):
            names[way["way"]] = number
            right.bar(place + 0.2 * (number - 1.5), way["tokens_per_s"]["median"], 0.18, color=f"C{number}")
    right.set_yscale("log")
    right.set_xticks(range(len(generate)), list(generate))
    right.set_title("generated tokens per second, 64 prompts", fontsize=10)
    right.legend(
        [plt.Rectangle((0, 0), 1, 1, color=f"C{number}") for number in names.values()], list(names), fontsize=8
    )
    for axis in (left, middle, right):
        axis.tick_params(labelsize=9)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(FOLDER / "plot.png", dpi=110)


def main() -> None:
    ppo = {size: run for size in SIZES if (run := load(f"ppo_{size}"))}
    generate = {size: run for size in SIZES if (run := load(f"generate_{size}"))}
    lines = [*ppo_lines(ppo), "", *generate_lines(generate), "", *other_lines()]
    (FOLDER / "table.md").write_text("\n".join(lines) + "\n")
    plot(ppo, generate)
    print("\n".join(lines))


if __name__ == "__main__":
    main()

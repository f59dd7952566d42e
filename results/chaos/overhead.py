"""What recovery and checkpoints take from a run that nothing disturbs: the same PPO with and without them, in turn.

    rlhf-ray run demo --run-dir runs/demo                          # or any finished run
    python results/chaos/overhead.py runs/demo runs/overhead       # a machine that does nothing else: half an hour on two cores
    python results/chaos/overhead.py --table                       # writes overhead.md from overhead.json again

With: the state of policy and critic is copied to the memory of another process after every step (`resources.snapshot_every` 1, the
default), and a checkpoint is written every 6 steps (20 by default). Without: neither. Deadlines, names of waits and events are in
both. Both draw the same numbers and end in the same bits, so step i of one is compared with step i of the other.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

from rlhf_ray.bench.results import hardware, on_hardware

HERE = Path(__file__).parent
STEPS, EVERY = 12, 6
ARMS = {
    "with": {"ppo.checkpoint_every": EVERY},
    "without": {"ppo.checkpoint_every": 10**6, "resources.snapshot_gb": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a finished run")
    parser.add_argument("runs", nargs="?", type=Path, help="where the run folders go")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="write overhead.md, and do nothing else")
    asked = parser.parse_args()
    if asked.table:
        return write_table(json.loads((HERE / "overhead.json").read_text()))
    if asked.run is None or asked.runs is None:
        parser.error("give a finished run and a folder for the runs")
    pairs = []
    for number in range(asked.pairs):
        names = list(ARMS) if number % 2 == 0 else list(ARMS)[::-1]
        pairs.append({name: measured(asked.run, asked.runs / f"{number}-{name}", ARMS[name]) for name in names})
        print(f"pair {number}: {json.dumps({name: round(sum(each['step_s']), 1) for name, each in pairs[-1].items()})}", flush=True)
    found = {"steps": STEPS, "checkpoint_every": EVERY, "pairs": pairs}
    (HERE / "overhead.json").write_text(json.dumps(found, indent=1) + "\n")
    write_table(found)


def measured(run: Path, folder: Path, settings: dict[str, object]) -> dict[str, object]:
    """Run PPO alone -> the seconds of each of its steps, and of the stage."""
    recipe = (run / "recipe.yaml").absolute()
    told = [f"--set={key}={value}" for key, value in {"ppo.steps": STEPS, "evaluation": "null", **settings}.items()]
    if not (folder / "ppo" / "DONE").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".log"), "w") as log:
            command = [sys.executable, "-m", "rlhf_ray", "run", str(recipe), "--start-from", str(run.absolute())]
            subprocess.run([*command, "--run-dir", str(folder), *told], stdout=log, stderr=subprocess.STDOUT, check=True)
    rows = [json.loads(line) for line in (folder / "ppo" / "metrics.jsonl").read_text().splitlines()]
    return {
        "step_s": [row["time/step_s"] for row in rows if "time/step_s" in row],
        "ppo_s": json.loads((folder / "timings.json").read_text())["ppo"],
    }


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95 %, by a bootstrap over the pairs of steps."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return statistics.fmean(ratios), means[249], means[9749]


def write_table(found: dict) -> None:
    """The first step of a run waits for what every first call does, and is left out."""
    ratios = [
        ours / bare
        for pair in found["pairs"]
        for ours, bare in zip(pair["with"]["step_s"][1:], pair["without"]["step_s"][1:], strict=True)
    ]
    mean, low, high = interval(ratios)
    stages = ", ".join(f"{pair['with']['ppo_s'] / pair['without']['ppo_s']:.3f}" for pair in found["pairs"])
    seconds = statistics.fmean(value for pair in found["pairs"] for value in pair["without"]["step_s"][1:])
    text = f"""\
# What recovery takes from a run that nothing disturbs

The same {STEPS} steps of PPO (demo), in turn with a copy of the trained state in memory after every step (the default) and a
checkpoint every {EVERY} steps (20 by default), and without either. Deadlines and events are in both. Back to [chaos](README.md).

```bash
python results/chaos/overhead.py runs/demo runs/overhead
```

Measured on {on_hardware({"hardware": hardware()})}.

A step with them takes {mean:.3f} times as long as without (95 %: {low:.3f} to {high:.3f}; {len(ratios)} pairs of equal steps of
{seconds:.1f} s, without the first of each run). The whole stage, its start and end included: {stages} times.
"""
    (HERE / "overhead.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

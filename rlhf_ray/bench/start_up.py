"""How long the PPO stage takes to start on a running Ray: seconds from the command to its first row of metrics.

    cluster/head.sh
    python -m rlhf_ray.bench.start_up RUN_DIR [--recipe demo] [--address auto] [--repeats 5]
    cluster/stop.sh

RUN_DIR: a run folder of that recipe whose stages before PPO are done; each repeat works in a copy. The first row is written
after PPO's actors are up, hold their models and have evaluated the model that PPO starts from.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEADLINE_S = 300


def seconds_to_first_row(finished: Path, recipe: str, address: str | None) -> float:
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_start_") as path:
        folder = Path(path) / "run"
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("ppo", "evaluation", "logs", ".lock"))
        where = [] if address is None else ["--address", address]
        command = [sys.executable, "-m", "rlhf_ray.cli.main", "ppo", recipe, "--run-dir", str(folder), *where]
        metrics, began = folder / "ppo" / "metrics.jsonl", time.monotonic()
        process = subprocess.Popen([*command, "--set", "ppo.steps=1"], stdout=subprocess.DEVNULL)
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None or time.monotonic() - began > DEADLINE_S:
                process.kill()
                raise SystemExit(f"no row in {metrics} (exit status {process.wait()} after {DEADLINE_S} s at most)")
            time.sleep(0.02)
        seconds = time.monotonic() - began
        if process.wait(timeout=DEADLINE_S):
            raise SystemExit(f"the command ended with {process.returncode}")
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--address", help="a running Ray, 'auto' or HOST:PORT; without it each repeat starts its own")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if not (options.run_dir / "reward" / "DONE").exists():
        parser.error(f"{options.run_dir} holds no finished reward stage; make it with rlhf-ray reward")
    seconds = [seconds_to_first_row(options.run_dir, options.recipe, options.address) for _ in range(options.repeats)]
    result = {"address": options.address, "seconds": [round(value, 2) for value in seconds]}
    print(json.dumps(result | {"median": round(statistics.median(seconds), 2)}))


if __name__ == "__main__":
    main()

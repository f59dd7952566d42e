"""TRL's PPOTrainer on the work of `bench ppo`, in a virtual environment of its own: 1.11 was the last release to have it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from rlhf_ray.bench.flops import Shape, Work
from rlhf_ray.bench.yardsticks import __file__ as yardsticks
from rlhf_ray.errors import RunFailed, UserError

SCRIPT = Path(yardsticks).with_name("trl_ppo.py")
PACKAGES = ("torch==2.13.*", "trl==1.11.*", "transformers<5.20", "datasets", "accelerate", "rich", "peft")
# Ours, set by the command line for its own actors: TRL gets the defaults of its libraries.
OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "DS_ACCELERATOR", "PYTHONPATH", "RAY_AUTH_MODE")


def environment_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rlhf_ray" / "trl-1.11"


def trl_python(folder: Path, say=lambda line: None) -> Path:
    """The interpreter of the environment, which is made if it is not there."""
    python, done = folder / "bin" / "python", folder / ".installed"
    if done.exists() and done.read_text().split("\n") == [*PACKAGES]:
        return python
    say(f"making {folder} with {', '.join(PACKAGES)}; once, it takes minutes and 2 GB or more")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES],
    ):
        made = subprocess.run(command, capture_output=True, text=True, check=False, env=_clean_environment())
        if made.returncode != 0:
            last = (made.stderr.strip() or made.stdout.strip() or "no words").splitlines()[-1]
            raise UserError(
                f"TRL's environment could not be made in {folder} ({last}); give this machine a package index, or leave out "
                "--against-trl"
            )
    done.write_text("\n".join(PACKAGES))
    return python


def measure_trl(
    shape: Shape,
    work: Work,
    *,
    microbatch: int,
    iterations: int,
    threads: int,
    bfloat16: bool,
    python: Path,
    gpu: bool = False,
) -> dict:
    """The runs in both precisions (in float32 alone where the device has no bfloat16), and the better one."""
    runs, device = [], ["--gpu"] if gpu else []
    for flags in (device, [*device, "--bf16"]) if bfloat16 else (device,):
        # -P: the script's folder is not searched for modules
        command = [str(python), "-P", str(SCRIPT), *arguments(shape, work, microbatch, iterations, threads), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_clean_environment())
        if done.returncode != 0:
            raise RunFailed(f"TRL's run failed: {(done.stderr.strip() or 'no words').splitlines()[-1]}")
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return {"runs": runs, "best": max(runs, key=lambda run: run["samples_per_s"])}


def arguments(shape: Shape, work: Work, microbatch: int, iterations: int, threads: int) -> list[str]:
    values = {"layers": shape.layers, "width": shape.width, "heads": shape.heads, "vocabulary": shape.vocabulary,
              "batch": work.rows, "prompt": work.prompt, "response": work.response, "epochs": work.epochs,
              "microbatch": microbatch, "iterations": iterations, "threads": threads}  # fmt: skip
    values |= {"kv-heads": shape.key_value_heads or shape.heads, "lora": work.lora_rank or 0}
    given = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return [*given, "--llama"] if shape.gated else given


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in OURS}

"""results/gpu/first_hour.sh and its measurements, as far as they can be tried without a GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from rlhf_ray.bench import first_hour
from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.generation import ragged_decoder

SCRIPT = Path(__file__).parent.parent / "results" / "gpu" / "first_hour.sh"
STUB = """#!/bin/bash
printf '%s\\x1f' "$(basename "$0")" "$@" >> "$CALLS"; echo >> "$CALLS"
case "$*" in *doctor*) echo "that does not fit" >&2; exit 3 ;; *) echo "figures of $1" ;; esac
"""


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """(output, the commands, each a list) of the script where all programs only say what they were asked."""
    folder = tmp_path_factory.mktemp("first hour")
    for name in ("rlhf-ray", "python", "nvidia-smi"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls"), "GPUS": "8"}
    done = subprocess.run([SCRIPT, folder / "out"], env=environment, capture_output=True, text=True, timeout=120)
    calls = [line.split("\x1f")[:-1] for line in (folder / "calls").read_text().splitlines()]
    return done, calls


def test_it_stops_at_nothing_and_ends_with_a_table(dry_run):
    done, _ = dry_run
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0].split()[:2] == ["item", "check"]
    assert [line.split()[0] for line in lines[1:]] == sorted(line.split()[0] for line in lines[1:])
    assert {line.split()[0] for line in lines[1:]} == {f"{number:02}" for number in range(15)}
    failed = [line for line in lines if "FAILED" in line]
    assert len(failed) == 1 and "plan of memory" in failed[0] and "FAILED (3)" in failed[0] and "does not fit" in failed[0]


def test_its_recipes_and_measurements_are_real_ones(dry_run):
    _, calls = dry_run
    recipes = [call for call in calls if call[0] == "rlhf-ray" and call[2] == "demo"]
    assert len(recipes) > 12
    for call in recipes:
        load_recipe("demo", [call[place + 1] for place, word in enumerate(call) if word == "--set"])
    measured = [call[3] for call in calls if call[1:3] == ["-m", "rlhf_ray.bench.first_hour"]]
    assert sorted(measured) == sorted(first_hour.CHECKS)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="there is no shellcheck")
def test_it_is_clean():
    subprocess.run(["shellcheck", SCRIPT], check=True)


@pytest.mark.thorough
def test_its_measurements_run():
    """On this machine's CPU, with a tiny model: figures of no interest, but for what must be equal anywhere."""
    as_set = ragged_decoder.PREFILL_TOKENS
    figures = {check: first_hour.main([check, "--device", "cpu", "--small"]) for check in first_hour.CHECKS}
    assert figures["decode"]["rows with the same tokens"] > 0.5 and figures["decode"]["first log-prob differs by"] < 0.1
    assert figures["frozen"]["bits equal"]
    assert figures["head"]["gradients differ by"] < 0.05
    assert figures["first_kl"]["k3"] < 1e-3
    assert as_set == ragged_decoder.PREFILL_TOKENS  # 600 of them, left behind, once failed a test of another file

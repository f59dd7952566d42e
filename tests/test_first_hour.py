"""results/gpu/first_hour.sh and its measurements, as far as they can be tried without a GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click import Group
from typer.main import get_command

from rlhf_ray.actors.ray_stages import cluster_problems
from rlhf_ray.bench import first_hour
from rlhf_ray.cli.main import app
from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.generation import ragged_decoder

SCRIPT = Path(__file__).parent.parent / "results" / "gpu" / "first_hour.sh"
STUB = """#!/bin/bash
printf '%s\\x1f' "$(basename "$0")" "$@" >> "$CALLS"; echo >> "$CALLS"
case "$*" in *doctor*) echo "that does not fit" >&2; exit 3 ;; *) echo "figures of $1" ;; esac
"""


ROWS = {f"{number:02}" for number in range(15)}  # the environment, and 14 items


def without_gpus(folder):
    """The script's output on a machine whose nvidia-smi finds none, and that would fail at any other program."""
    for name in ("rlhf-ray", "python", "nvidia-smi"):
        (folder / name).write_text("#!/bin/bash\necho 'No devices were found'; exit 9")
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run([SCRIPT, folder / "out"], env=environment, capture_output=True, text=True, timeout=120)


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
    assert {line.split()[0] for line in lines[1:]} == ROWS
    failed = [line for line in lines if "FAILED" in line]
    assert len(failed) == 1 and "plan of memory" in failed[0] and "FAILED (3)" in failed[0] and "does not fit" in failed[0]


def test_its_recipes_and_measurements_are_real_ones(dry_run):
    _, calls = dry_run
    recipes = [call for call in calls if call[0] == "rlhf-ray" and call[2] == "demo"]
    assert len(recipes) > 12
    node = {"CPU": 224.0, "GPU": 8.0}
    for call in recipes:
        recipe = load_recipe("demo", [call[place + 1] for place, word in enumerate(call) if word == "--set"])
        assert cluster_problems(recipe, recipe.stages, [node]) == []
    measured = [call[3] for call in calls if call[1:3] == ["-m", "rlhf_ray.bench.first_hour"]]
    assert sorted(measured) == sorted(first_hour.CHECKS)


def test_its_commands_have_these_options(dry_run):
    _, calls = dry_run
    for _, *words in (call for call in calls if call[0] == "rlhf-ray"):
        command, path = get_command(app), ["rlhf-ray"]
        while isinstance(command, Group):
            path.append(words.pop(0))
            command = command.commands[path[-1]]
        command.make_context(" ".join(path), words)  # raises for an option that is not there


def test_models_are_trained_once(dry_run):
    """What begins with the models of row 00 has the same stages before PPO, or it would be refused."""
    _, calls = dry_run
    begun = [call for call in calls if "--start-from" in call]
    assert len(begun) > 12 and len({call[call.index("--start-from") + 1] for call in begun}) == 1
    for call in begun:
        assert not [word for word in call if word.startswith(("sft.", "reward.", "fluency.")) and not word.endswith(("=1", "=0.5"))]


def test_without_a_gpu_each_row_says_so(tmp_path):
    done = without_gpus(tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and {line.split()[0] for line in lines[1:]} == ROWS
    assert all("no GPU" in line and "and there are 0" in line for line in lines[1:]), done.stdout


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

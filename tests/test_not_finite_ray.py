"""Whole stages over Ray that meet a number that is not finite: they stop at once, and every file they leave is finite."""

import json
import math
import os

import pytest
import torch
from cats import STAGE, cats_folder, cats_tokenizer, recipe_of  # noqa: F401 - fixtures
from safetensors.torch import load_file, save_file
from tiny import tiny_recipe, write_start

from rlhf_ray.actors.ppo_stage import run_ppo
from rlhf_ray.actors.supervised import run_supervised
from rlhf_ray.errors import NotFinite, UserError
from rlhf_ray.ppo import checkpoint
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.sealed import MANIFEST, digest_of

pytestmark = pytest.mark.ray


def late(prompts, responses):
    """1e39 for a prompt of the third step, known by its file: held-out prompts never get it."""
    held_out = any(text.endswith(str(number)) for text in prompts for number in range(16, 24))
    late.calls = getattr(late, "calls", 0) + (not held_out)
    return [1e39 if late.calls > 4 and not held_out else -float(len(text)) for text in responses]


def all_finite(path):
    files = [*path.rglob("*.safetensors")]
    return bool(files) and all(torch.isfinite(tensor).all() for file in files for tensor in load_file(file).values())


@pytest.mark.thorough
def test_ppo_stops_before_the_update_and_goes_on_from_a_finite_checkpoint(session, tmp_path):
    recipe = tiny_recipe(ppo={"reward_function": "test_not_finite_ray:late", "checkpoint_every": 1, "critic_init": "sft"})
    run = write_start(recipe, RunFolder(tmp_path / "run"))
    with pytest.raises(UserError, match=r"late returned 1e\+39 for prompt 'please tell.*\(step 2, prompt \d+, sample 0\)$"):
        run_ppo(recipe, run, lambda progress: None)
    stage = run.stage("ppo")
    last = checkpoint.last_good(stage.checkpoints)
    assert last.name == "step_000002" and all_finite(stage.checkpoints) and not stage.model.exists()
    rows = [json.loads(line) for line in stage.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]

    # A checkpoint without the optimiser's moments, its manifest made anew.
    file = last / "policy-00-of-01.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if name.startswith("weight/")}
    save_file(weights, file, metadata={"steps_taken": "8"})
    manifest = json.loads((last / MANIFEST).read_text())
    manifest[file.name] = digest_of(file)
    (last / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"step_000002 \(policy\) has no optimiser moments \(exp_avg\) for \d+ of \d+ .*delete it"):
        run_ppo(recipe, run, lambda progress: None)


TWO_RANKS = {"workers": 2, "microbatch_size": 4, "zero_stage": 2, "threads": 1}


@pytest.mark.parametrize("options", [
    pytest.param({}, id="one rank", marks=pytest.mark.thorough), pytest.param(TWO_RANKS, id="two ranks, ZeRO-2"),
])  # fmt: skip
def test_sft_that_blows_up_fails_at_once_and_leaves_no_file(session, folder, tmp_path, options):
    run = RunFolder(tmp_path)
    os.symlink(folder.path / "data", run.path / "data")
    recipe = recipe_of(sft=STAGE | {"learning_rate": 1e37, "checkpoint_minutes": 1e-4, "epochs": 2} | options)
    with pytest.raises(NotFinite, match="lower the stage's learning_rate"):
        run_supervised(recipe, run, "sft")
    stage = run.stage("sft")
    assert not stage.done and not stage.model.exists()
    assert not run.events.exists(), "no restart: the next try would come to the same number"
    for file in stage.checkpoints.rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())
    for line in stage.metrics.read_text().splitlines():
        assert math.isfinite(json.loads(line)["loss"])

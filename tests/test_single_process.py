"""The one-file PPO takes the steps that the distributed loop takes."""

import subprocess
import sys

import pytest
from differences import saw
from in_process import LocalRoles
from test_loop import Diary, real_loop
from tiny import tiny_recipe, write_start

from rlhf_ray.errors import UserError
from rlhf_ray.ppo.single_process import PlainPPO
from rlhf_ray.runs.run_folder import RunFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_start(tiny_recipe(), RunFolder(tmp_path_factory.mktemp("plain")))


def test_it_takes_the_same_steps_as_the_loop(folder):
    """Chunks of 4 and microbatches of 2 there, everything at once here: equal to rounding."""
    recipe = tiny_recipe(ppo={"dual_clip": 3.0, "loss_aggregation": "sequence_mean"})
    roles, diary = LocalRoles(recipe, folder), Diary()
    real_loop(recipe, roles, diary).run()
    plain = PlainPPO(recipe, folder)
    for step in range(4):
        metrics, theirs = plain.step(step), diary.records[step + 1][1]
        for name in ("objective/score", "objective/kl", "objective/response_length", "value/explained_variance"):
            assert metrics[name] == pytest.approx(theirs[name], abs=1e-4), (step, name)
    for number, module in enumerate((plain.policy, plain.critic)):
        for name, tensor in module.named_parameters():
            gap = float((roles.weights()[f"{number}/{name}"] - tensor).detach().abs().max())
            assert saw("weights: one file's loop against the roles'", gap) < 1e-5, f"{name}: a step is up to 1e-3"


def test_another_algorithm_is_refused_in_words(folder):
    with pytest.raises(UserError, match="ppo.advantage rloo.*rlhf-ray run"):
        PlainPPO(tiny_recipe(ppo={"advantage": "rloo", "samples_per_prompt": 2}), folder)
    with pytest.raises(UserError, match="trains all weights, and the recipe sets ppo.lora; run it with"):
        PlainPPO(tiny_recipe(ppo={"lora": {}}), folder)


def test_it_runs_from_a_run_folder(folder):
    folder.recipe.write_text(tiny_recipe().model_dump_json())
    command = [sys.executable, "-m", "rlhf_ray.ppo.single_process", str(folder.path), "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 1   score ")
    done = subprocess.run([*command[:3], str(folder.path / "nowhere")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr

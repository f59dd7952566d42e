"""`export`: what is written from a PPO checkpoint, and what is said where it can't write or upload."""

import socket

import pytest
import torch
from checkpoints import write_rank
from command import rlhf_ray
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny import tiny_recipe, write_start

from rlhf_ray.config import Recipe
from rlhf_ray.errors import UserError
from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.ppo import checkpoint
from rlhf_ray.ppo.export_model import export_model
from rlhf_ray.ppo.loop import LoopState
from rlhf_ray.runs.resume import write_recipe
from rlhf_ray.runs.run_folder import RunFolder, start_model


@pytest.fixture(params=["with SFT", "without SFT"])
def run(request, tmp_path):
    """(recipe, run folder, PPO checkpoint whose every weight is the start's plus 1)."""
    folder = write_start(tiny_recipe(), RunFolder(tmp_path / "run"))
    recipe = tiny_recipe()
    if request.param == "without SFT":
        base = tmp_path / "base"
        folder.stage("sft").model.rename(base)
        recipe = Recipe.model_validate(recipe.model_dump() | {"model": {"name_or_path": str(base)}, "sft": None})
    write_recipe(recipe, folder.recipe)
    temporary = checkpoint.temporary_folder(folder.stage("ppo").checkpoints, 3)
    temporary.mkdir(parents=True)
    start = load_causal_lm(start_model(recipe, folder))
    state = [(f"weight/model.{name}", weight.data + 1) for name, weight in start.named_parameters()]
    digests = write_rank(temporary, "policy", 0, 1, state, steps_taken=3)
    state = LoopState(step=3, kl_coef=0.05).to_json()
    return recipe, folder, checkpoint.publish(folder.stage("ppo").checkpoints, 3, state, keep=1, digests=digests)


def test_a_checkpoint_gets_its_own_weights_and_its_own_card(run, tmp_path):
    recipe, folder, source = run
    target = export_model(source, tmp_path / "out", "ppo", "float32", None)
    before = load_file(f"{start_model(recipe, folder)}/model.safetensors")
    after = load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name] + 1) for name in before)
    card = (target / "README.md").read_text()
    assert "# tiny: ppo" in card and "| steps | 3 |" in card


def test_each_stages_model_is_found_by_its_name(run, tmp_path):
    _, folder, _ = run
    with pytest.raises(UserError, match="holds no model of 'dpo'"):
        export_model(folder.path, tmp_path / "out", "dpo", "float32", None)
    folder.stage("dpo").path.mkdir()
    (folder.stage("dpo").model).symlink_to(folder.stage("reward").model)
    export_model(folder.path, tmp_path / "out", "dpo", "float32", None)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() >= {"score.weight"}


def test_a_checkpoint_outside_its_run_folder_is_refused(run, tmp_path):
    _, folder, source = run
    folder.recipe.unlink()
    with pytest.raises(UserError, match="recipe.yaml is not there.* export from inside its run folder"):
        export_model(source, tmp_path / "out", "ppo", "float32", None)


@pytest.mark.parametrize("target", ["file", "file/below"])
def test_a_target_that_is_a_file_is_refused(target, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; choose another folder"):
        export_model(tmp_path, tmp_path / target, "ppo", "float32", None)


def test_an_upload_that_fails_is_one_sentence(tmp_path, monkeypatch):
    """To a hub where nobody listens."""
    folder = write_start(tiny_recipe(), RunFolder(tmp_path / "run"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: a connection is refused
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "none")
        answer = rlhf_ray("export", str(folder.stage("sft").model), str(tmp_path / "out"), "--push-to-hub", "me/model")
    assert answer.returncode == 2, answer.stderr
    assert "can't upload to 'me/model'" in answer.stderr and "Traceback" not in answer.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_upload_to_what_is_no_name_is_one_sentence(tmp_path):
    folder = write_start(tiny_recipe(), RunFolder(tmp_path / "run"))
    answer = rlhf_ray("export", str(folder.stage("sft").model), str(tmp_path / "out"), "--push-to-hub", "not a name")
    assert answer.returncode == 2 and "can't upload to 'not a name'" in answer.stderr

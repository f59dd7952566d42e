"""Taking over the finished stages of another run folder."""

import pytest

from rlhf_ray.config import Recipe
from rlhf_ray.errors import UserError
from rlhf_ray.runs.resume import write_recipe
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.start_from import adopt_stages


def finished(path, recipe: Recipe, *stages: str) -> RunFolder:
    folder = RunFolder(path)
    folder.path.mkdir()
    write_recipe(recipe, folder.recipe)
    for name in stages:
        folder.stage(name).model.mkdir(parents=True)
        (folder.stage(name).model / "weights").write_text(f"those of {name}")
        folder.stage(name).finish({"steps": 3})
    return folder


def recipe(**sections) -> Recipe:
    return Recipe.model_validate({"name": "t", **sections})


def test_finished_stages_before_ppo_come_over_whole(tmp_path):
    source = finished(tmp_path / "old", recipe(), "data", "sft", "reward", "ppo", "evaluation")
    folder = RunFolder(tmp_path / "new")
    ours = recipe(ppo={"advantage": "rloo", "samples_per_prompt": 4, "seed": 5})
    assert adopt_stages(ours, folder, source) == ["data", "sft", "reward"]
    assert (folder.stage("reward").model / "weights").read_text() == "those of reward"
    assert folder.stage("reward").summary() == {"steps": 3}
    assert sorted(path.name for path in folder.path.iterdir()) == ["data", "reward", "sft"]
    (folder.stage("sft").model / "weights").unlink()
    assert adopt_stages(ours, folder, source) == []  # what is there stays as it is
    assert (source.stage("sft").model / "weights").exists()


def test_a_dpo_model_comes_over_with_the_pairs_that_it_learned_from(tmp_path):
    source = finished(tmp_path / "old", recipe(dpo={}), "data", "sft", "dpo")
    assert adopt_stages(recipe(dpo={}), RunFolder(tmp_path / "new"), source) == ["data", "sft", "dpo"]
    for change in ({"dpo": {"beta": 0.3}}, {"dpo": {}, "reward": {"max_length": 64}}):
        with pytest.raises(UserError, match=r"dpo.beta \(0.1 -> 0.3\)|reward.max_length \(256 -> 64\)"):
            adopt_stages(recipe(**change), RunFolder(tmp_path / "other"), source)


def test_what_is_not_finished_or_not_wanted_stays_behind(tmp_path):
    source = finished(tmp_path / "old", recipe(fluency={}), "data", "sft", "fluency")
    source.stage("reward").path.mkdir()
    assert adopt_stages(recipe(), RunFolder(tmp_path / "new"), source) == ["data", "sft"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, r"seed \(0 -> 1\)"),
        ({"sft": {"learning_rate": 1e-5}}, r"sft.learning_rate \(0.0003 -> 1e-05\)"),
        ({"data": {"holdout": 0.1}}, r"data.holdout \(0.05 -> 0.1\)"),
    ],
)
def test_another_recipe_is_refused_by_its_keys(tmp_path, change, words):
    source = finished(tmp_path / "old", recipe(), "data", "sft", "reward")
    with pytest.raises(UserError, match=words):
        adopt_stages(recipe(**change), RunFolder(tmp_path / "new"), source)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        adopt_stages(recipe(), RunFolder(tmp_path / "new"), RunFolder(tmp_path))

"""The models of a run by their names, and which of them share a replica. No torch."""

import json

import pytest

from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.errors import UserError
from rlhf_ray.runs.resume import write_recipe
from rlhf_ray.serving.served import groups_of, run_models, served_models


def model(folder):
    """As far as is looked at before it is loaded."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def run(tmp_path):
    """PPO is done, DPO is no stage of it, and the best policy is kept."""
    base, folder = model(tmp_path / "base"), tmp_path / "run"
    recipe = build_recipe(
        {"name": "run", "model": {"name_or_path": str(base)}, "data": {"sft": [{"path": "x.jsonl"}]}}, [], "run"
    )
    for place in ("sft/model", "ppo/model", "ppo/best"):
        model(folder / place)
    write_recipe(recipe, folder / "recipe.yaml")
    return folder


def test_the_models_that_a_run_has(run):
    found = {"base": run.parent / "base", "sft": run / "sft/model", "ppo": run / "ppo/model", "best": run / "ppo/best"}
    assert run_models(run, ["all"]) == {name: str(folder) for name, folder in found.items()}
    assert run_models(run, ["best", "base"]) == {name: str(found[name]) for name in ("best", "base")}
    assert run_models(run, []) == {}
    with pytest.raises(UserError, match="--also dpo: .* it has base, best, ppo, sft, or all"):
        run_models(run, ["dpo"])
    with pytest.raises(UserError, match="is no run folder"):
        run_models(run.parent, ["sft"])


def test_they_are_in_the_replicas_of_the_first_one_and_other_models_have_their_own(run):
    other = model(run.parent / "other")
    models = served_models(run, None, {"o": other}, also=["sft", "base"], engine=None, gpus=0)
    assert [(each.name, each.folder) for each in models] == [
        ("run", run / "ppo/model"), ("o", other), ("sft", run / "sft/model"), ("base", run.parent / "base"),
    ]  # fmt: skip
    assert [[each.name for each in group] for group in groups_of(models)] == [["run", "sft", "base"], ["o"]]

"""What a submitted job takes along: the package, the recipe, the user's own modules, data that is named."""

from pathlib import Path

import pytest
import yaml

from rlhf_ray.actors import upload
from rlhf_ray.config import Recipe
from rlhf_ray.errors import UserError


def recipe(**sections):
    return Recipe.model_validate({"name": "tiny", **sections})


def test_local_data_is_named_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine", "rows.jsonl").write_text("{}\n")
    with_root = recipe(data={"root": "mine", "sft": [{"path": "rows.jsonl"}]})
    Path("out").mkdir()
    with pytest.raises(UserError, match="data.root = 'mine' .* --data mine"):
        upload.stage(with_root, Path("out"), run_dir="/runs/x")

    Path("out2").mkdir()
    items = upload.stage(with_root, Path("out2"), run_dir="/runs/x", data=[Path("mine")])
    assert [item.what for item in items] == ["code", "resolved recipe", "data"]
    assert yaml.safe_load(Path("out2/recipe.yaml").read_text())["data"]["root"] == "/runs/x/uploads/mine"
    assert Path("out2/uploads/mine/rows.jsonl").is_file() and Path("out2/rlhf_ray/config/recipe.py").is_file()
    assert not list(Path("out2").rglob("__pycache__"))

    for named, words in ((Path("absent"), "no such file"), (Path("out"), "no field of the recipe names it")):
        with pytest.raises(UserError, match=words):
            upload.stage(with_root, _empty(tmp_path), run_dir="/runs/x", data=[Path("mine"), named])
    with pytest.raises(UserError, match="s3://b/x"):
        upload.stage(with_root, _empty(tmp_path), run_dir="s3://b/x", data=[Path("mine")])


def test_what_the_cluster_can_see_stays_where_it_is(tmp_path):
    hub_and_nfs = recipe(data={"sft": [{"path": "some/hub-name"}, {"path": str(tmp_path)}]})
    folder = _empty(tmp_path)
    items = upload.stage(hub_and_nfs, folder, run_dir="/runs/x")
    assert [item.what for item in items] == ["code", "resolved recipe"]
    sources = yaml.safe_load((folder / "recipe.yaml").read_text())["data"]["sft"]
    assert [source["path"] for source in sources] == ["some/hub-name", str(tmp_path)]


def test_a_folder_called_like_one_of_the_runs_models_is_not_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sft", "model", "fluency", "from_scratch"):
        Path(name).mkdir()
    own = recipe(reward={"base": "model"}, judge={"base": "fluency"}, fluency={})
    for one in (own, recipe()):
        upload.stage(one, _empty(tmp_path), run_dir="/runs/x")
    with pytest.raises(UserError, match="reward.base = './sft' is a path on this machine"):
        upload.stage(recipe(reward={"base": "./sft"}), _empty(tmp_path), run_dir="/runs/x")


def test_large_data_is_refused(tmp_path):
    big = tmp_path / "big.jsonl"
    with open(big, "wb") as file:
        file.truncate(int(upload.MAX_DATA_MB * 1e6) + 1)  # sparse: takes no disk
    with pytest.raises(UserError, match="over 64 MB"):
        upload.stage(recipe(data={"sft": [{"path": str(big)}]}), _empty(tmp_path), run_dir="/runs/x", data=[big])


def test_the_users_own_modules_go_along(tmp_path):
    (tmp_path / "myrewards.py").write_text("def short(prompts, responses): ...\n")
    (tmp_path / "mydata").mkdir()
    (tmp_path / "mydata" / "__init__.py").touch()
    own = recipe(
        data={"builder": "mydata.pairs:build"},
        ppo={"reward_function": "myrewards:short"},
        evaluation={"judge_function": "rlhf_ray.errors:UserError"},
    )
    folder = _empty(tmp_path)
    items = upload.stage(own, folder, run_dir="/runs/x", here=tmp_path)
    assert [item.path.name for item in items if item.what == "your module"] == ["mydata", "myrewards.py"]
    assert (folder / "myrewards.py").is_file() and (folder / "mydata" / "__init__.py").is_file()


def _empty(tmp_path):
    folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return folder

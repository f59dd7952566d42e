"""A run of PPO over Ray whose folder is in a store: stopped, its host's copy deleted, and gone on with."""

import shutil
import threading
import time

import pytest
from safetensors.torch import load_file
from stores import tree
from tiny import tiny_recipe, write_start

import rlhf_ray
from rlhf_ray.errors import StageStopped
from rlhf_ray.runs.contents import to_export
from rlhf_ray.runs.fetching import read_contents
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.remote import local_copy
from rlhf_ray.runs.run_folder import COPIES, RunFolder, working_copy
from rlhf_ray.runs.store import Store

pytestmark = pytest.mark.ray


def prepared(folder):
    """What the stages before PPO leave."""
    write_start(tiny_recipe(), folder)
    for stage in ("data", "sft", "reward"):
        folder.stage(stage).finish({"accuracy": 1.0})
    return folder


def stop_after(folder, step):
    """Once its metrics have the step."""

    def watch():
        metrics = folder.stage("ppo").metrics
        while not (metrics.exists() and read_metrics(metrics)[-1:] and read_metrics(metrics)[-1]["step"] >= step):
            time.sleep(0.05)
        folder.stage("ppo").stop_file.touch()

    threading.Thread(target=watch, daemon=True).start()


def weights(model):
    return load_file(model / "model.safetensors")


def test_a_run_whose_copy_is_deleted_goes_on_from_the_store_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv(COPIES, str(tmp_path / "copies"))
    plain = prepared(RunFolder(tmp_path / "plain"))
    rlhf_ray.run(tiny_recipe(), plain.path, stages=["ppo"])
    url = f"file://{tmp_path}/store/run"
    folder = prepared(RunFolder(working_copy(url)))
    stop_after(folder, 2)
    with pytest.raises(StageStopped, match="its checkpoint is written"):
        rlhf_ray.run(tiny_recipe(), url, stages=["ppo"])
    assert not folder.stage("ppo").done
    shutil.rmtree(folder.path)
    rlhf_ray.run(tiny_recipe(), url, stages=["ppo"])
    expected = weights(plain.stage("ppo").model)
    found = weights(local_copy(url, to_export("ppo")) / "ppo" / "model")
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)
    assert [row["step"] for row in read_metrics(folder.stage("ppo").metrics)] == [0, 1, 2, 3, 4]
    assert read_contents(Store(url)).files.keys() == tree(folder.path).keys()

"""Supervised stages under Ray Train: against a plain loop, stopped, killed, refused, waiting. Reward models by members."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import time

import numpy as np
import pytest
import ray
import torch
from cats import STAGE, assert_same_weights, cats_folder, cats_tokenizer, plain_sft, recipe_of  # noqa: F401
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.actors.supervised import run_supervised
from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.errors import RunFailed, StageStopped, UserError
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def sft(session, folder) -> dict:
    return run_supervised(recipe_of(sft=STAGE | {"epochs": 4}), folder, "sft")


@pytest.mark.thorough
def test_sft_trains_as_a_plain_loop_does(sft, folder):
    stage = folder.stage("sft")
    assert stage.summary() == sft and sft["steps"] == 40 and sft["ended_by"] == "steps"
    model, losses = plain_sft(recipe_of(sft=STAGE | {"epochs": 4}), folder, 40)
    rows = read_metrics(stage.metrics)
    assert [row["step"] for row in rows] == list(range(1, 41))
    np.testing.assert_allclose([row["loss"] for row in rows], losses, atol=1e-4)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(stage.model), model, 1e-4)
    assert rows[0]["learning_rate"] > 0 and rows[-1]["learning_rate"] < 3e-4 * 0.01
    assert sft["eval_loss"] < losses[0] and sft["eval_perplexity"] == pytest.approx(math.exp(sft["eval_loss"]))


@pytest.mark.thorough
def test_a_saved_model_has_no_pickle_and_a_finished_stage_is_left_alone(sft, folder):
    stage = folder.stage("sft")
    names = {file.name for file in stage.model.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not stage.checkpoints.exists()
    before = os.stat(stage.model / "model.safetensors").st_mtime_ns
    assert run_supervised(recipe_of(), folder, "sft") == sft
    assert os.stat(stage.model / "model.safetensors").st_mtime_ns == before


@pytest.mark.slow
def test_stopped_and_resumed_on_two_zero3_ranks_it_is_still_the_plain_loop(session, folder, tmp_path):
    run = RunFolder(tmp_path)
    os.symlink(folder.path / "data", run.path / "data")
    ranks = {"workers": 2, "microbatch_size": 4, "zero_stage": 3, "threads": 1}
    recipe = recipe_of(sft=STAGE | ranks | {"max_steps": 200})
    stage = run.stage("sft")

    def stop_once_training(event: dict) -> None:
        if "step" in event:
            stage.stop_file.touch()

    with pytest.raises(StageStopped):
        run_supervised(recipe, run, "sft", on_progress=stop_once_training)
    stopped_at = read_metrics(stage.metrics)[-1]["step"]
    assert 0 < stopped_at < 200 and not stage.done and not stage.stop_file.exists()
    assert (stage.checkpoints / f"checkpoint-{stopped_at}" / "MANIFEST.json").exists()

    summary = run_supervised(recipe, run, "sft")
    rows = read_metrics(stage.metrics)
    assert summary["steps"] == 200 and [row["step"] for row in rows] == list(range(1, 201))
    assert rows[stopped_at]["elapsed_s"] > rows[stopped_at - 1]["elapsed_s"]  # time goes on where it stopped
    model, losses = plain_sft(recipe, run, 200)
    np.testing.assert_allclose([row["loss"] for row in rows], losses, atol=2e-3)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(stage.model), model, 2e-3)


@pytest.mark.slow
def test_a_killed_worker_costs_no_step_and_is_reported(session, folder, tmp_path):
    run = RunFolder(tmp_path)
    os.symlink(folder.path / "data", run.path / "data")
    recipe = recipe_of(sft=STAGE | {"max_steps": 250, "checkpoint_minutes": 0.02})
    stage, killed = run.stage("sft"), []

    def kill_once_checkpointed(event: dict) -> None:
        if not killed and list(stage.checkpoints.glob("checkpoint-*/MANIFEST.json")):
            killed.append(int(re.findall(r"process (\d+)", (run.logs / "sft.log").read_text())[-1]))
            os.kill(killed[0], signal.SIGKILL)

    summary = run_supervised(recipe, run, "sft", on_progress=kill_once_checkpointed)
    assert killed and summary["steps"] == 250
    assert [row["step"] for row in read_metrics(stage.metrics)] == list(range(1, 251))
    assert_same_weights(AutoModelForCausalLM.from_pretrained(stage.model), plain_sft(recipe, run, 250)[0], 2e-3)
    events = read_metrics(run.events)
    assert len(events) == 1 and events[0]["stage"] == "sft" and "failed" in events[0]["what"]


@pytest.mark.slow
def test_a_stage_that_fails_each_time_says_so(session, folder, tmp_path):
    run = RunFolder(tmp_path)
    run.path.joinpath("data").mkdir()
    os.symlink(folder.tokenizer, run.tokenizer)
    for name in ("sft_train", "sft_eval"):
        run.data(name).write_bytes(b"no Parquet")
    with pytest.raises(
        RunFailed, match=r"^sft failed 4 times, the last time with: .*Parquet.*; its log is .*sft.log; "
    ):
        run_supervised(recipe_of(), run, "sft")
    done = [event["done"] for event in read_metrics(run.events)]
    assert ["restarted" in what for what in done] == [True, True, True, False] and "the stage failed" in done[3]


@pytest.mark.slow
def test_a_worker_that_stands_still_is_not_waited_for_for_ever(session, folder, tmp_path):
    run = RunFolder(tmp_path)
    os.symlink(folder.path / "data", run.path / "data")
    recipe = recipe_of(sft=STAGE | {"max_steps": 100_000}, resources={"call_timeout_s": 3})
    frozen = []

    def freeze_once_training(event: dict) -> None:
        if "step" in event and not frozen:
            frozen.append(int(re.findall(r"process (\d+)", (run.logs / "sft.log").read_text())[-1]))
            os.kill(frozen[0], signal.SIGSTOP)

    with pytest.raises(
        RunFailed, match=r"sft stood still for \d+ s after step \d+; .*sft.log.*resources.call_timeout_s"
    ):
        run_supervised(recipe, run, "sft", on_progress=freeze_once_training)
    run.stage("sft").stop_file.touch()  # the controller of this test's Ray goes on: it ends at its next step
    os.kill(frozen[0], signal.SIGCONT)


@pytest.mark.slow
def test_time_limit_ends_training_at_a_low_rate(session, folder, tmp_path):
    run = RunFolder(tmp_path)
    os.symlink(folder.path / "data", run.path / "data")
    fluency = STAGE | {"max_steps": 100_000, "max_minutes": 0.05, "packing": False}
    summary = run_supervised(recipe_of(fluency=fluency), run, "fluency")
    assert summary["ended_by"] == "max_minutes" and 3 <= summary["train_seconds"] < 6
    rows = read_metrics(run.stage("fluency").metrics)
    assert max(row["learning_rate"] for row in rows) > 2.5e-4 and rows[-1]["learning_rate"] < 3e-5


@pytest.mark.slow
def test_an_ensemble_is_trained_member_by_member_and_measured_together(sft, folder, tmp_path):
    """The run ends between the two members, and goes on with the second."""
    run = RunFolder(tmp_path)
    for name in ("data", "sft"):
        os.symlink(folder.path / name, run.path / name)
    reward = STAGE | {"members": 2, "combine": "worst", "epochs": 2, "learning_rate": 1e-3, "normalise_samples": 16}
    recipe, stage = recipe_of(reward=reward), run.stage("reward")
    stage.path.mkdir()
    (stage.path / "member_1").touch()  # a folder can't be made there
    with pytest.raises(FileExistsError):
        run_supervised(recipe, run, "reward")
    before = os.stat(stage.model / "model.safetensors").st_mtime_ns
    assert json.loads((stage.path / "member_0" / "DONE").read_text())["steps"] == 20 and not stage.done
    (stage.path / "member_1").unlink()
    summary = run_supervised(recipe, run, "reward")
    assert os.stat(stage.model / "model.safetensors").st_mtime_ns == before, "the first is not trained again"
    assert stage.summary() == summary and summary["members"] == 2 and not stage.member(1).checkpoints.exists()

    folders = [stage.member(number).model for number in (0, 1)]
    assert folders == [stage.path / "model", stage.path / "member_1" / "model"]
    first, second = (read_metrics(stage.member(number).metrics) for number in (0, 1))
    assert len(first) == len(second) == 20
    assert first[0]["tokens"] != second[0]["tokens"], "another order of the data"
    scores = []
    rows = Dataset.from_parquet(str(run.data("reward_eval")))
    for path in folders:
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)

        def raw(row, side, model=model, tokenizer=tokenizer):
            ids = tokenizer(row["prompt"]).input_ids + tokenizer(row[side]).input_ids + [tokenizer.eos_token_id]
            with torch.no_grad():
                return model(torch.tensor([ids])).logits.item()

        both = [[raw(row, side) for row in rows] for side in ("chosen", "rejected")]
        scores.append((np.array(both) - model.config.reward_mean) / model.config.reward_std)
    each = [np.mean(chosen > rejected) for chosen, rejected in scores]
    chosen, rejected = np.minimum(*scores)
    assert [summary["accuracy"], summary["member_1"]["accuracy"]] == pytest.approx(each)
    assert summary["ensemble"]["accuracy"] == pytest.approx(np.mean(chosen > rejected))
    assert summary["ensemble"]["disagreement"] == pytest.approx(np.mean(abs(scores[0] - scores[1]) / 2), rel=1e-3)
    lengths = [[len(tokenizer(row[side]).input_ids) + 1 for row in rows] for side in ("chosen", "rejected")]
    expected = np.corrcoef(np.concatenate([chosen, rejected]), np.concatenate(lengths))[0, 1]
    assert summary["ensemble"]["length_pearson"] == pytest.approx(expected, abs=1e-3)


@pytest.fixture
def plugin():
    """The stages of toy_plugin are in the table for the length of a test."""
    before = dict(STAGES)
    yield "toy_plugin"
    STAGES.clear()
    STAGES.update(before)
    sys.modules.pop("toy_plugin", None)


@pytest.mark.thorough
def test_a_users_mistake_comes_out_of_a_plugin_s_worker_as_one_sentence(session, plugin, tmp_path):
    """The worker imports the plugin; what its function raises is not retried as if a machine had failed."""
    run = RunFolder(tmp_path)
    recipe = build_recipe({"name": "r", "plugins": [plugin], "taught": {"answer": -1}}, [], "r")
    with pytest.raises(UserError, match="^taught.answer is -1; set it to 0 or more$"):
        run_supervised(recipe, run, "taught")
    assert not run.stage("taught").done and not run.events.exists()


@pytest.mark.slow
def test_a_full_cluster_is_waited_for_with_a_deadline(session, folder, tmp_path):
    run = RunFolder(tmp_path)
    os.symlink(folder.path / "data", run.path / "data")
    with pytest.raises(UserError, match=r"need 3 CPUs, the cluster has 2"):
        run_supervised(recipe_of(sft=STAGE | {"cpus_per_worker": 3}), run, "sft")
    group = ray.util.placement_group([{"CPU": 2}])
    ray.get(group.ready(), timeout=60)
    started = time.monotonic()
    try:
        with pytest.raises(UserError, match=r"waited 2 s for 1 sft worker"):
            run_supervised(recipe_of(resources={"start_timeout_s": 2}), run, "sft")
    finally:
        ray.util.remove_placement_group(group)
    assert time.monotonic() - started < 60

"""SFT and reward models: rows, schedule and configuration by hand; training through Ray Train, TRL and DeepSpeed.

The trained weights are compared with a plain torch loop over the same batches (float32).
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.config import Recipe
from rlhf_ray.data.store import COLUMNS, write_role
from rlhf_ray.errors import RunFailed, StageStopped, UserError
from rlhf_ray.models.load import build_causal_lm
from rlhf_ray.models.tokenizer import train_tokenizer
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.learning_rate import progress_of, rate_factor
from rlhf_ray.supervised.rows import packed_rows, pair_rows, score_rows, sft_rows, training_order
from rlhf_ray.training.deepspeed_config import deepspeed_config
from rlhf_ray.training.precision import resolve_precision

WORDS = ["the", "a", "cat", "dog", "ran", "sat", "on", "under", "red", "blue", "big", "small", "mat", "tree", "and"]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return train_tokenizer([sentence(rng, 20) for _ in range(50)], 300)


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_loss_covers_the_reply_and_its_eos_only(tokenizer):
    rows = sft_rows(tokenizer, Dataset.from_dict({"prompt": ["a cat", ""], "response": [" sat", "a dog ran"]}),
                    max_length=64)  # fmt: skip
    prompt, reply, text = (tokenizer(t).input_ids for t in ("a cat", " sat", "a dog ran"))
    eos = tokenizer.eos_token_id
    assert rows.dataset[0] == {
        "input_ids": prompt + reply + [eos],
        "labels": [-100] * len(prompt) + reply + [eos],
    }
    assert rows.dataset[1] == {"input_ids": text + [eos], "labels": text + [eos]}
    assert rows.cut == 0 and rows.lengths.tolist() == [len(prompt + reply) + 1, len(text) + 1]


def test_a_long_row_keeps_the_end_of_its_reply_and_is_counted(tokenizer):
    prompt, reply = " the cat" * 20, " a dog ran on"
    whole = tokenizer(prompt).input_ids + tokenizer(reply).input_ids + [tokenizer.eos_token_id]
    rows = sft_rows(tokenizer, Dataset.from_dict({"prompt": [prompt], "response": [reply]}), max_length=10)
    assert rows.cut == 1
    assert rows.dataset[0]["input_ids"] == whole[-10:]
    replied = len(tokenizer(reply).input_ids) + 1
    assert rows.dataset[0]["labels"] == [-100] * (10 - replied) + whole[-replied:]
    long = Dataset.from_dict({"prompt": [""], "response": [prompt], "score": [1.0]})
    scored = score_rows(tokenizer, long, max_length=5)
    assert scored.dataset[0]["input_ids"] == tokenizer(prompt).input_ids[-4:] + [tokenizer.eos_token_id]


def test_both_sides_of_a_pair_end_in_eos_which_is_not_pad(tokenizer):
    pairs = Dataset.from_dict({"prompt": ["the"], "chosen": [" cat sat"], "rejected": [" dog"]})
    row = pair_rows(tokenizer, pairs, max_length=64).dataset[0]
    assert row["chosen_ids"] == tokenizer("the").input_ids + tokenizer(" cat sat").input_ids + [tokenizer.eos_token_id]
    assert row["rejected_ids"][-1] == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_packing_loses_and_repeats_no_token_but_the_last_block(tokenizer):
    rng = random.Random(1)
    texts = [sentence(rng, rng.randint(1, 12)) for _ in range(40)]
    rows = packed_rows(tokenizer, Dataset.from_dict({"prompt": [""] * 40, "response": texts}), max_length=16, seed=5)
    assert set(map(len, rows.dataset["input_ids"])) == {16}
    stream = [token for block in rows.dataset["input_ids"] for token in block]
    decoded = tokenizer.decode(stream).split(tokenizer.eos_token)[:-1]  # the last text may be cut off
    assert set(decoded) <= set(texts) and len(decoded) >= 38
    assert sum(len(tokenizer(t).input_ids) + 1 for t in texts) - len(stream) < 16
    with pytest.raises(UserError, match="packing: false"):
        packed_rows(tokenizer, Dataset.from_dict({"prompt": ["a"], "response": ["b"]}), max_length=16, seed=5)


def test_training_order_takes_every_row_once_a_pass_in_batches_of_like_length():
    lengths = np.random.default_rng(0).integers(5, 200, 400)
    order = training_order(lengths, batch_size=8, rows=800, seed=3)
    assert sorted(order[:400]) == list(range(400)) and sorted(order[400:]) == list(range(400))
    spread = np.ptp(lengths[order].reshape(-1, 8), axis=1).mean()
    assert spread < np.ptp(lengths.reshape(-1, 8), axis=1).mean() / 10
    np.testing.assert_array_equal(order[:400], training_order(lengths, batch_size=8, rows=400, seed=3))  # more epochs
    assert not np.array_equal(order, training_order(lengths, batch_size=8, rows=800, seed=4))
    assert len(training_order(lengths[:3], batch_size=8, rows=3, seed=0)) == 8  # fewer rows than one batch: they repeat
    assert len(training_order(lengths, batch_size=7, rows=30, seed=0)) == 28
    # Rows that fill no batch of their pass are not left out: they begin the next.
    assert sorted(training_order(lengths[:10], batch_size=4, rows=20, seed=0)) == sorted([*range(10)] * 2)


# ---- schedule, DeepSpeed configuration, precision -------------------------------------------------------------------


def test_learning_rate_by_hand():
    at = lambda progress, schedule: rate_factor(progress, schedule=schedule, warmup_ratio=0.2)  # noqa: E731
    assert at(0.1, "linear") == 0.5 and at(0.2, "linear") == 1.0
    assert at(0.6, "linear") == pytest.approx(0.5) and at(1.0, "linear") == 0.0
    assert at(0.6, "cosine") == pytest.approx(0.5)
    assert at(0.4, "cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert at(0.9, "constant") == 1.0


def test_progress_is_that_of_steps_or_time_whichever_is_further():
    assert progress_of(step=30, total_steps=100, elapsed_s=500, limit_s=None) == 0.3
    assert progress_of(step=30, total_steps=100, elapsed_s=45, limit_s=60) == 0.75
    assert progress_of(step=30, total_steps=100, elapsed_s=6, limit_s=60) == 0.3
    assert progress_of(step=30, total_steps=100, elapsed_s=61, limit_s=60) == 1.0


def test_deepspeed_configuration():
    def config_of(**options) -> dict:
        return deepspeed_config(microbatch_size=4, **options)

    config = config_of(zero_stage=0, compute_dtype=torch.float32, accumulation_steps=3, workers=2)
    assert config["train_batch_size"] == 24 and config["gradient_clipping"] == 1.0
    assert "torch_autocast" not in config and "bf16" not in config and "optimizer" not in config
    config = config_of(zero_stage=3, compute_dtype=torch.bfloat16, accumulation_steps=1, workers=1)
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]


def test_precision_is_what_the_hardware_has():
    assert resolve_precision("float32", "cpu") is torch.float32
    with open("/proc/cpuinfo") as file:
        has = {"avx512_bf16", "amx_bf16"} & set(file.read().split())
    assert resolve_precision("auto", "cpu") is (torch.bfloat16 if has else torch.float32)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            resolve_precision("bfloat16", "cuda")
        assert resolve_precision("auto", "cuda") is torch.float32


# ---- training under Ray ---------------------------------------------------------------------------------------------

STAGE = {"batch_size": 16, "microbatch_size": 8, "max_length": 48, "precision": "float32", "warmup_ratio": 0.1}


def recipe_of(**sections) -> Recipe:
    scratch = {"layers": 2, "width": 32, "heads": 2, "positions": 96, "vocab_size": 300}
    return Recipe.model_validate({
        "name": "tiny", "model": {"from_scratch": scratch}, "generation": {"max_new_tokens": 8},
        "data": {"max_prompt_tokens": 32}, "sft": STAGE, "reward": STAGE, "judge": STAGE | {"objective": "scores"},
        "tracking": {"tensorboard": False}, **sections,
    })  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> RunFolder:
    """Prepared data: people prefer cats, and score a text by its cats."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    tokenizer.save_pretrained(folder.tokenizer)
    rng = random.Random(0)

    def row() -> dict:
        words = [rng.choice(WORDS) for _ in range(rng.randint(3, 10))]
        response = " " + " ".join(words)
        return {
            "prompt": sentence(rng, rng.randint(1, 5)), "response": response, "score": float(words.count("cat")),
            "chosen": response.replace("dog", "cat") + " cat", "rejected": response.replace("cat", "dog") + " dog",
        }  # fmt: skip

    for part, rows in (("train", 160), ("eval", 48)):
        data = [row() for _ in range(rows)]
        write_role(folder, f"sft_{part}", data, COLUMNS["sft"])
        write_role(folder, f"reward_{part}", data, COLUMNS["pairs"])
        write_role(folder, f"judge_{part}", data, COLUMNS["scores"])
    write_role(folder, "prompts", data, COLUMNS["prompts"])
    return folder


@pytest.fixture(scope="module")
def ray_cluster():
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
             runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}})  # fmt: skip
    yield ray
    ray.shutdown()


def plain_sft(recipe: Recipe, folder: RunFolder, steps: int) -> tuple[torch.nn.Module, list[float]]:
    """The SFT stage as a loop of plain torch: same rows in the same order, mean loss over labelled tokens, clip 1."""
    config = recipe.sft
    tokenizer = AutoTokenizer.from_pretrained(folder.tokenizer)
    model = build_causal_lm(recipe.model, tokenizer, recipe.seed).train()
    rows = sft_rows(tokenizer, Dataset.from_parquet(str(folder.data("sft_train"))), max_length=config.max_length)
    order = training_order(rows.lengths, batch_size=config.batch_size, rows=steps * config.batch_size, seed=recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=config.weight_decay)
    losses = []
    for step in range(steps):
        batch = rows.dataset[order[step * config.batch_size : (step + 1) * config.batch_size]]
        longest = max(map(len, batch["input_ids"]))
        ids = torch.tensor([r + [tokenizer.pad_token_id] * (longest - len(r)) for r in batch["input_ids"]])
        labels = torch.tensor([r + [-100] * (longest - len(r)) for r in batch["labels"]])
        logits = model(input_ids=ids).logits[:, :-1]  # padding stands on the right: no token sees it
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
        optimizer.param_groups[0]["lr"] = config.learning_rate * rate_factor(
            (step + 0.5) / steps, schedule=config.schedule, warmup_ratio=config.warmup_ratio
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module, atol: float) -> None:
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def sft(ray_cluster, folder) -> dict:
    from rlhf_ray.actors.supervised import run_supervised

    return run_supervised(recipe_of(sft=STAGE | {"epochs": 4}), folder, "sft")


@pytest.mark.ray
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


@pytest.mark.ray
def test_a_saved_model_has_no_pickle_and_a_finished_stage_is_left_alone(sft, folder):
    from rlhf_ray.actors.supervised import run_supervised

    stage = folder.stage("sft")
    names = {file.name for file in stage.model.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not stage.checkpoints.exists()
    before = os.stat(stage.model / "model.safetensors").st_mtime_ns
    assert run_supervised(recipe_of(), folder, "sft") == sft
    assert os.stat(stage.model / "model.safetensors").st_mtime_ns == before


@pytest.mark.ray
@pytest.mark.slow
def test_stopped_and_resumed_on_two_zero3_ranks_it_is_still_the_plain_loop(ray_cluster, folder, tmp_path):
    from rlhf_ray.actors.supervised import run_supervised

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
    assert (stage.checkpoints / f"checkpoint-{stopped_at}" / "COMPLETE").exists()

    summary = run_supervised(recipe, run, "sft")
    rows = read_metrics(stage.metrics)
    assert summary["steps"] == 200 and [row["step"] for row in rows] == list(range(1, 201))
    assert rows[stopped_at]["elapsed_s"] > rows[stopped_at - 1]["elapsed_s"]  # time goes on where it stopped
    model, losses = plain_sft(recipe, run, 200)
    np.testing.assert_allclose([row["loss"] for row in rows], losses, atol=2e-3)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(stage.model), model, 2e-3)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_costs_no_step_and_is_reported(ray_cluster, folder, tmp_path):
    from rlhf_ray.actors.supervised import run_supervised

    run = RunFolder(tmp_path)
    os.symlink(folder.path / "data", run.path / "data")
    recipe = recipe_of(sft=STAGE | {"max_steps": 250, "checkpoint_minutes": 0.02})
    stage, killed = run.stage("sft"), []

    def kill_once_checkpointed(event: dict) -> None:
        if not killed and list(stage.checkpoints.glob("*/COMPLETE")):
            killed.append(int(re.findall(r"process (\d+)", (run.logs / "sft.log").read_text())[-1]))
            os.kill(killed[0], signal.SIGKILL)

    summary = run_supervised(recipe, run, "sft", on_progress=kill_once_checkpointed)
    assert killed and summary["steps"] == 250
    assert [row["step"] for row in read_metrics(stage.metrics)] == list(range(1, 251))
    assert_same_weights(AutoModelForCausalLM.from_pretrained(stage.model), plain_sft(recipe, run, 250)[0], 2e-3)
    events = read_metrics(run.events)
    assert len(events) == 1 and events[0]["stage"] == "sft" and "failed" in events[0]["what"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_stage_that_fails_each_time_says_so(ray_cluster, folder, tmp_path):
    from rlhf_ray.actors.supervised import run_supervised

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


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_stands_still_is_not_waited_for_for_ever(ray_cluster, folder, tmp_path):
    from rlhf_ray.actors.supervised import run_supervised

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


@pytest.mark.ray
@pytest.mark.slow
def test_time_limit_ends_training_at_a_low_rate(ray_cluster, folder, tmp_path):
    from rlhf_ray.actors.supervised import run_supervised

    run = RunFolder(tmp_path)
    os.symlink(folder.path / "data", run.path / "data")
    fluency = STAGE | {"max_steps": 100_000, "max_minutes": 0.05, "packing": False}
    summary = run_supervised(recipe_of(fluency=fluency), run, "fluency")
    assert summary["ended_by"] == "max_minutes" and 3 <= summary["train_seconds"] < 6
    rows = read_metrics(run.stage("fluency").metrics)
    assert max(row["learning_rate"] for row in rows) > 2.5e-4 and rows[-1]["learning_rate"] < 3e-5


@pytest.mark.ray
def test_reward_model_learns_pairs_and_its_figures_are_those_of_the_saved_folder(sft, folder):
    from rlhf_ray.actors.supervised import run_supervised

    reward = STAGE | {"epochs": 12, "learning_rate": 3e-3, "normalise_samples": 64}
    summary = run_supervised(recipe_of(reward=reward), folder, "reward")
    assert summary["accuracy"] > 0.9 > summary["longer_accuracy"]
    path = folder.stage("reward").model
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    def raw(prompt: str, response: str, ended: bool = True) -> float:
        ids = tokenizer(prompt).input_ids + tokenizer(response).input_ids + [tokenizer.eos_token_id] * ended
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits.item()

    rows = Dataset.from_parquet(str(folder.data("reward_eval")))
    chosen = np.array([raw(row["prompt"], row["chosen"]) for row in rows])
    rejected = np.array([raw(row["prompt"], row["rejected"]) for row in rows])
    assert summary["accuracy"] == pytest.approx(np.mean(chosen > rejected))
    assert summary["margin_mean"] == pytest.approx(np.mean(chosen - rejected), rel=1e-3)
    assert summary["score_std"] == pytest.approx(np.concatenate([chosen, rejected]).std(), rel=1e-3)
    # The numbers that normalise scores: raw logits of samples of the SFT model, drawn here by plain `generate`.
    policy = AutoModelForCausalLM.from_pretrained(folder.stage("sft").model)
    torch.manual_seed(0)
    prompts, scores = Dataset.from_parquet(str(folder.data("prompts")))["prompt"], []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        out = policy.generate(ids, do_sample=True, max_new_tokens=8, num_return_sequences=8, top_k=0)
        for row in out[:, ids.shape[1] :]:
            response = tokenizer.decode(row, skip_special_tokens=True)
            scores.append(raw(prompt, response, ended=tokenizer.eos_token_id in row.tolist()))
    config = json.loads((path / "config.json").read_text())
    assert config["reward_mean"] == pytest.approx(np.mean(scores), abs=4 * np.std(scores) / 8)  # 64 samples: 4 errors
    assert config["reward_std"] == pytest.approx(np.std(scores), rel=0.4)
    assert summary["reward_mean"] == config["reward_mean"] and summary["reward_std"] == config["reward_std"]


@pytest.mark.ray
@pytest.mark.slow
def test_an_ensemble_is_trained_member_by_member_and_measured_together(sft, folder, tmp_path):
    """The run ends between the two members, and goes on with the second."""
    from rlhf_ray.actors.supervised import run_supervised

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


@pytest.mark.ray
def test_regression_to_scores_correlates_with_them(sft, folder):
    from rlhf_ray.actors.supervised import run_supervised

    judge = STAGE | {"objective": "scores", "epochs": 16, "learning_rate": 3e-3, "precision": "auto"}
    summary = run_supervised(recipe_of(judge=judge | {"normalise_samples": 0}), folder, "judge")
    assert summary["pearson"] > 0.8 and summary["spearman"] > 0.6 and summary["accuracy"] > 0.8
    assert abs(summary["score_mean"]) < 0.5 and 0.4 < summary["score_std"] < 1.6  # fitted to standardised scores
    assert "reward_mean" not in json.loads((folder.stage("judge").model / "config.json").read_text())


@pytest.mark.ray
def test_a_users_mistake_comes_out_of_the_worker_as_one_sentence(sft, folder, tmp_path):
    from rlhf_ray.actors.supervised import run_supervised

    run = RunFolder(tmp_path)
    os.symlink(folder.path / "data", run.path / "data")
    with pytest.raises(UserError, match=r"reward.objective is 'scores'.*no column response, score.*objective: pairs"):
        run_supervised(recipe_of(reward=STAGE | {"objective": "scores"}), run, "reward")
    assert not run.stage("reward").done


@pytest.mark.ray
@pytest.mark.slow
def test_a_full_cluster_is_waited_for_with_a_deadline(ray_cluster, folder, tmp_path):
    from rlhf_ray.actors.supervised import run_supervised

    ray = ray_cluster
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

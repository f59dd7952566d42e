"""Supervised stages without Ray Train: whole models and parts of them, what they learn and what their folders hold."""

import json
import os

import numpy as np
import pytest
import torch
from cats import STAGE, cats_folder, cats_tokenizer, plain_sft, recipe_of  # noqa: F401 - fixtures
from datasets import Dataset
from ranks import train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.errors import UserError
from rlhf_ray.models.load import build_causal_lm, load_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.reward_model import train_reward

LORA = {"rank": 4, "alpha": 8.0}
STEPS = 12


def new_run(folder, tokenizer, place):
    """A run folder with data, and a base model beside it."""
    base = recipe_of().model
    save_model(build_causal_lm(base, tokenizer, 0), tokenizer, place / "base", "card")
    run = RunFolder(place / "run")
    run.path.mkdir()
    os.symlink(folder.path / "data", run.path / "data")
    return run


def recipe_for(run, sft, **sections):
    model = {"name_or_path": str(run.path.parent / "base")}
    return recipe_of(model=model, sft=STAGE | {"max_steps": STEPS, "learning_rate": 1e-2} | sft, **sections)


def largest_gap(one, other):
    other = dict(other.named_parameters())
    return max(float((tensor - other[name]).detach().abs().max()) for name, tensor in one.named_parameters())


@pytest.fixture(scope="module")
def trained(folder, tokenizer, tmp_path_factory):
    """(recipe, run folder) of two runs of three stages, one after the other in one process: parts, and whole models.

    Parts: SFT and reward model by adapters, the reward model with checkpointed activations, the judge behind a frozen block.
    """
    learner = STAGE | {"epochs": 4, "learning_rate": 1e-2, "normalise_samples": 32}
    parts, whole = (new_run(folder, tokenizer, tmp_path_factory.mktemp(name)) for name in ("parts", "whole"))
    runs = {
        "parts": (recipe_for(
            parts, {"lora": LORA}, reward=learner | {"lora": LORA, "gradient_checkpointing": True},
            judge=learner | {"objective": "scores", "freeze_layers": 1, "normalise_samples": 0},
        ), parts),
        "whole": (recipe_for(
            whole, {"learning_rate": 3e-4},
            reward=STAGE | {"epochs": 12, "learning_rate": 3e-3, "normalise_samples": 64},
            judge=STAGE | {"objective": "scores", "epochs": 16, "learning_rate": 3e-3, "precision": "auto",
                           "normalise_samples": 0},
        ), whole),
    }  # fmt: skip
    train(*((*run, ("sft", "reward", "judge")) for run in runs.values()))
    return runs


def test_sft_reward_model_and_judge_train_a_part_and_are_saved_whole(trained):
    recipe, run = trained["parts"]
    base = load_file(run.path.parent / "base" / "model.safetensors")
    sft, reward, judge = (load_file(run.stage(name).model / "model.safetensors") for name in ("sft", "reward", "judge"))

    assert sft.keys() == base.keys() and not [*run.stage("sft").model.glob("adapter*")]
    assert torch.equal(sft["transformer.wte.weight"], base["transformer.wte.weight"])
    model = AutoModelForCausalLM.from_pretrained(run.stage("sft").model)
    assert largest_gap(model, load_causal_lm(run.path.parent / "base")) > 0.01
    assert largest_gap(model, plain_sft(recipe, run, STEPS)[0]) < 1e-4
    # 4 (in + out) of eight matrices of width 32.
    assert run.stage("sft").summary()["trained_parameters"] == 4 * 2 * (128 + 64 + 160 + 160)
    assert run.stage("sft").summary()["parameters"] == sum(map(torch.numel, base.values()))

    assert {name for name in reward if not torch.equal(reward[name], sft.get(name, torch.zeros(1)))} == {
        "score.weight", *(f"transformer.h.{block}.{layer}.weight" for block in (0, 1)
                          for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))}  # fmt: skip
    assert run.stage("reward").summary()["accuracy"] > 0.8
    config = AutoModelForSequenceClassification.from_pretrained(run.stage("reward").model).config
    assert config.num_labels == 1 and config.reward_std > 0

    frozen = {name for name in judge if ".h.0." in name or "wte" in name or "wpe" in name}
    assert {name for name in judge if name in sft and torch.equal(judge[name], sft[name])} == frozen


def test_reward_model_learns_pairs_and_its_figures_are_those_of_the_saved_folder(trained):
    _, folder = trained["whole"]
    summary = folder.stage("reward").summary()
    assert summary["accuracy"] > 0.9 > summary["longer_accuracy"]
    path = folder.stage("reward").model
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    def raw(prompt: str, response: str) -> float:
        return score(tokenizer(prompt).input_ids + tokenizer(response).input_ids + [tokenizer.eos_token_id])

    def score(ids: list[int]) -> float:
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
            drawn = row.tolist()
            end = drawn.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in drawn else len(drawn)
            scores.append(score(ids[0].tolist() + drawn[:end]))
    config = json.loads((path / "config.json").read_text())
    assert config["reward_mean"] == pytest.approx(np.mean(scores), abs=4 * np.std(scores) / 8)  # 64 samples: 4 errors
    assert config["reward_std"] == pytest.approx(np.std(scores), rel=0.4)
    assert summary["reward_mean"] == config["reward_mean"] and summary["reward_std"] == config["reward_std"]


def test_regression_to_scores_correlates_with_them(trained):
    _, folder = trained["whole"]
    summary = folder.stage("judge").summary()
    assert summary["pearson"] > 0.8 and summary["spearman"] > 0.6 and summary["accuracy"] > 0.8
    assert abs(summary["score_mean"]) < 0.5 and 0.4 < summary["score_std"] < 1.6  # fitted to standardised scores
    assert "reward_mean" not in json.loads((folder.stage("judge").model / "config.json").read_text())


def test_rows_that_do_not_fit_the_objective_are_refused(folder):
    with pytest.raises(UserError, match=r"reward.objective is 'scores'.*no column response, score.*objective: pairs"):
        train_reward(recipe_of(reward=STAGE | {"objective": "scores"}), folder, "reward")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"lora": LORA}, {"lora": LORA, "gradient_checkpointing": True},
                                     {"freeze_layers": 1, "gradient_checkpointing": True}])  # fmt: skip
def test_stopped_and_resumed_on_two_zero3_ranks_it_is_still_the_plain_loop(folder, tokenizer, tmp_path, options):
    run = new_run(folder, tokenizer, tmp_path)
    ranks = {"workers": 2, "microbatch_size": 4, "zero_stage": 3, "threads": 1}
    recipe = recipe_for(run, options | ranks)
    stage = run.stage("sft")
    stage.path.mkdir()
    stage.stop_file.touch()
    train((recipe, run, ("sft",)), world=2)
    assert not stage.done and list(stage.checkpoints.glob("*/COMPLETE"))
    stage.stop_file.unlink()
    train((recipe, run, ("sft",)), world=2)
    assert stage.summary()["steps"] == STEPS
    assert largest_gap(load_causal_lm(stage.model), plain_sft(recipe, run, STEPS)[0]) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora": LORA, "gradient_checkpointing": True}])
def test_a_reward_model_on_two_zero3_ranks_is_that_of_one(folder, tokenizer, tmp_path, options):
    """Packed lines under a model whose weights are gathered layer by layer."""
    found = []
    for world, ranks in ((1, {}), (2, {"workers": 2, "microbatch_size": 4, "zero_stage": 3, "threads": 1})):
        (tmp_path / str(world)).mkdir()
        run = new_run(folder, tokenizer, tmp_path / str(world))
        learner = STAGE | {"base": "model", "max_steps": STEPS, "learning_rate": 1e-2, "normalise_samples": 0}
        train((recipe_for(run, {}, reward=learner | options | ranks), run, ("reward",)), world=world)
        assert run.stage("reward").summary()["steps"] == STEPS
        found.append(load_file(run.stage("reward").model / "model.safetensors"))
    one, two = found
    assert one.keys() == two.keys() and max(float((one[name] - two[name]).abs().max()) for name in one) < 2e-3
    start = load_file(tmp_path / "1" / "base" / "model.safetensors")
    assert max(float((one[name] - weight).abs().max()) for name, weight in start.items() if name in one) > 0.01

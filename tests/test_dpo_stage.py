"""The DPO stage: in ranks of its own, and through Ray Train."""

import json
import os
import random

import numpy as np
import pytest
import torch
from cats import assert_same_weights, merged, plain_loop
from datasets import Dataset
from dogs import dogs_recipe, dogs_tokenizer, pairs_of  # noqa: F401 - fixtures
from ranks import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.data.role_files import COLUMNS, write_role
from rlhf_ray.errors import StageStopped
from rlhf_ray.models.load import build_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.trained_part import train_only_part
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.rows import dpo_rows, training_order

STAGE = {"batch_size": 16, "microbatch_size": 4, "max_length": 48, "precision": "float32", "learning_rate": 1e-3,
         "epochs": 3, "threads": 1}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, recipe, tokenizer) -> RunFolder:
    """What the data and SFT stages leave."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    tokenizer.save_pretrained(folder.tokenizer)
    folder.stage("sft").path.mkdir()
    save_model(build_causal_lm(recipe.model, tokenizer, 0), tokenizer, folder.stage("sft").model, "card")
    rng = random.Random(0)
    write_role(folder, "reward_train", pairs_of(rng, 160), COLUMNS["pairs"])
    write_role(folder, "reward_eval", pairs_of(rng, 48), COLUMNS["pairs"])
    return folder


def logratios(model, reference, prompt, replies, pad):
    """Differentiable: log pi - log ref of each reply, summed over its tokens [N]."""
    rows = [head + tail for head, tail in zip(prompt, replies, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.zeros_like(ids[:, 1:], dtype=torch.bool)
    for place, (head, row) in enumerate(zip(prompt, rows, strict=True)):
        mask[place, len(head) - 1 : len(row) - 1] = True

    def summed(one):
        logprobs = one(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (logprobs * mask).sum(1)

    with torch.no_grad():
        theirs = summed(reference)
    return summed(model) - theirs


def plain_dpo(recipe, folder):
    """The stage as a loop of plain torch over the same batches, each at once: (model, losses)."""
    config, start = recipe.dpo, folder.stage("sft").model
    tokenizer = AutoTokenizer.from_pretrained(start)
    model, reference = (AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32) for _ in range(2))
    train_only_part(
        model,
        lora=config.lora,
        freeze_layers=config.freeze_layers,
        gradient_checkpointing=False,
        seed=recipe.seed + 4000,
    )
    rows = dpo_rows(tokenizer, Dataset.from_parquet(str(folder.data("reward_train"))), max_length=config.max_length)
    wanted = round(config.epochs * len(rows.lengths))
    order = training_order(rows.lengths, batch_size=config.batch_size, rows=wanted, seed=recipe.seed + 4000)

    def loss_of(step):
        batch = rows.dataset[order[step * config.batch_size : (step + 1) * config.batch_size]]
        chosen, rejected = (
            logratios(model, reference, batch["prompt_ids"], batch[side], tokenizer.pad_token_id)
            for side in ("chosen_ids", "rejected_ids")
        )
        return -torch.log(torch.sigmoid(config.beta * (chosen - rejected))).mean()

    losses = plain_loop(model, config, len(order) // config.batch_size, loss_of)
    return merged(model, reference, config), losses


def with_dpo(recipe, **changes):
    return recipe.model_validate(recipe.model_dump(mode="json") | {"dpo": STAGE | changes})


PARTS = {
    "adapters": {"lora": {"rank": 4, "alpha": 8.0}, "learning_rate": 1e-2},
    "upper half": {"freeze_layers": 1, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def trained_parts(folder, recipe, tmp_path_factory):
    """Part -> (recipe, run folder), trained one after the other in one process."""
    runs = {}
    for part, options in PARTS.items():
        run = RunFolder(tmp_path_factory.mktemp("part"))
        for name in ("data", "sft"):
            os.symlink(folder.path / name, run.path / name)
        runs[part] = with_dpo(recipe, epochs=1, **options), run
    train(*((*job, ("dpo",)) for job in runs.values()))
    return runs


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_weights_trains_as_in_a_plain_loop(trained_parts, part):
    trained, run = trained_parts[part]
    stage = run.stage("dpo")
    model, losses = plain_dpo(trained, run)
    np.testing.assert_allclose([row["loss"] for row in read_metrics(stage.metrics)], losses, atol=1e-4)
    saved, start = (AutoModelForCausalLM.from_pretrained(at) for at in (stage.model, run.stage("sft").model))
    assert_same_weights(saved, model, 2e-4)
    same = {
        name for name, weight in saved.named_parameters() if torch.equal(weight, dict(start.named_parameters())[name])
    }
    frozen = {name for name in same if ".h.0." in name}
    assert "transformer.wte.weight" in same  # either way
    assert len(frozen) == {"adapters": 12 - 4, "upper half": 12}[part] and len(same) < len(list(saved.parameters()))


@pytest.mark.ray
@pytest.mark.slow
def test_two_ranks_with_accumulation_train_as_a_plain_loop_does(session, folder, recipe):
    from rlhf_ray.actors.supervised import run_supervised

    trained = with_dpo(recipe, workers=2, zero_stage=2)
    summary, stage = run_supervised(trained, folder, "dpo"), folder.stage("dpo")
    model, losses = plain_dpo(trained, folder)
    rows = read_metrics(stage.metrics)
    assert [row["step"] for row in rows] == list(range(1, 31)) and summary["steps"] == 30
    np.testing.assert_allclose([row["loss"] for row in rows], losses, atol=1e-4)
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and rows[0]["margin"] == 0  # model and reference agree
    saved = AutoModelForCausalLM.from_pretrained(stage.model)
    assert_same_weights(saved, model, 2e-4)
    # What cats and dogs are worth is easy to learn: the implicit reward tells the replies apart and the policy moves.
    assert rows[-1]["accuracy"] > 0.95 and rows[-1]["margin"] > 0.5 > rows[1]["margin"]
    assert (
        rows[-1]["logprob_chosen"] - rows[-1]["logprob_rejected"]
        > rows[0]["logprob_chosen"] - rows[0]["logprob_rejected"]
    )
    assert summary["accuracy"] > 0.95 and summary["eval_loss"] < 0.5 and summary["eval_rows"] == 48
    assert summary["logratio_chosen"] > summary["logratio_rejected"]
    assert saved.config.response_stops == ["e"]
    names = {file.name for file in stage.model.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= names and not stage.checkpoints.exists()
    assert json.loads(stage.done_file.read_text()) == summary == run_supervised(trained, folder, "dpo")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_stopped_and_resumed_it_is_still_the_plain_loop(session, folder, recipe, tmp_path, zero_stage):
    from rlhf_ray.actors.supervised import run_supervised

    run = RunFolder(tmp_path)
    for name in ("data", "sft"):
        os.symlink(folder.path / name, run.path / name)
    trained, stage = with_dpo(recipe, workers=2, zero_stage=zero_stage, epochs=8), run.stage("dpo")

    def stop_once_training(event):
        if "step" in event:
            stage.stop_file.touch()

    with pytest.raises(StageStopped):
        run_supervised(trained, run, "dpo", on_progress=stop_once_training)
    stopped_at = read_metrics(stage.metrics)[-1]["step"]
    assert 0 < stopped_at < 80
    run_supervised(trained, run, "dpo")
    model, losses = plain_dpo(trained, run)
    rows = read_metrics(stage.metrics)
    assert [row["step"] for row in rows] == list(range(1, 81))
    np.testing.assert_allclose([row["loss"] for row in rows], losses, atol=2e-3)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(stage.model), model, 2e-3)

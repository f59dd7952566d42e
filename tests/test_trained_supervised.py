"""SFT and reward models that train a part of their weights: against a plain loop, and what their folders hold."""

import os
import socket

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from test_supervised import STAGE, folder, recipe_of, tokenizer  # noqa: F401 - fixtures
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.config import Recipe
from rlhf_ray.models.load import build_causal_lm, load_causal_lm, save_model
from rlhf_ray.models.trained_part import MergedLayers, plain_name, train_only_part
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.learning_rate import rate_factor
from rlhf_ray.supervised.rows import sft_rows, training_order

LORA = {"rank": 4, "alpha": 8.0}
STEPS = 12


def work(rank, world, port, path, values, stages):
    """One rank: the stages in order, as a worker of Ray Train calls them."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    from rlhf_ray.supervised.dpo import train_dpo
    from rlhf_ray.supervised.reward_model import train_reward
    from rlhf_ray.supervised.sft import train_sft
    from rlhf_ray.training.distributed import join_group

    join_group(rank=rank, world_size=world, address="127.0.0.1", port=port, device_type="cpu", timeout_s=120)
    recipe, run = Recipe.model_validate(values), RunFolder(path)
    trainers = {"sft": train_sft, "reward": train_reward, "judge": train_reward, "dpo": train_dpo}
    for stage in stages:
        summary = trainers[stage](recipe, run, stage)
        if rank == 0 and summary["ended_by"] != "stop":
            run.stage(stage).finish(summary)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train(recipe, run, *stages, world=1):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = recipe.model_dump(mode="json")
    torch.multiprocessing.spawn(work, args=(world, port, run.path, values, stages), nprocs=world)


@pytest.fixture
def run(folder, tokenizer, tmp_path):  # noqa: F811
    """A run folder with data, and a base model beside it."""
    base = recipe_of().model
    save_model(build_causal_lm(base, tokenizer, 0), tokenizer, tmp_path / "base", "card")
    run = RunFolder(tmp_path / "run")
    for stage in ("sft", "reward", "judge"):
        run.stage(stage).path.mkdir(parents=True)
    os.symlink(folder.path / "data", run.path / "data")
    return run


def recipe_for(run, sft, **sections):
    model = {"name_or_path": str(run.path.parent / "base")}
    return recipe_of(model=model, sft=STAGE | {"max_steps": STEPS, "learning_rate": 1e-2} | sft, **sections)


def plain_sft(recipe, run):
    """The same steps in a loop of plain torch, and the adapter merged -> the model."""
    config = recipe.sft
    tokens = AutoTokenizer.from_pretrained(run.tokenizer)
    model = load_causal_lm(recipe.model.name_or_path)
    train_only_part(
        model, lora=config.lora, freeze_layers=config.freeze_layers, gradient_checkpointing=False, seed=recipe.seed
    )
    rows = sft_rows(tokens, Dataset.from_parquet(str(run.data("sft_train"))), max_length=config.max_length)
    order = training_order(rows.lengths, batch_size=config.batch_size, rows=STEPS * config.batch_size, seed=recipe.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    for step in range(STEPS):
        batch = rows.dataset[order[step * config.batch_size : (step + 1) * config.batch_size]]
        longest = max(map(len, batch["input_ids"]))
        ids = torch.tensor([row + [tokens.pad_token_id] * (longest - len(row)) for row in batch["input_ids"]])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in batch["labels"]])
        logits = model(input_ids=ids).logits[:, :-1]
        factor = rate_factor((step + 0.5) / STEPS, schedule=config.schedule, warmup_ratio=config.warmup_ratio)
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        optimizer.zero_grad()
        F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    if config.lora is None:
        return model
    merged = load_causal_lm(recipe.model.name_or_path)
    adapter = {plain_name(f"model.{name}"): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    MergedLayers(merged, config.lora).load(adapter)
    return merged


def largest_gap(one, other):
    other = dict(other.named_parameters())
    return max(float((tensor - other[name]).detach().abs().max()) for name, tensor in one.named_parameters())


def test_sft_reward_model_and_judge_train_a_part_and_are_saved_whole(run):
    """SFT and reward model by adapters, the reward model with checkpointed activations, the judge behind a frozen block."""
    learner = STAGE | {"epochs": 4, "learning_rate": 1e-2, "normalise_samples": 32}
    recipe = recipe_for(
        run, {"lora": LORA}, reward=learner | {"lora": LORA, "gradient_checkpointing": True},
        judge=learner | {"objective": "scores", "freeze_layers": 1, "normalise_samples": 0},
    )  # fmt: skip
    train(recipe, run, "sft", "reward", "judge")
    base = load_file(run.path.parent / "base" / "model.safetensors")
    sft, reward, judge = (load_file(run.stage(name).model / "model.safetensors") for name in ("sft", "reward", "judge"))

    assert sft.keys() == base.keys() and not [*run.stage("sft").model.glob("adapter*")]
    assert torch.equal(sft["transformer.wte.weight"], base["transformer.wte.weight"])
    model = AutoModelForCausalLM.from_pretrained(run.stage("sft").model)
    assert largest_gap(model, load_causal_lm(run.path.parent / "base")) > 0.01
    assert largest_gap(model, plain_sft(recipe, run)) < 1e-4
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


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"lora": LORA}, {"lora": LORA, "gradient_checkpointing": True},
                                     {"freeze_layers": 1, "gradient_checkpointing": True}])  # fmt: skip
def test_stopped_and_resumed_on_two_zero3_ranks_it_is_still_the_plain_loop(run, options):
    ranks = {"workers": 2, "microbatch_size": 4, "zero_stage": 3, "threads": 1}
    recipe = recipe_for(run, options | ranks)
    stage = run.stage("sft")
    stage.stop_file.touch()
    train(recipe, run, "sft", world=2)
    assert not stage.done and list(stage.checkpoints.glob("*/COMPLETE"))
    stage.stop_file.unlink()
    train(recipe, run, "sft", world=2)
    assert stage.summary()["steps"] == STEPS
    assert largest_gap(load_causal_lm(stage.model), plain_sft(recipe, run)) < 2e-3

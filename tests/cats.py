"""Prepared data of a world where people prefer cats, and a recipe whose models learn that."""

import os
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoTokenizer

from rlhf_ray.config import Recipe
from rlhf_ray.data.store import COLUMNS, write_role
from rlhf_ray.models.load import build_causal_lm
from rlhf_ray.models.tokenizer import train_tokenizer
from rlhf_ray.models.trained_part import MergedLayers, plain_name, train_only_part
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.learning_rate import rate_factor
from rlhf_ray.supervised.rows import sft_rows, training_order

WORDS = ["the", "a", "cat", "dog", "ran", "sat", "on", "under", "red", "blue", "big", "small", "mat", "tree", "and"]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module", name="tokenizer")
def cats_tokenizer():
    rng = random.Random(0)
    return train_tokenizer([sentence(rng, 20) for _ in range(50)], 300)


STAGE = {"batch_size": 16, "microbatch_size": 8, "max_length": 48, "precision": "float32", "warmup_ratio": 0.1}


def recipe_of(**sections) -> Recipe:
    scratch = {"layers": 2, "width": 32, "heads": 2, "positions": 96, "vocab_size": 300}
    return Recipe.model_validate({
        "name": "tiny", "model": {"from_scratch": scratch}, "generation": {"max_new_tokens": 8},
        "data": {"max_prompt_tokens": 32}, "sft": STAGE, "reward": STAGE, "judge": STAGE | {"objective": "scores"},
        "tracking": {"tensorboard": False}, **sections,
    })  # fmt: skip


@pytest.fixture(scope="module", name="folder")
def cats_folder(tmp_path_factory, tokenizer) -> RunFolder:
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


@pytest.fixture(scope="module", name="ray_cluster")
def ray_of_two_cpus():
    import ray

    # The workers find toy_plugin beside this file.
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    variables = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
             runtime_env={"env_vars": variables})  # fmt: skip
    yield ray
    ray.shutdown()


def plain_sft(recipe: Recipe, folder: RunFolder, steps: int) -> tuple[torch.nn.Module, list[float]]:
    """The SFT stage as a loop of plain torch -> (model, its adapter merged; losses).

    The same rows in the same order, mean loss over labelled tokens, clip 1.
    """
    config, tokenizer = recipe.sft, AutoTokenizer.from_pretrained(folder.tokenizer)
    model = build_causal_lm(recipe.model, tokenizer, recipe.seed).train()
    train_only_part(
        model, lora=config.lora, freeze_layers=config.freeze_layers, gradient_checkpointing=False, seed=recipe.seed
    )
    rows = sft_rows(tokenizer, Dataset.from_parquet(str(folder.data("sft_train"))), max_length=config.max_length)
    order = training_order(rows.lengths, batch_size=config.batch_size, rows=steps * config.batch_size, seed=recipe.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=config.weight_decay)
    losses = []
    for step in range(steps):
        batch = rows.dataset[order[step * config.batch_size : (step + 1) * config.batch_size]]
        longest = max(map(len, batch["input_ids"]))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in batch["input_ids"]])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in batch["labels"]])
        logits = model(input_ids=ids).logits[:, :-1]  # padding stands on the right: no token sees it
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
        optimizer.param_groups[0]["lr"] = config.learning_rate * rate_factor(
            (step + 0.5) / steps, schedule=config.schedule, warmup_ratio=config.warmup_ratio
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    if config.lora is None:
        return model, losses
    merged = build_causal_lm(recipe.model, tokenizer, recipe.seed)
    adapter = {plain_name(f"model.{name}"): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    MergedLayers(merged, config.lora).load(adapter)
    return merged, losses


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module, atol: float) -> None:
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")

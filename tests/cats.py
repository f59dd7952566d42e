"""Prepared data of a world where people prefer cats, and a recipe whose models learn that."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoTokenizer

from rlhf_ray.config import Recipe, TrainConfig
from rlhf_ray.data.role_files import COLUMNS, write_role
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

    def loss_of(step):
        batch = rows.dataset[order[step * config.batch_size : (step + 1) * config.batch_size]]
        longest = max(map(len, batch["input_ids"]))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in batch["input_ids"]])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in batch["labels"]])
        logits = model(input_ids=ids).logits[:, :-1]  # padding stands on the right: no token sees it
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))

    losses = plain_loop(model, config, steps, loss_of)
    return merged(model, build_causal_lm(recipe.model, tokenizer, recipe.seed), config), losses


def plain_loop(model, config: TrainConfig, steps: int, loss_of: Callable[[int], torch.Tensor]) -> list[float]:
    """Steps of AdamW on what trains, at the stage's rates, clip 1. loss_of(step): of that step's batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.0, weight_decay=config.weight_decay), []
    for step in range(steps):
        loss = loss_of(step)
        optimizer.param_groups[0]["lr"] = config.learning_rate * rate_factor(
            (step + 0.5) / steps, schedule=config.schedule, warmup_ratio=config.warmup_ratio
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def merged(model, start, config: TrainConfig):
    """The model, or where it has an adapter `start` with that in its weights."""
    if config.lora is None:
        return model
    adapter = {plain_name(f"model.{name}"): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    MergedLayers(start, config.lora).load(adapter)
    return start


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module, atol: float) -> None:
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")

"""DPO: rows and figures by hand, TRL's losses against float64 brute force, and the stage through Ray Train."""

import json
import os
import random

import numpy as np
import pytest
import torch
from cats import WORDS, assert_same_weights, merged, plain_loop
from datasets import Dataset
from ranks import train
from tiny import tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig as TrlDpoConfig

from rlhf_ray.config import DpoConfig
from rlhf_ray.data.store import COLUMNS, write_role
from rlhf_ray.errors import StageStopped
from rlhf_ray.models.load import build_causal_lm, save_model
from rlhf_ray.models.tokenizer import train_tokenizer
from rlhf_ray.models.trained_part import train_only_part
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.dpo import Dpo, heldout_figures, loss_arguments
from rlhf_ray.supervised.dpo_metrics import dpo_figures
from rlhf_ray.supervised.rows import dpo_rows, training_order

SCRATCH = {"layers": 2, "width": 32, "heads": 2, "positions": 96, "vocab_size": 300}


def words(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def pairs_of(rng, count):
    """People prefer cats."""
    rows = []
    for _ in range(count):
        reply = " " + words(rng, 3, 9)
        rows.append({
            "prompt": words(rng, 1, 5),
            "chosen": reply.replace("dog", "cat") + " cat",
            "rejected": reply.replace("cat", "dog") + " dog" * rng.randint(1, 4),
        })  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return train_tokenizer([words(rng, 20, 20) for _ in range(50)], 300)


@pytest.fixture(scope="module")
def recipe():
    return tiny_recipe(model={"from_scratch": SCRATCH}, sft={"max_length": 48}, reward={"max_length": 48})


def model_of(recipe, tokenizer, seed):
    """Random weights, far enough from uniform that two seeds differ by nats."""
    model = build_causal_lm(recipe.model, tokenizer, seed)
    for weight in model.parameters():
        weight.data *= 2.0
    return model


# -- rows -------------------------------------------------------------------------------------------------------------


def test_eos_belongs_to_both_replies_and_the_prompt_to_neither(tokenizer):
    rows = dpo_rows(tokenizer, Dataset.from_list([{"prompt": "the", "chosen": " cat sat", "rejected": " dog"}]),
                    max_length=64)  # fmt: skip
    ids = [tokenizer(text).input_ids for text in ("the", " cat sat", " dog")]
    eos = [tokenizer.eos_token_id]
    assert rows.dataset[0] == {"prompt_ids": ids[0], "chosen_ids": ids[1] + eos, "rejected_ids": ids[2] + eos}
    assert rows.cut == 0 and rows.lengths.tolist() == [2 * len(ids[0]) + len(ids[1]) + len(ids[2]) + 2]


@pytest.mark.parametrize("bos", [False, True])
def test_the_longer_reply_says_how_much_prompt_both_keep(tokenizer, bos):
    """A tokenizer with BOS as Llama's, which stays when the prompt is cut."""

    class WithBos:
        bos_token_id, eos_token_id = (7 if bos else None), tokenizer.eos_token_id

        def __call__(self, texts, add_special_tokens=True, **options):
            if isinstance(texts, str):
                return type("", (), {"input_ids": [7] * bos + list(map(ord, texts))})
            return type("", (), {"input_ids": [list(map(ord, text)) for text in texts]})

    texts = [
        {"prompt": "abcdef", "chosen": "123", "rejected": "9"},
        {"prompt": "ab", "chosen": "12345678", "rejected": "9"},
        {"prompt": "abcdef", "chosen": "9", "rejected": "123"},
    ]
    rows = dpo_rows(WithBos(), Dataset.from_list(texts), max_length=7)
    eos, first = tokenizer.eos_token_id, [7] * bos
    assert rows.cut == 3
    assert rows.dataset[2]["prompt_ids"] == rows.dataset[0]["prompt_ids"]
    assert rows.dataset[0] == {
        "prompt_ids": first + list(map(ord, "ef" if bos else "def")),
        "chosen_ids": [*map(ord, "123"), eos],
        "rejected_ids": [ord("9"), eos],
    }
    assert rows.dataset[1] == {  # no room for any prompt, and the reply keeps its end
        "prompt_ids": first,
        "chosen_ids": [*map(ord, "45678" if bos else "345678"), eos],
        "rejected_ids": [ord("9"), eos],
    }


# -- the losses -------------------------------------------------------------------------------------------------------


def brute_logprob(model, tokenizer, prompt, reply):
    """Log-prob of the reply's tokens and EOS given the prompt, one row at a time in float64; and their number."""
    head, tail = tokenizer(prompt).input_ids, tokenizer(reply).input_ids + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([head + tail])).logits[0].double()
    total = sum(
        (logits[len(head) + t - 1, token] - torch.logsumexp(logits[len(head) + t - 1], 0)).item()
        for t, token in enumerate(tail)
    )
    return total, len(tail)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_the_papers(config, model, reference, tokenizer, pairs):
    """The mean loss, from the formulas as printed: DPO eq. 7 (2305.18290), Mitchell's cDPO note, IPO eq. 17 (2310.12036),
    the last with log-ratios a token, which is TRL's reading. Also each pair's implicit rewards."""
    losses, rewards = [], []
    for pair in pairs:
        h = {}
        for side in ("chosen", "rejected"):
            ours, tokens = brute_logprob(model, tokenizer, pair["prompt"], pair[side])
            theirs, _ = brute_logprob(reference, tokenizer, pair["prompt"], pair[side])
            h[side] = (ours - theirs, tokens)
        (chosen, chosen_tokens), (rejected, rejected_tokens) = h["chosen"], h["rejected"]
        if config.loss == "ipo":
            losses.append((chosen / chosen_tokens - rejected / rejected_tokens - 0.5 / config.beta) ** 2)
        else:
            x, eps = config.beta * (chosen - rejected), config.label_smoothing
            losses.append(-(1 - eps) * np.log(sigmoid(x)) - eps * np.log(sigmoid(-x)))
        rewards.append((config.beta * chosen, config.beta * rejected))
    return np.mean(losses), np.array(rewards)


LOSSES = [{"beta": 0.1}, {"beta": 0.5, "label_smoothing": 0.2}, {"beta": 0.25, "loss": "ipo"}]


@pytest.mark.parametrize("options", LOSSES, ids=["dpo", "cdpo", "ipo"])
def test_the_losses_are_those_of_the_papers(recipe, tokenizer, tmp_path, options):
    config = DpoConfig(**options)
    pairs = pairs_of(random.Random(4), 6)
    model, reference = model_of(recipe, tokenizer, 0), model_of(recipe, tokenizer, 1)
    expected, rewards = by_the_papers(config, model, reference, tokenizer, pairs)
    rows = dpo_rows(tokenizer, Dataset.from_list(pairs), max_length=64)
    args = TrlDpoConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], beta=config.beta, pad_to_multiple_of=16, max_length=None,
        per_device_train_batch_size=6, remove_unused_columns=False, **loss_arguments(config),
    )  # fmt: skip
    trainer = Dpo(model=model, ref_model=reference, args=args, train_dataset=rows.dataset, processing_class=tokenizer)
    loss = trainer.compute_loss(model, trainer.data_collator([rows.dataset[i] for i in range(6)]))
    assert loss.item() == pytest.approx(expected, rel=2e-5)
    logged = {name: values[-1] for name, values in trainer._metrics["train" if model.training else "eval"].items()}
    assert logged["rewards/margins"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), rel=1e-4, abs=1e-5)
    assert logged["rewards/accuracies"] == pytest.approx((rewards[:, 0] > rewards[:, 1]).mean())

    found = heldout_figures(model.eval(), reference.eval(), rows, config, dtype=torch.float32)
    assert found["eval_loss"] == pytest.approx(expected, rel=2e-5)
    assert found["accuracy"] == pytest.approx((rewards[:, 0] > rewards[:, 1]).mean())
    assert found["margin_mean"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), rel=1e-4, abs=1e-5)
    assert found["logratio_chosen"] == pytest.approx(rewards[:, 0].mean() / config.beta, rel=1e-4, abs=1e-4)
    assert found["drift"] == pytest.approx(-rewards.mean() / config.beta, rel=1e-4, abs=1e-4)


def test_figures_by_hand():
    sides = {
        "chosen_logratios": np.array([2.0, -1.0]), "rejected_logratios": np.array([-2.0, -1.0]),
        "chosen_lengths": np.array([4, 2]), "rejected_lengths": np.array([2, 5]),
    }  # fmt: skip
    found = dpo_figures(**sides, beta=0.5, loss="sigmoid", label_smoothing=0.0)
    # margins 0.5 * 4 = 2 and 0: losses log(1 + e^-2) and log 2; a tie counts half
    assert found["eval_loss"] == pytest.approx((0.126928011 + 0.693147181) / 2)
    assert (found["accuracy"], found["margin_mean"], found["pairs"]) == (0.75, 1.0, 2)
    assert (found["logratio_chosen"], found["logratio_rejected"], found["drift"]) == (0.5, -1.5, 0.5)
    # (2/4 + 2/2 - 1)^2 = 0.25 and (-1/2 + 1/5 - 1)^2 = 1.69
    assert dpo_figures(**sides, beta=0.5, loss="ipo", label_smoothing=0.0)["eval_loss"] == pytest.approx(0.97)


# -- the stage through Ray Train --------------------------------------------------------------------------------------

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

"""DPO: rows and figures by hand, TRL's losses against float64 brute force."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from dogs import dogs_recipe, dogs_tokenizer, pairs_of  # noqa: F401 - fixtures
from trl import DPOConfig as TrlDpoConfig

from rlhf_ray.config import DpoConfig
from rlhf_ray.models.load import build_causal_lm
from rlhf_ray.supervised.dpo import Dpo, heldout_figures, loss_arguments
from rlhf_ray.supervised.dpo_metrics import dpo_figures
from rlhf_ray.supervised.rows import dpo_rows


def model_of(recipe, tokenizer, seed):
    """Random weights, far enough from uniform that two seeds differ by nats."""
    model = build_causal_lm(recipe.model, tokenizer, seed)
    for weight in model.parameters():
        weight.data *= 2.0
    return model


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

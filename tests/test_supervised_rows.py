"""SFT and reward models: rows, learning rate, DeepSpeed's configuration and precision, by hand."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cats import cats_tokenizer, sentence  # noqa: F401 - a fixture
from datasets import Dataset
from transformers import GPT2Config

from rlhf_ray.errors import NotFinite, UserError
from rlhf_ray.runs.run_folder import StageFolder, write_figures
from rlhf_ray.supervised.learning_rate import progress_of, rate_factor
from rlhf_ray.supervised.reward_metrics import score_figures
from rlhf_ray.supervised.rows import packed_rows, pair_rows, score_rows, sft_rows, training_order
from rlhf_ray.supervised.sft import heldout_loss
from rlhf_ray.training.deepspeed_config import deepspeed_config
from rlhf_ray.training.precision import resolve_precision

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


# ---- figures --------------------------------------------------------------------------------------------------------


class Sure(torch.nn.Module):
    """Is as sure of the last token as its logit says."""

    def __init__(self, logit: float):
        super().__init__()
        self.weight, self.config = torch.nn.Parameter(torch.tensor(logit)), GPT2Config()

    def forward(self, input_ids, **others):
        logits = torch.zeros(*input_ids.shape, 600)
        logits[..., 599] = self.weight
        return SimpleNamespace(logits=logits)


def test_a_loss_whose_perplexity_is_beyond_a_double_is_kept_and_one_that_is_no_number_is_refused(tokenizer):
    rows = sft_rows(tokenizer, Dataset.from_dict({"prompt": ["a cat"], "response": [" sat"]}), max_length=64)
    assert tokenizer.vocab_size < 600

    def figures(logit):
        return heldout_loss(Sure(logit), tokenizer, rows, dtype=torch.float32, batch_size=1)

    assert figures(0.0)["eval_perplexity"] == pytest.approx(600)  # all alike
    # e ** 709.78 is the largest double
    assert figures(709.0)["eval_perplexity"] == pytest.approx(math.exp(709.0), rel=1e-3)
    assert figures(1000.0)["eval_loss"] == pytest.approx(1000.0) and figures(1000.0)["eval_perplexity"] is None
    for logit in (math.nan, math.inf):
        with pytest.raises(NotFinite, match="held-out text is nan; .*learning_rate"):
            figures(logit)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_closing_figures_are_json(tmp_path, value):
    stage = StageFolder(tmp_path)
    with pytest.raises(NotFinite, match=r"\(of\.loss is -?(NaN|Infinity)\); .*learning_rate"):
        stage.finish({"steps": 3, "of": {"loss": value}})
    assert not stage.done
    with pytest.raises(NotFinite, match=r"\(0 is "):
        write_figures(stage.done_file, {"0": [1.0, value]})


def test_a_correlation_of_what_does_not_vary_is_unknown():
    human, lengths = np.array([1.0, 2.0, 3.0, 4.0]), np.array([3, 1, 2, 5])
    figures = score_figures(np.zeros(4), human, lengths, seed=0, middle=2.5)
    assert [figures[name] for name in ("pearson", "spearman", "length_pearson", "length_spearman")] == [None] * 4
    json.dumps(figures, allow_nan=False)

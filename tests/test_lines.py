"""Supervised passes on packed lines: the numbers are those of each row alone, as transformers computes them."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_ray.config import LoraConfig
from rlhf_ray.models.load import disable_dropout
from rlhf_ray.models.trained_part import train_only_part
from rlhf_ray.supervised.lines import LineLoss, classify_lines

LENGTHS, WIDTH, PAD, IGNORED = (5, 17, 9, 1, 16), 32, 0, -100
GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": PAD,
        "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
LLAMA = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip


def batch():
    """Rows padded on the right; the first three tokens of each are its prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((len(LENGTHS), WIDTH), PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(2, 100, (length,), generator=generator)
        mask[row, :length] = 1
        labels[row, 3:length] = ids[row, 3:length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def largest_gap(model, other):
    pairs = [*zip(model.parameters(), other.parameters(), strict=True)]
    assert [one.grad is None for one, _ in pairs] == [two.grad is None for _, two in pairs]
    return max(float((one.grad.double() - two.grad.double()).abs().max()) for one, two in pairs if two.grad is not None)


@pytest.mark.parametrize(
    "make", [lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), lambda: LlamaForCausalLM(LlamaConfig(**LLAMA))],
    ids=["gpt2", "llama"],
)  # fmt: skip
@pytest.mark.parametrize(
    "part", [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "freeze_layers": 1},
             {"gradient_checkpointing": True, "lora": LoraConfig(rank=2, alpha=2.0)}],
    ids=["whole", "checkpointed", "upper block", "adapters"],
)  # fmt: skip
def test_the_loss_is_that_of_each_row_alone_in_float64(make, part):
    torch.manual_seed(1)
    model = make()
    disable_dropout(model)
    train_only_part(model, **{"lora": None, "freeze_layers": 0, "gradient_checkpointing": False, "seed": 0} | part)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:  # zero at first, so that A would have no gradient
            torch.nn.init.normal_(weight, std=0.1)
    exact, inputs = copy.deepcopy(model).double(), batch()
    expected = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        logits = exact(input_ids=inputs["input_ids"][row : row + 1, :length]).logits[0]
        expected = expected + cross_entropy(
            logits[:-1], inputs["labels"][row, 1:length], ignore_index=IGNORED, reduction="sum"
        )
    expected.backward()
    line_loss = LineLoss.of(model)
    assert line_loss is not None
    found = line_loss.summed(model, inputs)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert largest_gap(model, exact) < 1e-5


def test_a_batch_without_labels_costs_nothing():
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    inputs = batch() | {"labels": torch.full((len(LENGTHS), WIDTH), IGNORED)}
    found = LineLoss.of(model).summed(model, inputs)
    found.backward()
    assert found.item() == 0.0


def test_a_classifier_scores_each_row_as_it_does_alone_in_float64():
    torch.manual_seed(2)
    model = GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=1))
    disable_dropout(model)
    exact, inputs = copy.deepcopy(model).double(), batch()
    weights = torch.linspace(-1, 1, len(LENGTHS), dtype=torch.float64)
    expected = torch.cat(
        [exact(input_ids=inputs["input_ids"][row : row + 1, :length]).logits[0] for row, length in enumerate(LENGTHS)]
    )
    (expected * weights).sum().backward()
    assert classify_lines(model)
    found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    (found.squeeze(-1) * weights).sum().backward()
    torch.testing.assert_close(found.squeeze(-1).double(), expected, atol=1e-6, rtol=0)
    assert largest_gap(model, exact) < 1e-6


class Doubled(GPT2ForSequenceClassification):
    """A class of somebody else's, whose scores are not its head at one token."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_classifier_of_another_kind_keeps_its_own_forward():
    model, inputs = Doubled(GPT2Config(**GPT2, num_labels=1)).eval(), batch()
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model(**given).logits
    assert not classify_lines(model) and torch.equal(model(**given).logits, expected)

"""Linear layers with low-rank adapters give what peft's own give."""

import pytest
import torch
from crossed import crossed
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf_ray.config import LoraConfig as OurConfig
from rlhf_ray.models import trained_part
from rlhf_ray.models.low_rank import LowRankLinear
from rlhf_ray.models.trained_part import adapter_off

LAYERS = {
    "linear": lambda: nn.Linear(6, 10, bias=False),
    "linear with bias": lambda: nn.Linear(6, 10),
    "conv1d": lambda: Conv1D(10, 6),
}


def adapted(layer, dtype=torch.float64, **options):
    """The layer with an adapter that is not at its start, B = 0."""
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], fan_in_fan_out=isinstance(layer, Conv1D), **options)
    config._register_custom_module({nn.Linear: LowRankLinear, Conv1D: LowRankLinear})
    model = nn.Sequential(layer.to(dtype))
    inject_adapter_in_model(config, model)
    assert type(model[0]) is LowRankLinear
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.to(dtype)


def results(model, x, forward=LowRankLinear.forward):
    """Output, and gradients by input, A and B."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = forward(model[0], x)
    (output.float() * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
    trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2
    return [output, x.grad, *trained]


@crossed("shape, kind", {"7x6": [7, 6], "1x7x6": [1, 7, 6], "2x4x6": [2, 4, 6]}, list(LAYERS))
def test_output_and_gradients_are_pefts(kind, shape):
    model = adapted(LAYERS[kind]())
    x = torch.randn(*shape, dtype=torch.float64)
    for ours, theirs in zip(results(model, x), results(model, x, Linear.forward), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_under_autocast_it_is_no_farther_from_the_exact_result_than_peft(kind):
    exact = adapted(LAYERS[kind]())
    x = torch.randn(64, 6, dtype=torch.float64)
    wanted = results(exact, x)
    model = adapted(LAYERS[kind]()).float()
    model.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (results(model, x.float(), forward) for forward in (LowRankLinear.forward, Linear.forward))
    for place, right in enumerate(wanted):
        assert ours[place].dtype == theirs[place].dtype
        far = [float((each[place] - right).detach().norm() / right.detach().norm()) for each in (ours, theirs)]
        assert 0 < far[0] < 1.2 * far[1] + 1e-6 < 0.02, (place, far)


@pytest.mark.parametrize("kind", LAYERS)
def test_without_its_adapter_it_is_the_layer(kind):
    model, x = adapted(LAYERS[kind](), torch.float32), torch.randn(5, 6)
    plain = model[0].get_base_layer()
    for enabled in (False, True):
        with torch.no_grad(), adapter_off(model), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(model(x), plain(x))


def test_a_changed_weight_is_cast_again():
    model, x = adapted(nn.Linear(6, 10), torch.float32), torch.randn(5, 6)
    with torch.no_grad(), adapter_off(model), torch.autocast("cpu", torch.bfloat16):
        model(x)
        model[0].get_base_layer().weight.mul_(2)
        model[0].get_base_layer().bias.zero_()
        changed = model(x)
        assert torch.equal(changed, model[0].get_base_layer()(x))


@pytest.mark.parametrize("reason", ["dropout", "sharded", "two adapters", "trained base"])
def test_what_it_cant_do_is_left_to_peft(reason, monkeypatch):
    model = adapted(nn.Linear(6, 10), lora_dropout=0.5 if reason == "dropout" else 0.0)
    base = model[0].get_base_layer()
    if reason == "sharded":
        base.weight.ds_id = 0
    elif reason == "two adapters":
        model[0].set_adapter(["default", "default"])
    elif reason == "trained base":
        base.weight.requires_grad_(True)
    seen = []
    monkeypatch.setattr(Linear, "forward", lambda self, x, *rest, **options: seen.append(1) or x)
    model(torch.randn(5, 6, dtype=torch.float64))
    assert seen == [1]


def test_a_models_adapters_are_of_this_kind(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    ))  # fmt: skip
    trained_part.train_only_part(model, lora=OurConfig(rank=2), freeze_layers=0, gradient_checkpointing=False, seed=0)
    kinds = [type(module) for module in model.modules() if isinstance(module, Linear)]
    assert kinds == [LowRankLinear] * (7 * 2)

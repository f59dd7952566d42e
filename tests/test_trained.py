"""Adapters, frozen layers, gradient checkpointing: what trains, what stays, what is saved."""

import pytest
import torch
from trained_models import (  # noqa: F401 - fixtures
    PARTS,
    part_of,
    recipe_for,
    run_real,
    trained_family,
    trained_folder,
    trained_of,
    trained_start,
)
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import UserError
from rlhf_ray.models.critic import build_critic
from rlhf_ray.models.load import load_causal_lm, load_reward_model
from rlhf_ray.models.model_problems import check_model
from rlhf_ray.models.trained_part import (
    MergedLayers,
    adapter_off,
    frozen_names,
    load_trained,
    save_adapter,
)
from rlhf_ray.training.forward import LogprobModel, token_batch

LORA = LoraConfig(rank=3, alpha=6.0)
LAYERS = {"gpt2": {"c_attn", "c_proj", "c_fc"}, "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
          "down_proj"}}  # fmt: skip
IDS = torch.tensor([[5, 9, 11, 40, 7, 3, 250, 19]])


def adapted(start, seed=0):
    """A start model with adapters that change something: B is random."""
    model = part_of(load_causal_lm(start), LORA, seed=seed)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_every_linear_layer_of_the_body_gets_an_adapter_and_nothing_else_trains(family, start):
    model = part_of(load_causal_lm(start), LORA)
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in trained_of(model)}
    assert names == LAYERS[family]
    assert all(".lora_" in name for name in trained_of(model))
    assert len(trained_of(model)) == 3 * (4 if family == "gpt2" else 7) * 2
    assert all(min(tensor.shape) == 3 for tensor in trained_of(model).values())


def test_only_the_named_layers_get_one_where_there_are_names(family, start):
    kind = "attn.c_proj" if family == "gpt2" else "o_proj"
    model = part_of(load_causal_lm(start), LORA.model_copy(update={"target_modules": (kind,)}))
    assert len(trained_of(model)) == 6 and all(f"{kind}.lora_" in name for name in trained_of(model))
    with pytest.raises(UserError, match="names 'x_proj', but no linear layer.*c_proj|names 'x_proj'.*q_proj"):
        part_of(load_causal_lm(start), LORA.model_copy(update={"target_modules": ("x_proj",)}))


def test_fresh_adapters_change_nothing_and_follow_from_the_seed(start):
    plain, model, other = (load_causal_lm(start) for _ in range(3))
    state = torch.random.get_rng_state()
    part_of(model, LORA, seed=1), part_of(other, LORA, seed=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(logits(model), logits(plain))
    again = trained_of(part_of(load_causal_lm(start), LORA, seed=1))
    assert all(torch.equal(tensor, again[name]) for name, tensor in trained_of(model).items())
    assert any(not torch.equal(tensor, again[name]) for name, tensor in trained_of(other).items())


def test_with_its_adapter_off_the_model_is_the_start_model_bit_for_bit(start):
    plain, model = load_causal_lm(start), adapted(start)
    assert (logits(model) - logits(plain)).abs().max() > 0.01
    names = set(trained_of(model))
    with adapter_off(model):
        assert torch.equal(logits(model), logits(plain))
    assert (logits(model) - logits(plain)).abs().max() > 0.01 and set(trained_of(model)) == names


def test_merged_weights_are_those_of_pefts_own_merge(start):
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    model, plain = adapted(start), load_causal_lm(start)
    MergedLayers(plain, LORA).load(trained_of(model))
    theirs = get_peft_model(load_causal_lm(start), PeftLora(r=3, lora_alpha=6, target_modules="all-linear"))
    values = {f"base_model.model.{name}.default.weight": tensor for name, tensor in trained_of(model).items()}
    assert not theirs.load_state_dict(values, strict=False).unexpected_keys
    merged = dict(theirs.merge_and_unload().named_parameters())
    for name, tensor in plain.named_parameters():
        torch.testing.assert_close(
            tensor, merged[name], atol=1e-7, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=0)
    once = load_causal_lm(start)  # as a model that is saved
    load_trained(once, trained_of(model), lora=LORA, freeze_layers=0)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in once.state_dict().items())


def test_many_syncs_add_nothing_up(start):
    """The last adapter decides, whatever was loaded before it."""
    once, often = load_causal_lm(start), load_causal_lm(start)
    adapter = trained_of(adapted(start))
    MergedLayers(once, LORA).load(adapter)
    layers = MergedLayers(often, LORA)
    for factor in (3.0, -1e4, 0.1, 1.0):
        layers.load({name: tensor * factor for name, tensor in adapter.items()})
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), often.parameters(), strict=True))
    layers.load({name: tensor * 0 for name, tensor in adapter.items()})
    assert all(torch.equal(a, b) for a, b in zip(often.parameters(), load_causal_lm(start).parameters(), strict=True))
    with pytest.raises(ValueError, match="missing.*lora_A"):
        layers.load(dict(list(adapter.items())[1:]))


def test_a_generator_in_bfloat16_merges_from_the_float32_weights(start):
    model, short, plain = adapted(start), load_causal_lm(start, torch.bfloat16), load_causal_lm(start)
    MergedLayers(short, LORA, load_causal_lm(start)).load(trained_of(model))
    MergedLayers(plain, LORA).load(trained_of(model))
    named = dict(plain.named_parameters())
    for name, tensor in short.named_parameters():
        assert torch.equal(tensor, named[name].bfloat16()), name


def test_the_adapter_alone_loads_in_peft(start, tmp_path):
    from peft import PeftModel

    model = adapted(start)
    save_adapter(load_causal_lm(start), trained_of(model), LORA, tmp_path / "adapter", str(start))
    theirs = PeftModel.from_pretrained(load_causal_lm(start), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-6, rtol=0)


def test_the_first_layers_and_the_embeddings_are_frozen(family, start):
    model = part_of(load_causal_lm(start), freeze_layers=2)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if family == "gpt2":
        assert {name.split(".")[1] for name in frozen} == {"wte", "wpe", "h"}
        first = {
            name for name, _ in model.named_parameters() if name.startswith(("transformer.h.0.", "transformer.h.1."))
        }
        assert frozen == first | {"transformer.wte.weight", "transformer.wpe.weight"}
    else:
        first = {
            name for name, _ in model.named_parameters() if name.startswith(("model.layers.0.", "model.layers.1."))
        }
        assert frozen == first | {"model.embed_tokens.weight"}
    assert frozen == frozen_names(load_causal_lm(start), 2) and frozen_names(model, 0) == set()
    with pytest.raises(UserError, match="freeze_layers = 3, but the model has 3 blocks.*set it to 2 or less"):
        part_of(load_causal_lm(start), freeze_layers=3)


def test_a_critics_head_and_a_reward_models_head_train_whatever_is_frozen(folder):
    for options in ({"lora": LORA}, {"freeze_layers": 1}):
        critic = build_critic(folder.stage("reward").model, "reward")
        part_of(critic.backbone, **options)
        assert critic.value_head.weight.requires_grad and critic.value_head.bias.requires_grad
        reward = load_reward_model(folder.stage("reward").model)
        part_of(reward.base_model, **options)
        assert reward.score.weight.requires_grad
        body = [parameter.requires_grad for parameter in reward.base_model.parameters()]
        assert any(body) and not all(body)


def test_layers_that_the_model_has_not_are_told_at_start_up(family, start):
    other = "q_proj" if family == "gpt2" else "c_attn"
    ppo = {"lora": {"target_modules": [other]}, "critic_freeze_layers": 3}
    recipe = recipe_for(family, model={"name_or_path": str(start)}, ppo=ppo, sft={"freeze_layers": 2})
    freeze, adapter = check_model(recipe)
    assert freeze.startswith("ppo.critic_freeze_layers = 3, but the model has 3 blocks") and freeze.endswith(
        "2 or less"
    )
    assert adapter.startswith(f"ppo.lora.target_modules names '{other}'") and adapter.endswith(
        ", ".join(sorted(LAYERS[family]))
    )
    assert check_model(recipe_for(family, ppo={"lora": ppo["lora"]})) == [adapter], "from scratch too"


def saved_bytes(module, inputs):
    """Bytes that autograd keeps for the backward pass, each storage once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(*inputs)
    return sum(size for place, size in kept.items() if place not in parameters), output


@pytest.mark.parametrize("options", [{}, {"lora": LORA}, {"freeze_layers": 1}], ids=["all", "lora", "frozen"])
def test_checkpointed_gradients_are_the_same(start, options):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(start) if "lora" in options else part_of(load_causal_lm(start), **options)
        part_of(model, gradient_checkpointing=checkpointing).train()
        module = LogprobModel(model, temperature=1.0, compute_dtype=torch.float32)
        assert model.get_input_embeddings()(IDS).requires_grad == (not options), "the backward pass ends at what trains"
        module(token_batch([IDS[0, :3].numpy()], [IDS[0, 3:].numpy()], packed=True)).sum().backward()
        gradients.append({name: each.grad for name, each in module.named_parameters() if each.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and all(each is not None for each in gradients[1].values())
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.thorough)], indirect=True)
def test_a_checkpointed_run_ends_in_the_same_weights(folder, family):
    """Policy and critic, adapters in both."""
    ends = [
        run_real(recipe_for(family, ppo=PARTS["lora"] | {"steps": 1, "gradient_checkpointing": on}), folder)[
            0
        ].weights()
        for on in (False, True)
    ]
    for name, tensor in ends[0].items():
        torch.testing.assert_close(
            ends[1][name], tensor, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_checkpointing_keeps_a_fraction_of_the_activations():
    """Twelve blocks: one input each, in place of some ten times as much."""
    config = GPT2Config(vocab_size=50, n_positions=256, n_embd=16, n_layer=12, n_head=2, resid_pdrop=0, embd_pdrop=0,
                        attn_pdrop=0, attn_implementation="sdpa")  # fmt: skip
    inputs = (torch.randint(50, (4, 256), generator=torch.Generator().manual_seed(0)),)
    sizes = []
    for checkpointing in (False, True):
        model = part_of(GPT2LMHeadModel(config).transformer, gradient_checkpointing=checkpointing).train()
        size, output = saved_bytes(model, inputs)
        output.last_hidden_state.sum().backward()
        sizes.append(size)
    one_input = 4 * 256 * 16 * 4
    assert sizes[0] > 12 * 10 * one_input
    assert sizes[1] < sizes[0] / 5

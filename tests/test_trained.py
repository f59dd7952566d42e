"""Adapters, frozen layers, gradient checkpointing: what trains, what stays, what moves, and what is saved.

Expected numbers: peft's own merge, the chain rule in float64, the start model, and the same update without checkpointing.
"""

import copy

import numpy as np
import pytest
import torch
from in_process import LocalRoles, TorchEngine
from test_loop import Diary, real_loop
from tiny import tiny_recipe, write_start
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import UserError
from rlhf_ray.models.check import check_model
from rlhf_ray.models.critic import build_critic
from rlhf_ray.models.load import load_causal_lm, load_reward_model, save_model
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.models.trained_part import (
    MergedLayers,
    adapter_off,
    frozen_names,
    load_trained,
    merged_state,
    plain_name,
    save_adapter,
    train_only_part,
)
from rlhf_ray.ppo.step import cut_chunks
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.reference import Reference
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.training.forward import LogprobModel, response_logprobs, token_batch

LORA = LoraConfig(rank=3, alpha=6.0)
LAYERS = {"gpt2": {"c_attn", "c_proj", "c_fc"}, "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
          "down_proj"}}  # fmt: skip
IDS = torch.tensor([[5, 9, 11, 40, 7, 3, 250, 19]])


def recipe_for(family, **sections):
    shape = {"architecture": family, "layers": 3}
    return tiny_recipe(**({"model": {"from_scratch": shape}} | sections))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return write_start(recipe_for(family), RunFolder(tmp_path_factory.mktemp(family)))


@pytest.fixture
def start(folder):
    return folder.stage("sft").model


def part_of(model, lora=None, freeze_layers=0, gradient_checkpointing=False, seed=0):
    return train_only_part(
        model, lora=lora, freeze_layers=freeze_layers, gradient_checkpointing=gradient_checkpointing, seed=seed
    )


def adapted(start, seed=0):
    """A start model with adapters that change something: B is random."""
    model = part_of(load_causal_lm(start), LORA, seed=seed)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trained_of(model):
    return {
        plain_name(f"model.{name}"): tensor.detach()
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    }


def clones(named):
    return {name: tensor.detach().clone() for name, tensor in named}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


# -- adapters ---------------------------------------------------------------------------------------------------------


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
    state = merged_state(model, model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


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


# -- one update against the chain rule --------------------------------------------------------------------------------


def test_a_lora_update_is_that_of_the_chain_rule_in_float64():
    """The gradient of the dense weight W + s B A, from a plain model in float64; dA = s B' dW, dB = s dW A'. Then AdamW."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=2, n_inner=4, resid_pdrop=0, embd_pdrop=0,
                        attn_pdrop=0, initializer_range=0.6, attn_implementation="eager")  # fmt: skip
    plain = GPT2LMHeadModel(config).eval()
    model = part_of(copy.deepcopy(plain), LoraConfig(rank=2, alpha=3.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    scaling, ids = 1.5, torch.tensor([[1, 2, 5, 3, 0]])
    factors = {name: tensor.double().clone() for name, tensor in trained_of(model).items()}
    layers = sorted({name.rpartition(".")[0] for name in factors})
    assert len(layers) == 4

    dense = copy.deepcopy(plain).double()
    for layer in layers:  # Conv1D: weight [in, out]
        a, b = factors[f"{layer}.lora_A"], factors[f"{layer}.lora_B"]
        dense.get_submodule(layer).weight.data += scaling * (b @ a).T
    inputs = (token_batch([ids[0, :2].numpy()], [ids[0, 2:].numpy()], packed=True),)
    LogprobModel(dense, temperature=0.7, compute_dtype=torch.float32)(*inputs).sum().backward()
    gradients = {}
    for layer in layers:
        by_out = dense.get_submodule(layer).weight.grad.T  # [out, in]
        gradients[f"{layer}.lora_A"] = scaling * factors[f"{layer}.lora_B"].T @ by_out
        gradients[f"{layer}.lora_B"] = scaling * by_out @ factors[f"{layer}.lora_A"].T
    norm = sum(float((gradient**2).sum()) for gradient in gradients.values()) ** 0.5
    assert norm > 2.0

    module = LogprobModel(model, temperature=0.7, compute_dtype=torch.float32)
    frozen = clones((name, each) for name, each in module.named_parameters() if not each.requires_grad)
    found_norm = TorchEngine(module).step([(inputs, None)], lambda output, _: output.sum(), learning_rate=0.01)
    assert found_norm == pytest.approx(norm, rel=1e-5)
    for name, tensor in trained_of(model).items():
        gradient = gradients[name] / norm  # clipped to 1
        # Adam's first step: both moments, bias-corrected, are the gradient and its square.
        wanted = factors[name] - 0.01 * gradient / (gradient.abs() + 1e-5)
        torch.testing.assert_close(
            tensor.double(), wanted, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    now = dict(module.named_parameters())
    assert frozen and all(torch.equal(now[name], tensor) for name, tensor in frozen.items())


# -- frozen layers ----------------------------------------------------------------------------------------------------


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


# -- PPO in one process -----------------------------------------------------------------------------------------------

PARTS = {
    "lora": {"lora": {"rank": 3, "alpha": 6.0}, "critic_lora": {"rank": 2}, "learning_rate": 1e-2},
    "frozen": {"freeze_layers": 1, "critic_freeze_layers": 2},
}


def run_real(recipe, folder, **kwargs):
    roles, diary = LocalRoles(recipe, folder, **kwargs), Diary()
    real_loop(recipe, roles, diary).run()
    return roles, diary


@pytest.fixture(scope="module", params=PARTS)
def part(request):
    return request.param


@pytest.fixture(scope="module")
def trained(family, folder, part):
    """(recipe, roles, diary) of three steps."""
    recipe = recipe_for(family, ppo=PARTS[part] | {"steps": 3, "eval_every": 3})
    return recipe, *run_real(recipe, folder)


def test_generator_policy_and_reference_agree(trained, part):
    _, _, diary = trained
    assert "reference" in trained[0].ppo_roles or part == "lora"
    for step, (_, metrics) in enumerate(diary.records[1:]):
        assert metrics["policy/mismatch_max"] < 1e-4 and metrics["rollout/policy_version_min"] == step
        assert metrics["first_policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    kl = [metrics["objective/kl"] for _, metrics in diary.records[1:]]
    assert abs(kl[0]) < 1e-6 and abs(kl[-1]) > 1e-4, "the policy starts at the reference and leaves it"


def test_what_is_frozen_stays_bit_for_bit_and_all_the_rest_moves(trained, folder):
    recipe, roles, _ = trained
    fresh = LocalRoles(recipe, folder)
    for engine, untouched in zip(roles.engines, fresh.engines, strict=True):
        before = dict(untouched.module.named_parameters())
        for name, parameter in engine.module.named_parameters():
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("part", ["lora"], indirect=True)
def test_the_policy_with_its_adapter_off_answers_as_a_reference_does(trained, start, part):
    recipe, roles, _ = trained
    (rollout,) = roles.generation.generate(cut_chunks(9, range(8), 1, 8))
    settings = {"temperature": 1.0, "compute_dtype": torch.float32, "microbatch_size": recipe.ppo.microbatch_size}
    reference = Reference(start, **settings)
    policy = roles.policy.roles[0].engine.module.model
    reference.model.set_attn_implementation(policy.config._attn_implementation)  # as the actors have it: equal
    expected = reference.logprobs(rollout).values
    (found,) = roles.reference.logprobs([rollout])
    np.testing.assert_array_equal(found.values, expected)
    (moved,) = roles.policy.logprobs([rollout])
    assert np.abs(moved.values - expected).max() > 1e-3


def test_only_what_trains_is_sent(trained, part, family):
    recipe, roles, _ = trained
    sent = {name: array.shape for shard in roles.policy.weights() for name, array in shard.items()}
    if part == "lora":
        # rank x (in + out) of each adapted matrix, by hand: width 32, Llama's feed-forward 96.
        sizes = {
            "gpt2": [(32, 96), (32, 32), (32, 128), (128, 32)],
            "llama": [(32, 32)] * 4 + [(32, 96)] * 2 + [(96, 32)],
        }
        assert sum(np.prod(shape) for shape in sent.values()) == 3 * 3 * sum(map(sum, sizes[family]))
    else:
        assert sent and not any(".0." in name or "wte" in name or "embed" in name for name in sent)


def test_the_saved_model_is_plain_and_says_what_the_policy_says(trained, start, tmp_path):
    recipe, roles, _ = trained
    model = load_causal_lm(start)
    weights = dict(roles.policy.roles[0].weights())
    load_trained(model, weights, lora=recipe.ppo.lora, freeze_layers=recipe.ppo.freeze_layers)
    saved = save_model(model, load_tokenizer(start), tmp_path / "model", "card")
    assert not list(saved.glob("adapter*"))
    plain = load_causal_lm(saved)
    assert set(plain.state_dict()) == set(load_causal_lm(start).state_dict())
    prompts, responses = [np.array([5, 9, 11])] * 2, [np.array([40, 7]), np.array([3, 250, 19])]
    policy = roles.policy.roles[0].engine.module.model.eval()
    for expected, found in zip(
        response_logprobs(policy, prompts, responses), response_logprobs(plain, prompts, responses), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_a_run_resumed_from_what_trains_ends_in_the_same_bits(trained, folder):
    """A checkpoint holds the trained weights, their moments and the controller's state; all else is made anew."""
    recipe, whole, _ = trained
    before, diary = LocalRoles(recipe, folder), Diary(stop_after=1)
    assert not real_loop(recipe, before, diary).run()
    after, rest = LocalRoles(recipe, folder), Diary()
    for old, new in zip(before.engines, after.engines, strict=True):
        new.module.load_state_dict(dict(old.weights()), strict=False)
        new.optimizer.load_state_dict(copy.deepcopy(old.optimizer.state_dict()))
    assert real_loop(recipe, after, rest, diary.saves[-1]).run()
    expected = whole.weights()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.weights().items())


def test_a_generator_refuses_half_an_update(start, part, trained):
    recipe, roles, _ = trained
    generator = Generator(
        start, ["a"], ["a"], sampling=recipe.generation.sampling, seed=0, dtype=torch.float32, lora=recipe.ppo.lora,
        freeze_layers=recipe.ppo.freeze_layers,
    )  # fmt: skip
    named = dict(roles.policy.roles[0].weights())
    named.popitem()
    with pytest.raises(ValueError, match="missing"):
        generator.load_weights({name: tensor.detach().numpy() for name, tensor in named.items()}, 1)


# -- before anything starts -------------------------------------------------------------------------------------------


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


# -- gradient checkpointing -------------------------------------------------------------------------------------------


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

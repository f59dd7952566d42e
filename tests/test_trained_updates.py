"""Updates of a part of the weights: one against the chain rule in float64, and PPO in one process."""

import copy

import numpy as np
import pytest
import torch
from crossed import crossed
from in_process import LocalRoles, TorchEngine
from loops import Diary, real_loop
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
from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.models.trained_part import load_trained
from rlhf_ray.ppo.step import cut_chunks
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.reference_policy import Reference
from rlhf_ray.training.forward import LogprobModel, response_logprobs, token_batch


def clones(named):
    return {name: tensor.detach().clone() for name, tensor in named}


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


@pytest.fixture(scope="module")
def part(request):
    return request.param


each_part = crossed("family, part", ["gpt2", "llama"], list(PARTS), indirect=True)


@pytest.fixture(scope="module")
def trained(family, folder, part):
    """(recipe, roles, diary) of three steps."""
    recipe = recipe_for(family, ppo=PARTS[part] | {"steps": 3, "eval_every": 3})
    return recipe, *run_real(recipe, folder)


@each_part
def test_generator_policy_and_reference_agree(trained, part):
    _, _, diary = trained
    assert "reference" in trained[0].ppo_roles or part == "lora"
    for step, (_, metrics) in enumerate(diary.records[1:]):
        assert metrics["policy/mismatch_max"] < 1e-4 and metrics["rollout/policy_version_min"] == step
        assert metrics["first_policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    kl = [metrics["objective/kl"] for _, metrics in diary.records[1:]]
    assert abs(kl[0]) < 1e-6 and abs(kl[-1]) > 1e-4, "the policy starts at the reference and leaves it"


@each_part
def test_what_is_frozen_stays_bit_for_bit_and_all_the_rest_moves(trained, folder):
    recipe, roles, _ = trained
    fresh = LocalRoles(recipe, folder)
    for engine, untouched in zip(roles.engines, fresh.engines, strict=True):
        before = dict(untouched.module.named_parameters())
        for name, parameter in engine.module.named_parameters():
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("family, part", [
    ("gpt2", "lora"), pytest.param("llama", "lora", marks=pytest.mark.thorough),
], indirect=True)  # fmt: skip
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


@each_part
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


@each_part
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


@each_part
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


@each_part
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

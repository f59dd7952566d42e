"""`ppo.float32_head`: logits in float32 where the rest is in bfloat16, against products in float64."""

import pytest
import torch
from tiny import tiny_recipe
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_ray.config import LoraConfig
from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.errors import UserError
from rlhf_ray.generation.engine import GenerationEngine
from rlhf_ray.models.float_head import logits_in_float32
from rlhf_ray.models.frozen import hold_frozen
from rlhf_ray.models.load import body_of
from rlhf_ray.models.memory import memory_plan
from rlhf_ray.models.size import shape_of_model
from rlhf_ray.models.trained_part import train_only_part
from rlhf_ray.training.forward import LogprobModel, token_batch

BF16 = torch.bfloat16
SIZES = {"vocab_size": 331, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
ROWS = torch.randint(3, 331, (4, 9), generator=torch.Generator().manual_seed(3))
PROMPTS, RESPONSES = [row[:4].numpy() for row in ROWS], [row[4:].numpy() for row in ROWS]


class NoEnd:
    """A tokenizer, as far as engines ask."""

    eos_token_id = 0

    def __len__(self):
        return 331


def model_of(family):
    """With logits of up to 30 or so, as large models have: bfloat16 rounds them to eighths."""
    torch.manual_seed(0)
    if family == "gpt2":  # its output layer is tied to the embeddings
        model = GPT2LMHeadModel(GPT2Config(**SIZES, initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3, intermediate_size=40))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model.eval()


def in_float64(states, weight, ids):
    """Log-probs of ids under the products of the states, as they are, in float64."""
    return (states.double() @ weight.double().T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def far(found, wanted):
    return float((torch.as_tensor(found).double() - wanted).abs().max())


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_policys_and_references_log_probs(family, with_entropy):
    """The states are those that autocast gives; the policy's weights are float32, and so are those of a frozen output layer."""
    gaps = {}
    for kind in ("plain", "float32", "frozen"):
        model = model_of(family)
        if kind != "plain":
            logits_in_float32(model, BF16)
        module = LogprobModel(model, temperature=1.0, compute_dtype=BF16, entropy_gradient=True)
        if kind == "frozen":
            module.requires_grad_(False)
            hold_frozen(module, BF16)
            assert model.get_output_embeddings().weight.dtype == torch.float32
        batch = token_batch(PROMPTS, RESPONSES, packed=True)
        with torch.autocast("cpu", BF16):
            states = body_of(model)(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[batch.states].float()
        output = module(batch, with_entropy=with_entropy)
        logprobs = (output[0] if with_entropy else output)[batch.action_mask]
        gaps[kind] = far(logprobs.detach(), in_float64(states, model.get_output_embeddings().weight, batch.targets).detach())
    assert gaps["plain"] > 0.02 and gaps["float32"] < 2e-5 and gaps["frozen"] < 2e-5, gaps


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_generators_log_probs(family):
    """In bfloat16 throughout, except for the products that give logits: those of the states that reach the output layer, in
    float64. Tokens are drawn from some of them (a step may run more than once)."""
    gaps = {}
    for kind in ("plain", "float32"):
        model = model_of(family).to(BF16)
        engine = GenerationEngine(logits_in_float32(model, BF16) if kind == "float32" else model, NoEnd(), eos_token_ids=(0,))
        seen: list[torch.Tensor] = []  # states [4, D] of each pass

        def look(_, inputs, into=seen):
            into.append(inputs[0].reshape(4, -1).clone())

        hook = model.get_output_embeddings().register_forward_pre_hook(look)
        drawn = engine.generate(PROMPTS, range(4), SamplingParams(max_new_tokens=3, min_new_tokens=3))
        hook.remove()
        weight = model.get_output_embeddings().weight.detach().double()
        wanted = torch.stack([(states.double() @ weight.T).log_softmax(-1) for states in seen])  # [passes, 4, V]
        gaps[kind] = max(
            float((wanted[:, row, token] - logprob).abs().min())
            for row, one in enumerate(drawn)
            for token, logprob in zip(one.response_ids.tolist(), one.logprobs.tolist(), strict=True)
        )
    assert gaps["plain"] > 0.005 and gaps["float32"] < 2e-5, gaps


def test_gradients_are_those_of_float64():
    """Of a frozen body: the output layer's own, and what the body would get."""
    model = logits_in_float32(model_of("llama"), BF16)
    module = LogprobModel(model, temperature=1.0, compute_dtype=BF16)
    batch = token_batch(PROMPTS, RESPONSES, packed=True)
    with torch.autocast("cpu", BF16):
        states = body_of(model)(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[batch.states]
    head = model.get_output_embeddings().weight
    weight = head.detach().double().requires_grad_()
    in_float64(states.detach().float(), weight, batch.targets).sum().backward()
    module(batch)[batch.action_mask].sum().backward()
    assert torch.allclose(head.grad.double(), weight.grad, rtol=1e-4, atol=1e-4)


def test_adapters_leave_the_head_as_it_is():
    model = logits_in_float32(model_of("llama"), BF16)
    train_only_part(model, lora=LoraConfig(rank=2), freeze_layers=0, gradient_checkpointing=False, seed=0)
    module = LogprobModel(model, temperature=1.0, compute_dtype=BF16)
    hold_frozen(module, BF16)
    assert model.get_output_embeddings().weight.dtype == torch.float32
    assert {each.dtype for name, each in model.named_parameters() if "q_proj.base" in name} == {BF16}


def test_an_output_layer_of_a_class_of_its_own_is_refused():
    model = model_of("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match="output layer of a LlamaForCausalLM is a Sequential"):
        logits_in_float32(model, BF16)


def test_in_float32_the_output_layer_stays_as_it_is():
    """A decode step on a CPU packs plain linear layers alone, and is recorded only where all of them are."""
    model = model_of("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)  # and so nothing is refused
    assert logits_in_float32(model, torch.float32) is model and type(model.lm_head) is torch.nn.Sequential


def test_the_plan_counts_four_bytes_per_logit():
    """Twice the logits; of an output layer no copy in 16 bits, but one in float32 where the model is held in 16."""
    scratch = {"architecture": "llama", "layers": 1, "width": 64, "heads": 4, "positions": 64, "vocab_size": 1000}
    plans = []
    for on in (False, True):
        recipe = tiny_recipe(model={"from_scratch": scratch}, ppo={"float32_head": on}, generation={"precision": "bfloat16"})
        plans.append({row.role: row.process.parts for row in memory_plan(recipe, itemsize=2)})
    head, shape = 64 * 1000, shape_of_model(recipe)
    assert shape.head == head
    assert plans[1]["policy"]["logits"] == 2 * plans[0]["policy"]["logits"]
    assert plans[1]["reference"]["logits"] == 2 * plans[0]["reference"]["logits"]
    for role in ("policy", "reference"):
        assert plans[0][role]["16-bit copies"] - plans[1][role]["16-bit copies"] == 2 * head
    assert plans[1]["generation"]["logits"] - plans[0]["generation"]["logits"] == 4 * head


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_the_plan_of_adapters_holds_a_frozen_head_in_four_bytes_instead_of_two(tmp_path, zero_stage):
    """An output layer of its own, that no copy was ever made of. Beside its weights nothing grows but the logits, and what ZeRO-3
    gathers, by the same share as in the plan without."""
    model_of("llama").config.save_pretrained(tmp_path)
    plans = []
    for on in (False, True):
        recipe = tiny_recipe(
            model={"name_or_path": str(tmp_path)}, ppo={"float32_head": on, "lora": {"rank": 2}},
            resources={"policy": {"actors": 2, "zero_stage": zero_stage}},
        )  # fmt: skip
        plans.append({row.role: row.process.parts for row in memory_plan(recipe, itemsize=2)}["policy"])
    head, ranks = 331 * 24, 2 if zero_stage == 3 else 1
    assert shape_of_model(recipe).output == head
    off, on = plans
    assert on["weights"] - off["weights"] == 2 * head / ranks
    assert on["16-bit copies"] == off["16-bit copies"] >= 0
    # Llama's block: 4 x 24 x 24 + 3 x 24 x 40 weights in 16 bits, as is its head without the option; embeddings in 32
    linear, embeddings = 2 * (4 * 24 * 24 + 3 * 24 * 40), 331 * 24
    grows = (2 * linear + 8 * embeddings) / (2 * linear + 6 * embeddings)
    assert zero_stage == 0 or on["gathered"] / off["gathered"] == pytest.approx(grows, rel=0.03)  # norms, adapters

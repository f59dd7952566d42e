"""Adapters, frozen layers and gradient checkpointing under DeepSpeed: every ZeRO stage, one rank and two, against plain torch."""

import pytest
import torch
from checkpoints import write_rank
from ranks import clones, gap, on_ranks
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_ray.config import LoraConfig
from rlhf_ray.models.trained_part import adapter_off, train_only_part
from rlhf_ray.ppo.checkpoint import read_role
from rlhf_ray.training.deepspeed_engine import DeepSpeedEngine, OptimiserConfig
from rlhf_ray.training.forward import LogprobModel, token_batch

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
RATES = [0.01, 0.02, 0.005, 0.01]
LORA = LoraConfig(rank=3, alpha=6.0)
PARTS = {
    "lora": {"lora": LORA, "freeze_layers": 0, "gradient_checkpointing": False},
    "lora checkpointed": {"lora": LORA, "freeze_layers": 0, "gradient_checkpointing": True},
    "frozen": {"lora": None, "freeze_layers": 1, "gradient_checkpointing": False},
    "frozen checkpointed": {"lora": None, "freeze_layers": 1, "gradient_checkpointing": True},
}
ROWS = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(3))
PROMPTS, RESPONSES = torch.tensor([3, 4, 2, 3]), torch.tensor([6, 5, 7, 4])


class Sharding(DeepSpeedEngine):
    """ZeRO-3 keeps weights of less than 100,000 numbers whole on every rank; here it must take apart those of a tiny model."""

    def _config(self):
        config = super()._config()
        if self.settings.zero_stage == 3:
            config["zero_optimization"] |= {
                "stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0,
                "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0,
            }  # fmt: skip
        return config


def make_module(part):
    """Odd sizes: little divides by the ranks. Llama for the adapters, GPT-2 for the frozen layers."""
    torch.manual_seed(0)
    if PARTS[part]["lora"] is None:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=12, n_embd=6, n_layer=3, n_head=2, resid_pdrop=0,
                                           embd_pdrop=0, attn_pdrop=0, initializer_range=0.4))  # fmt: skip
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=31, hidden_size=12, intermediate_size=17, num_hidden_layers=2,
                                             num_attention_heads=2, max_position_embeddings=12, initializer_range=0.4))  # fmt: skip
    train_only_part(model, seed=5, **PARTS[part])
    return LogprobModel(model, temperature=1.0, compute_dtype=torch.float32)


def batch_of(rows):
    prompts = [ROWS[row, : PROMPTS[row]].numpy() for row in rows]
    responses = [ROWS[row, PROMPTS[row] : PROMPTS[row] + RESPONSES[row]].numpy() for row in rows]
    return token_batch(prompts, responses, packed=True)


def batches(rank, world):
    """This rank's rows, one a microbatch."""
    return [((batch_of([row]),), None) for row in torch.arange(len(ROWS)).chunk(world)[rank].tolist()]


def loss_of(output, _):
    return (output.exp() * torch.arange(output.shape[1])).sum() / len(ROWS)


def plain_torch(part):
    """(trained weights after the steps, log-probs of the start model) in one process."""
    module = make_module(part)
    module.model.gradient_checkpointing_disable()
    with torch.no_grad():
        start = module(batch_of(range(4)))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0, eps=1e-5, weight_decay=0)
    for rate in RATES:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        for inputs, rest in batches(0, 1):
            loss_of(module(*inputs), rest).backward()
        nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
    return clones((name, each) for name, each in module.named_parameters() if each.requires_grad), start


def whole(engine):
    """Every weight, frozen ones too."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.config.zero_stage == 3):
            found[name] = parameter.detach().clone()
    return found


def work(rank, world, folder):
    results = {}
    for part in PARTS:
        for stage in STAGES:

            def make(part=part, stage=stage):
                settings = OptimiserConfig(adam_eps=1e-5, max_grad_norm=0.1, zero_stage=stage)
                return Sharding(make_module(part), settings, device=torch.device("cpu"))

            def train(engine, rates):
                for rate in rates:
                    engine.step(batches(rank, world), loss_of, learning_rate=rate)

            result, engine = {}, make()
            before = whole(engine)
            train(engine, RATES[:2])
            result["taken_apart"] = all(parameter.numel() == 0 for parameter in engine.module.parameters())
            checkpoint = folder / f"{world}-{stage}-{part}"
            checkpoint.mkdir(exist_ok=True)
            write_rank(checkpoint, "policy", rank, world, engine.state(), engine.steps_taken)
            if PARTS[part]["lora"] is not None:
                with adapter_off(engine.module):
                    result["reference"] = engine.forward(batch_of(range(4))).clone()
            train(engine, RATES[2:])
            result["weights"] = clones(engine.weights())
            after = whole(engine)
            result["unmoved"] = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
            result["frozen"] = after.keys() - result["weights"].keys()

            torch.distributed.barrier()
            state, steps_taken = read_role(checkpoint, "policy")
            result["state"] = sorted(state)
            again = make()
            again.load_state(state, steps_taken)
            train(again, RATES[2:])
            result["resumed"] = clones(again.weights())
            results[part, stage] = result
    return results


@pytest.fixture(scope="module", params=[1, 2])
def results(request, tmp_path_factory):
    """A list of {(part, stage): result}, one of each rank."""
    return on_ranks(work, request.param, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def expected():
    return {part: plain_torch(part) for part in PARTS}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("part", PARTS)
def test_what_trains_takes_the_steps_of_plain_torch_and_nothing_else_moves(results, expected, part, stage):
    weights, start = expected[part]
    for rank in results:
        result = rank[part, stage]
        assert gap(result["weights"], weights) < 1e-6
        assert gap(result["resumed"], result["weights"]) == 0.0
        assert result["taken_apart"] == (stage == 3)
        assert result["unmoved"] == result["frozen"] and result["frozen"]
        assert len(result["state"]) == 3 * len(weights)
        if "reference" in result:
            torch.testing.assert_close(result["reference"], start, atol=1e-6, rtol=0)
    assert gap(results[0][part, stage]["weights"], results[-1][part, stage]["weights"]) == 0.0
    fresh = dict(make_module(part).named_parameters())
    assert all((fresh[name] - tensor).abs().max() > 1e-3 for name, tensor in weights.items())

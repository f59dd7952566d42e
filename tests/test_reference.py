"""The reference computes as the policy does: at the start of a run the KL between them is 0, bit for bit."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_ray.messages import Chunk, RolloutBatch, Sequences
from rlhf_ray.models.load import disable_dropout, fast_attention, load_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import word_tokenizer
from rlhf_ray.models.trained_part import train_only_part
from rlhf_ray.roles.reference_policy import Reference
from rlhf_ray.training.embedding_gradient import add_to_looked_up_rows
from rlhf_ray.training.forward import LogprobModel, token_batch
from rlhf_ray.training.precision import has_bfloat16

SIZES = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
         "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
MODELS = {"gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES)),
          "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=96))}  # fmt: skip
DTYPES = [torch.float32, *([torch.bfloat16] if has_bfloat16("cpu") else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("freeze_layers", [0, 1])
@pytest.mark.parametrize("family", MODELS)
def test_at_the_start_they_say_the_same_to_the_bit(family, freeze_layers, dtype, tmp_path):
    torch.manual_seed(0)
    save_model(MODELS[family]().eval(), word_tokenizer(260), tmp_path, "")
    draws = np.random.default_rng(0)
    prompts, responses = ([draws.integers(2, 258, n).astype(np.int32) for n in lengths] for lengths in ((3, 9), (12, 5)))
    rollout = RolloutBatch(
        chunk=Chunk(step=0, index=0, prompt_indices=(0, 1), sample_indices=(0, 0)), policy_version=0,
        sequences=Sequences.of(prompts, responses), rollout_logprobs=np.zeros(17, np.float32), ended=np.zeros(2, bool),
    )  # fmt: skip
    reference = Reference(tmp_path, temperature=0.8, compute_dtype=dtype).logprobs(rollout).values
    model = fast_attention(load_causal_lm(tmp_path), "cpu")
    disable_dropout(model)
    train_only_part(model, lora=None, freeze_layers=freeze_layers, gradient_checkpointing=False, seed=0)
    policy = LogprobModel(model, temperature=0.8, compute_dtype=dtype).train()
    add_to_looked_up_rows(policy)
    batch = token_batch(prompts, responses, packed=policy.packed)
    trained = policy(batch)[batch.action_mask]
    assert trained.requires_grad and trained.tolist() == reference.tolist()

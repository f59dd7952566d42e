"""The yardstick of `rlhf-ray bench ppo --against-trl`: the same work with TRL's PPOTrainer. Prints one JSON object.

It runs in an environment of its own (`bench/trl.py` makes it) and imports nothing of rlhf_ray. By hand:
    python3 -m venv trl && trl/bin/pip install 'torch==2.13.*' 'trl==1.11.*' 'transformers<5.20' datasets accelerate rich peft
    trl/bin/python -P rlhf_ray/bench/yardsticks/trl_ppo.py [--bf16]
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

sys.path.append(str(Path(__file__).parent))  # -P leaves it out
from pss import tree_pss  # noqa: E402


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(vocabulary - 2)} | {"<eos>": vocabulary - 2, "<pad>": vocabulary - 1}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--gpu", action="store_true", help="on a GPU")
    parser.add_argument(
        "--models", type=Path, help="a run folder to read policy and reward model from; else they are random"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--llama", action="store_true", help="Llama's blocks, with an inner width of 8/3 of the width")
    for name, default in (
        ("layers", 4), ("width", 256), ("heads", 4), ("vocabulary", 4096), ("batch", 64), ("prompt", 32),
        ("response", 48), ("epochs", 4), ("iterations", 5), ("microbatch", 16), ("threads", 0), ("kv-heads", 4), ("lora", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def config_of(given: argparse.Namespace) -> GPT2Config | LlamaConfig:
    shared = {
        "vocab_size": given.vocabulary, "bos_token_id": given.vocabulary - 2, "eos_token_id": given.vocabulary - 2,
        "pad_token_id": given.vocabulary - 1, "num_labels": 1,
    }  # fmt: skip
    positions = max(512, given.prompt + given.response)
    if given.llama:
        return LlamaConfig(
            num_hidden_layers=given.layers, hidden_size=given.width, num_attention_heads=given.heads,
            intermediate_size=math.ceil(given.width * 8 / 3 / 32) * 32, max_position_embeddings=positions,
            num_key_value_heads=given.kv_heads, tie_word_embeddings=True, **shared,
        )  # fmt: skip
    return GPT2Config(
        n_layer=given.layers, n_head=given.heads, n_embd=given.width, n_positions=positions, attn_pdrop=0.0,
        resid_pdrop=0.0, embd_pdrop=0.0, **shared,
    )  # fmt: skip


def build_models(given: argparse.Namespace) -> list:
    """Policy, reference, reward model and critic."""
    if given.models:
        read = {"torch_dtype": torch.float32}
        policies = [AutoModelForCausalLM.from_pretrained(given.models / "sft" / "model", **read) for _ in range(2)]
        scoring = [
            AutoModelForSequenceClassification.from_pretrained(given.models / "reward" / "model", num_labels=1, **read)
            for _ in range(2)
        ]
        return [*policies, *scoring]
    shape = config_of(given)
    policies = [AutoModelForCausalLM.from_config(shape) for _ in range(2)]
    policies[1].load_state_dict(policies[0].state_dict())
    return [*policies, *(AutoModelForSequenceClassification.from_config(shape) for _ in range(2))]


def adapters(given: argparse.Namespace, task: str) -> LoraConfig:
    """At all matrices of the blocks, as ours."""
    return LoraConfig(
        r=given.lora, lora_alpha=2 * given.lora, lora_dropout=0.0, target_modules="all-linear", task_type=task,
        fan_in_fan_out=not given.llama, exclude_modules=["score"],
    )  # fmt: skip


def main() -> None:
    given = read_arguments()
    batch, microbatch, vocabulary = given.batch, math.gcd(given.microbatch, given.batch), given.vocabulary
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    policy, reference, *scoring = build_models(given)
    if given.lora:
        # The policy without its adapter is the reference; TRL reads the critic's body by its name, so peft's wrapper stays off.
        reference = None
        for name, parameter in scoring[1].named_parameters():
            parameter.requires_grad_("score" in name)
        inject_adapter_in_model(adapters(given, "SEQ_CLS"), scoring[1])
    tokenizer = (
        AutoTokenizer.from_pretrained(given.models / "sft" / "model") if given.models else word_tokenizer(vocabulary)
    )
    tokenizer.padding_side = "left"
    ids = torch.randint(
        0, vocabulary - 2, (batch * (given.iterations + 1), given.prompt),
        generator=torch.Generator().manual_seed(given.seed),
    )  # fmt: skip
    prompts = Dataset.from_dict({"input_ids": ids.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            output_dir=folder, report_to="none", save_strategy="no", use_cpu=not given.gpu, bf16=given.bf16, logging_steps=1,
            per_device_train_batch_size=microbatch, gradient_accumulation_steps=batch // microbatch,
            num_mini_batches=1, num_ppo_epochs=given.epochs, total_episodes=batch * (given.iterations + 1),
            response_length=given.response,
            stop_token=None, local_rollout_forward_batch_size=batch, num_sample_generations=0,
            learning_rate=given.learning_rate, temperature=1.0, seed=given.seed,
        )  # fmt: skip
        trainer = PPOTrainer(
            args=settings, processing_class=tokenizer, model=policy, ref_model=reference,
            reward_model=scoring[0], value_model=scoring[1], peft_config=adapters(given, "CAUSAL_LM") if given.lora else None,
            train_dataset=prompts, eval_dataset=prompts.select(range(min(8, batch))),
        )  # fmt: skip
        ends: list[float] = []
        curve: dict[str, list[float]] = {"score": [], "kl": []}
        log = trainer.log

        def timed_log(metrics, *args, **kwargs):
            ends.append(time.perf_counter())
            if "objective/scores" in metrics:
                curve["score"].append(metrics["objective/scores"])
                curve["kl"].append(metrics["objective/kl"])
            return log(metrics, *args, **kwargs)

        trainer.log = timed_log  # TRL logs once per iteration
        trainer.train()
        pss = tree_pss(os.getpid())
    seconds = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    print(json.dumps({"samples_per_s": batch / statistics.median(seconds), "iteration_s": seconds,
                      "precision": "bf16 autocast" if given.bf16 else "float32", "threads": torch.get_num_threads(),
                      "pss_gb": pss and pss / 1e9, "curve": curve}))  # fmt: skip


if __name__ == "__main__":
    main()

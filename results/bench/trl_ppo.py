"""The yardstick of `rlhf-ray bench ppo`: the same work with TRL's PPOTrainer, which 1.11 was the last release to have.

In an environment of its own:
    python3 -m venv trl && trl/bin/pip install 'torch==2.13.*' 'trl==1.11.*' 'transformers<5.20' datasets accelerate rich
    trl/bin/python results/bench/trl_ppo.py [--bf16]

GPT-2 of 4.3 M parameters, 64 prompts of 32 random tokens, 48 new tokens, 4 epochs, one minibatch; prints one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer

BATCH, PROMPT, RESPONSE, VOCABULARY = 64, 32, 48, 4096


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"<eos>": VOCABULARY - 2, "<pad>": VOCABULARY - 1}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--microbatch", type=int, default=16)
    given = parser.parse_args()
    shape = GPT2Config(
        n_layer=4, n_head=4, n_embd=256, vocab_size=VOCABULARY, n_positions=512, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 2, pad_token_id=VOCABULARY - 1, num_labels=1,
    )  # fmt: skip
    policy, reference = GPT2LMHeadModel(shape), GPT2LMHeadModel(shape)
    reference.load_state_dict(policy.state_dict())
    ids = torch.randint(
        0, VOCABULARY - 2, (BATCH * (given.iterations + 1), PROMPT), generator=torch.Generator().manual_seed(0)
    )
    prompts = Dataset.from_dict({"input_ids": ids.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            output_dir=folder, report_to="none", save_strategy="no", use_cpu=True, bf16=given.bf16, logging_steps=1,
            per_device_train_batch_size=given.microbatch, gradient_accumulation_steps=BATCH // given.microbatch,
            num_mini_batches=1, num_ppo_epochs=4, total_episodes=BATCH * (given.iterations + 1), response_length=RESPONSE,
            stop_token=None, local_rollout_forward_batch_size=BATCH, num_sample_generations=0, learning_rate=1e-5,
            temperature=1.0,
        )  # fmt: skip
        trainer = PPOTrainer(
            args=settings, processing_class=word_tokenizer(), model=policy, ref_model=reference,
            reward_model=GPT2ForSequenceClassification(shape), value_model=GPT2ForSequenceClassification(shape),
            train_dataset=prompts, eval_dataset=prompts.select(range(8)),
        )  # fmt: skip
        ends: list[float] = []
        log = trainer.log

        def timed_log(*args, **kwargs):
            ends.append(time.perf_counter())
            return log(*args, **kwargs)

        trainer.log = timed_log  # TRL logs once an iteration
        trainer.train()
    seconds = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    print(json.dumps({"samples_per_s": BATCH / statistics.median(seconds), "iteration_s": seconds,
                      "precision": "bf16 autocast" if given.bf16 else "float32", "threads": torch.get_num_threads()}))  # fmt: skip


if __name__ == "__main__":
    main()

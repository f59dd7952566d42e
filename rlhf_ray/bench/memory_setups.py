"""The set-ups of `bench.memory_peaks`: one process type each, of models of 20 to 70 million parameters from random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.config import Recipe

GPT2 = {"architecture": "gpt2", "layers": 12, "width": 512, "heads": 8, "vocab_size": 16000, "positions": 512}
LLAMA = {"architecture": "llama", "layers": 8, "width": 768, "heads": 12, "key_value_heads": 4, "vocab_size": 24000,
         "positions": 512}  # fmt: skip
WIDE = {"architecture": "llama", "layers": 4, "width": 512, "heads": 8, "key_value_heads": 2, "vocab_size": 32000,
        "positions": 512}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SetUp:
    """What one process type of a run does, and how many of it there are."""

    process: str  # a role of PPO, or a supervised stage
    model: dict[str, Any]
    precision: str = "float32"
    ranks: int = 1
    rows: int = 4  # per rank and step, in microbatches of 2
    zero_stage: int = 0
    offload: bool = False  # the optimiser's, at ZeRO 1 to 3
    ppo: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    prompt: int = 128  # tokens of the longest

    @property
    def trains_alone(self) -> bool:
        """Whether it is a supervised stage. (The reward model's, not the role that scores with it.)"""
        return self.process in ("sft", "reward")

    def recipe(self) -> Recipe:
        group = {"actors": self.ranks, "zero_stage": self.zero_stage} | ({"offload_optimizer": True} if self.offload else {})
        trains = {role: group for role in ("policy", "critic") if self.process == role}
        rows = self.rows * self.ranks
        ppo = {"rollout_batch_size": rows, "minibatch_size": rows, "microbatch_size": 2, "ppo_epochs": 1}
        ppo |= {"precision": self.precision} | self.ppo
        stages = {name: {"max_length": 256, "batch_size": 8, "microbatch_size": 4, "max_steps": 3, "precision": self.precision}
                  for name in ("sft", "reward")}  # fmt: skip
        if self.process in stages:
            stages[self.process] |= {"workers": self.ranks, "zero_stage": self.zero_stage} | self.stage
        return Recipe.model_validate({
            "name": "memory",
            "model": {"from_scratch": self.model},
            "data": {"max_prompt_tokens": self.prompt},
            "generation": {"max_new_tokens": 128, "min_new_tokens": 128, "chunk_size": 16, "precision": self.precision}
            | self.generation,
            **stages,
            "ppo": ppo,
            "resources": {role: {"threads": 1} for role in ("generation", "reward", "reference", "policy", "critic")}
            | {role: {"threads": 1} | given for role, given in trains.items()},
            "tracking": {"tensorboard": False},
        })  # fmt: skip


SETUPS: dict[str, SetUp] = {
    "policy": SetUp(process="policy", model=GPT2, rows=8),
    "policy bf16": SetUp(process="policy", model=LLAMA, precision="bfloat16"),
    "policy checkpointed": SetUp(process="policy", model=LLAMA, ppo={"gradient_checkpointing": True}),
    "policy lora": SetUp(process="policy", model=LLAMA, ppo={"lora": {"rank": 16}}),
    "policy lora bf16": SetUp(process="policy", model=LLAMA, precision="bfloat16", ppo={"lora": {"rank": 16}}),
    "policy entropy": SetUp(process="policy", model=WIDE, rows=8, ppo={"entropy_coef": 0.01, "microbatch_size": 8}),
    "policy ZeRO 0 x 2": SetUp(process="policy", model=GPT2, ranks=2),
    "policy ZeRO 1 x 2": SetUp(process="policy", model=GPT2, ranks=2, zero_stage=1),
    "policy ZeRO 2 x 2": SetUp(process="policy", model=GPT2, ranks=2, zero_stage=2),
    "policy ZeRO 3 x 2": SetUp(process="policy", model=GPT2, ranks=2, zero_stage=3),
    "critic": SetUp(process="critic", model=LLAMA),
    "generation": SetUp(process="generation", model=WIDE, generation={"chunk_size": 64}),
    "generation bf16": SetUp(process="generation", model=LLAMA, precision="bfloat16", generation={"chunk_size": 64}),
    "generation long prompts": SetUp(process="generation", model=WIDE, generation={"chunk_size": 64}, prompt=384),
    "reference": SetUp(process="reference", model=LLAMA),
    "reference bf16": SetUp(process="reference", model=LLAMA, precision="bfloat16"),
    "sft": SetUp(process="sft", model=GPT2),
    "sft bf16": SetUp(process="sft", model=LLAMA, precision="bfloat16"),
    "sft ZeRO 2 x 2": SetUp(process="sft", model=GPT2, ranks=2, zero_stage=2, stage={"microbatch_size": 2}),
    "reward": SetUp(process="reward", model=GPT2, stage={"objective": "scores"}),
    "reward lora bf16": SetUp(
        process="reward", model=LLAMA, precision="bfloat16", stage={"objective": "scores", "lora": {"rank": 16}}
    ),
}

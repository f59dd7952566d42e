"""Draws responses to chunks of prompts with the current policy."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rlhf_ray.algorithms.schedule import draw_seed
from rlhf_ray.config import LoraConfig
from rlhf_ray.config.sampling_params import Completion, SamplingParams
from rlhf_ray.data.tokens import encode_prompts
from rlhf_ray.errors import NotFinite
from rlhf_ray.generation.engine_protocol import EngineSetting
from rlhf_ray.generation.vllm_weights import copy_device
from rlhf_ray.messages import Chunk, RolloutBatch, Sequences, Support, flatten
from rlhf_ray.models.float_head import logits_in_float32
from rlhf_ray.models.load import load_causal_lm, to_device
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.models.trained_part import MergedLayers, frozen_names
from rlhf_ray.models.wire import Weight
from rlhf_ray.tables.engines import ENGINES


def supports_of(completions: Sequence[Completion]) -> list[Support] | None:
    """The token ids left after top_k, top_p and min_p for each token, among which it was drawn; None where that is all."""
    told = [(one.support, one.log_mass) for one in completions if one.support is not None and one.log_mass is not None]
    return [Support.of(*each) for each in told] if len(told) == len(completions) else None


EVALUATION_STEP = "evaluation"  # held-out prompts have the same seeds at every step, so curves compare


class Generator:
    """A generation engine with the run's prompts. Its results depend on (weights, chunk, seed) alone."""

    def __init__(
        self,
        folder: str | Path,
        prompts: list[str],
        eval_prompts: list[str],
        *,
        sampling: SamplingParams,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        lora: LoraConfig | None = None,
        freeze_layers: int = 0,
        engine: str = "torch",
        rows: int = 32,
        tensor_parallel: int = 1,
        shares_gpu: bool = False,
        float32_head: bool = False,
    ):
        """lora, freeze_layers: which part of the policy trains, and so comes with `load_weights`. engine: a name in
        `tables.engines`. rows: that decode at a time. tensor_parallel: GPUs that hold the engine's model. shares_gpu: other
        processes have memory on it, too. float32_head: logits are float32, whatever dtype is."""
        self.tokenizer = load_tokenizer(folder, trust_remote_code)
        model = load_causal_lm(folder, dtype, trust_remote_code)
        if float32_head:
            logits_in_float32(model, dtype)
        self.kept, self.adapted = frozen_names(model, freeze_layers), None
        if lora is not None:
            start = None if dtype == torch.float32 else load_causal_lm(folder, None, trust_remote_code)
            there = copy_device(device, tensor_parallel, shares_gpu=shares_gpu)
            held = there if ENGINES.named(engine).schedules else device
            self.adapted = MergedLayers(to_device(model, held), lora, start)
        self.prompt_ids = [np.array(ids, np.int32) for ids in encode_prompts(self.tokenizer, prompts)]
        self.eval_prompt_ids = [np.array(ids, np.int32) for ids in encode_prompts(self.tokenizer, eval_prompts)]
        everything = [*self.prompt_ids, *self.eval_prompt_ids]
        self.engine = ENGINES.named(engine).engine(
            EngineSetting(
                folder=folder, model=model, tokenizer=self.tokenizer, device=device, rows=rows, probes=everything,
                tensor_parallel=tensor_parallel, shares_gpu=shares_gpu,
                longest=max(map(len, everything), default=0) + sampling.max_new_tokens, trust_remote_code=trust_remote_code,
            )
        )  # fmt: skip
        # The policy computes its log-probs, and the reference its own, over what the tokens were drawn among.
        self.sampling, self.seed = replace(sampling, tells_support=sampling.truncates), seed
        self.policy_version = 0
        self._in_flight: deque[tuple[Mapping[str, Weight], int]] = deque(maxlen=1)  # newer weights replace older ones

    def generate(self, chunk: Chunk, last: bool = False) -> RolloutBatch:
        """Draw the chunk's responses. last: other roles work next, so the engine frees its GPU memory if it can."""
        if self._in_flight:
            self.load_weights(*self._in_flight.popleft())
        source = self.eval_prompt_ids if chunk.evaluation else self.prompt_ids
        prompts = [source[index] for index in chunk.prompt_indices]
        step = EVALUATION_STEP if chunk.evaluation else chunk.step
        seeds = [
            draw_seed(self.seed, "rollout", step, prompt, sample)
            for prompt, sample in zip(chunk.prompt_indices, chunk.sample_indices, strict=True)
        ]
        try:
            completions = self.engine.generate(prompts, seeds, self.sampling)
        except FloatingPointError as error:
            first = chunk.where(0)
            raise NotFinite(
                f"generation failed in the chunk that begins with {first}: {error}; set generation.precision to float32, or "
                "raise generation.temperature"
            ) from error
        if last:
            self.engine.sleep()
        return RolloutBatch(
            chunk=chunk,
            policy_version=self.policy_version,
            sequences=Sequences.of(
                prompts, [completion.response_ids for completion in completions], supports_of(completions)
            ),
            rollout_logprobs=flatten((completion.logprobs for completion in completions), np.float32),
            ended=np.array([completion.finish_reason != "length" for completion in completions]),
        )

    def load_weights(self, weights: Mapping[str, Weight], policy_version: int) -> int:
        """Copy in the trained weights (an adapter is merged). Returns the version that generates from now on."""
        if self.adapted is not None:
            self.adapted.load(dict(weights))
            self.engine.model_changed()
        else:
            self.engine.load_weights(weights, self.kept)
        self.policy_version = policy_version
        return policy_version

    def update_weights_in_flight(self, weights: Mapping[str, Weight], policy_version: int) -> int:
        """Like `load_weights`, but the next `generate` copies them in. Another thread may generate meanwhile."""
        self._in_flight.append((weights, policy_version))
        return policy_version

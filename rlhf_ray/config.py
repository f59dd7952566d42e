"""The recipe: every knob of a run, typed, validated before anything starts, and frozen.

A default lives on its field and nowhere else; what follows from other fields is a property. The README's recipe
reference is generated from these classes, so each field carries its one-line description.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlhf_ray.generation_types import SamplingParams

Precision = Literal["auto", "float32", "bfloat16"]


def exact_div(total: int, part: int, what: str) -> int:
    """total / part, or a sentence naming the two and the nearest value that works."""
    if part <= 0 or total % part:
        nearest = max(total // part, 1) * part if part > 0 else total
        raise ValueError(f"{what}: {total} is not a multiple of {part}; try {nearest}")
    return total // part


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


def knob(default, description: str, **kwargs):
    return Field(default, description=description, **kwargs)


class FromScratch(Section):
    """The architecture of a model that starts from random weights."""

    architecture: Literal["gpt2", "llama", "qwen2"] = knob("gpt2", "model family")
    layers: int = knob(4, "transformer blocks", gt=0)
    width: int = knob(256, "hidden size", gt=0)
    heads: int = knob(4, "attention heads", gt=0)
    positions: int = knob(256, "longest sequence in tokens, prompt and response together", gt=1)
    vocab_size: int = knob(4096, "entries of the byte-level BPE tokenizer trained on the recipe's text", ge=260)

    @model_validator(mode="after")
    def _heads_divide_width(self):
        exact_div(self.width, self.heads, "model.from_scratch.width must divide by heads")
        return self


class ModelConfig(Section):
    """The language model that is tuned."""

    name_or_path: str = knob("from_scratch", "Hugging Face folder, hub name, or 'from_scratch'")
    from_scratch: FromScratch = knob(FromScratch(), "architecture when name_or_path is 'from_scratch'")
    trust_remote_code: bool = knob(False, "run Python code that a hub model ships; only for authors you trust")
    chat_template: str | None = knob(None, "Jinja chat template to use in place of the tokenizer's own")

    @property
    def is_from_scratch(self) -> bool:
        return self.name_or_path == "from_scratch"


class SourceConfig(Section):
    """One data set; several are mixed by weight."""

    path: str = knob(
        ..., "hub name, or a JSONL/CSV/Parquet file (gz too), or a folder of them; relative to data.root if given"
    )
    name: str | None = knob(None, "hub configuration (subset) name")
    split: str = knob("train", "split to read")
    columns: dict[str, str] = knob({}, "our column name -> the data set's, where they differ")
    weight: float | None = knob(
        None, "share of this source in the mix, relative to the others; none given: every row once", gt=0
    )
    max_rows: int | None = knob(None, "read at most this many rows", gt=0)


class DataConfig(Section):
    """Where the text, the preferences and the prompts come from."""

    root: str | None = knob(None, "local folder to read in place of the hub")
    builder: str | None = knob(
        None, "package.module:function that returns the data sets by role, in place of the lists below"
    )
    builder_args: dict = knob({}, "keyword arguments of the builder")
    sft: tuple[SourceConfig, ...] = knob((), "text, prompt/response or chat messages to imitate")
    preferences: tuple[SourceConfig, ...] = knob((), "prompt/chosen/rejected pairs or prompt/response/score rows")
    judge: tuple[SourceConfig, ...] = knob((), "preferences that only the independent judge sees")
    prompts: tuple[SourceConfig, ...] = knob((), "prompts for PPO; default: those of the preferences")
    eval_prompts: tuple[SourceConfig, ...] = knob((), "held-out prompts; default: a share of prompts")
    holdout: float = knob(0.05, "share held out of each role without a held-out set of its own", gt=0, lt=0.9)
    max_prompt_tokens: int = knob(64, "longer prompts are cut", gt=0)
    truncate_prompt: Literal["left", "right", "drop"] = knob(
        "left", "side of a long prompt that is cut, or drop the row"
    )
    drop_duplicates: bool = knob(True, "drop rows that repeat another of the same source exactly")


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): they train, the model's own weights stay as they are."""

    rank: int = knob(16, "rows of A and columns of B in W + alpha / rank * B A", gt=0)
    alpha: float = knob(32.0, "the adapter counts alpha / rank times", gt=0)
    target_modules: tuple[str, ...] | None = knob(
        None, "ends of the names of the linear layers that get one, e.g. [q_proj, v_proj]; null: all of the body"
    )

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @model_validator(mode="after")
    def _has_targets(self):
        if self.target_modules is not None and not all(self.target_modules):
            raise ValueError(
                "target_modules holds an empty name; name linear layers, or set it to null for all of them"
            )
        if self.target_modules == ():
            raise ValueError("target_modules is empty, so nothing would train; set it to null for all linear layers")
        return self


def check_trained_part(lora: LoraConfig | None, freeze_layers: int, keys: tuple[str, str]) -> None:
    """ValueError where both are set. keys: what the recipe calls the two."""
    if lora is not None and freeze_layers > 0:
        raise ValueError(
            f"{keys[0]} is set and {keys[1]} is {freeze_layers}: an adapter freezes all layers already; "
            f"set {keys[1]} to 0, or {keys[0]} to null"
        )


class TrainConfig(Section):
    """What the supervised stages (SFT, reward model, judge, fluency model, DPO) have in common."""

    learning_rate: float = knob(3e-4, "peak learning rate of AdamW", gt=0)
    epochs: float = knob(1.0, "passes over the data", gt=0)
    max_steps: int = knob(-1, "optimiser steps; -1: as many as the epochs need")
    batch_size: int = knob(32, "sequences an optimiser step, whole job", gt=0)
    microbatch_size: int = knob(32, "sequences a forward pass, per worker", gt=0)
    max_length: int = knob(256, "longest sequence in tokens", gt=1)
    warmup_ratio: float = knob(0.03, "share of the steps in which the rate rises", ge=0, lt=1)
    schedule: Literal["linear", "cosine", "constant"] = knob("cosine", "shape of the learning rate after the warm-up")
    weight_decay: float = knob(0.0, "decoupled weight decay", ge=0)
    precision: Precision = knob("auto", "auto: bfloat16 where the hardware computes in it, else float32")
    max_minutes: float | None = knob(None, "stop the stage after this many minutes of training, with what it has", gt=0)
    checkpoint_minutes: float = knob(10.0, "longest time between checkpoints", gt=0)
    eval_rows: int = knob(500, "held-out rows scored after training", gt=0)
    workers: int = knob(1, "Ray Train workers (data-parallel ranks)", gt=0)
    cpus_per_worker: float = knob(1, "CPUs reserved for each worker", gt=0)
    gpus_per_worker: float = knob(0, "GPUs reserved for each worker", ge=0)
    threads: int = knob(2, "torch threads of each worker", gt=0)
    zero_stage: Literal[0, 1, 2, 3] = knob(0, "DeepSpeed ZeRO stage")
    lora: LoraConfig | None = knob(None, "train low-rank adapters, merged into the saved model; null: all weights")
    freeze_layers: int = knob(0, "the embeddings and so many of the first transformer blocks don't train", ge=0)
    gradient_checkpointing: bool = knob(False, "compute activations again in the backward pass: less memory, more time")

    @property
    def accumulation_steps(self) -> int:
        per_rank = exact_div(self.batch_size, self.workers, "batch_size must divide by workers")
        return exact_div(per_rank, self.microbatch_size, "batch_size / workers must divide by microbatch_size")

    @model_validator(mode="after")
    def _batches_divide(self):
        assert self.accumulation_steps > 0
        return self

    @model_validator(mode="after")
    def _trains_one_part(self):
        check_trained_part(self.lora, self.freeze_layers, ("lora", "freeze_layers"))
        return self


class SftConfig(TrainConfig):
    """Supervised fine-tuning (TRL's SFTTrainer). Also the form of the separately seeded fluency model."""

    packing: bool = knob(False, "fill sequences of max_length with several texts (plain text only)")


class RewardConfig(TrainConfig):
    """A reward model (TRL's RewardTrainer). Also the form of the independent judge."""

    objective: Literal["pairs", "scores"] = knob("pairs", "Bradley-Terry on pairs, or regression to people's scores")
    base: str = knob(
        "sft",
        "start from 'sft' or 'fluency' (that stage's model), 'model' (the recipe's model, before SFT) "
        "or a folder / hub name",
    )
    truncate_reply: Literal["left", "right", "drop"] = knob(
        "drop", "side of a reply that is cut when its row exceeds max_length, or drop the row"
    )
    learning_rate: float = knob(1e-4, "peak learning rate of AdamW", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = knob("linear", "shape of the learning rate after the warm-up")
    normalise_samples: int = knob(
        256, "samples of the SFT model whose mean and deviation normalise the scores; 0: none", ge=0
    )
    members: int = knob(1, "models trained, each with a head and a data order of its own; all score together", gt=0)
    combine: Literal["mean", "worst", "mean_minus_std"] = knob(
        "mean", "score of an ensemble: mean of its members, their lowest, or mean - combine_std * deviation"
    )
    combine_std: float = knob(1.0, "deviations that mean_minus_std subtracts", ge=0)

    @model_validator(mode="after")
    def _an_ensemble_has_members(self):
        if self.members == 1 and self.combine != "mean":
            raise ValueError(
                f"combine is '{self.combine}' and members is 1: there is nothing to combine; set members to 2 or more, "
                "or combine to mean"
            )
        return self

    @property
    def starts_within_run(self) -> bool:
        """Whether `base` is one of the run's own models, which share the run's tokenizer."""
        return self.base in ("sft", "fluency", "model")


class DpoConfig(TrainConfig):
    """Direct preference optimisation on the reward model's own pairs (TRL's DPOTrainer), from the SFT model."""

    beta: float = knob(
        0.1, "price of leaving the SFT model, as ppo.kl_coef is in the objective that both maximise; IPO's tau", gt=0
    )
    loss: Literal["sigmoid", "ipo"] = knob(
        "sigmoid", "sigmoid: DPO's logistic loss; ipo: squared distance of the log-ratios a token from 1 / (2 beta)"
    )
    label_smoothing: float = knob(
        0.0, "share of the pairs taken to be labelled the wrong way round (cDPO); with loss sigmoid only", ge=0, lt=0.5
    )
    max_length: int | None = knob(
        None, "longest sequence in tokens; null: reward.max_length, to which the pairs are cut already", gt=1
    )
    learning_rate: float = knob(1e-5, "peak learning rate of AdamW", gt=0)
    warmup_ratio: float = knob(0.1, "share of the steps in which the rate rises", ge=0, lt=1)
    schedule: Literal["linear", "cosine", "constant"] = knob("linear", "shape of the learning rate after the warm-up")

    @model_validator(mode="after")
    def _smoothing_fits(self):
        if self.label_smoothing > 0 and self.loss == "ipo":
            raise ValueError(
                f"dpo.label_smoothing is {self.label_smoothing:g}, but dpo.loss ipo has no smoothed form; "
                "set label_smoothing to 0 or loss to sigmoid"
            )
        return self


class GenerationConfig(Section):
    """How responses are drawn, in training and evaluation alike."""

    max_new_tokens: int = knob(48, "longest response in tokens", gt=0)
    min_new_tokens: int = knob(
        0, "an EOS before this token does not end the response; max_new_tokens: all are of one length", ge=0
    )
    temperature: float = knob(1.0, "divides the logits in sampling and in every log-prob", gt=0)
    top_k: int = knob(0, "sample from the k likeliest tokens; 0: all", ge=0)
    top_p: float = knob(1.0, "sample from the smallest set with this probability", gt=0, le=1)
    min_p: float = knob(0.0, "drop tokens less likely than this share of the likeliest", ge=0, lt=1)
    stop: tuple[str, ...] = knob((), "strings that end a response")
    chunk_size: int = knob(32, "prompts a unit of work; fixes the batch, whoever runs it", gt=0)
    precision: Precision = knob("auto", "auto: as ppo.precision")

    @property
    def sampling(self) -> SamplingParams:
        """These knobs as the engine takes them."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            stop=self.stop,
        )

    @model_validator(mode="after")
    def _lengths_fit(self):
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"generation.min_new_tokens = {self.min_new_tokens} is above max_new_tokens = {self.max_new_tokens}; lower it"
            )
        return self


class KlConfig(Section):
    """The adaptive controller of the KL coefficient (Ziegler et al. 2019)."""

    target: float = knob(6.0, "nats a sequence, summed over its tokens", gt=0)
    horizon: int = knob(10000, "episodes over which the coefficient adapts", gt=0)


class RewardTerm(Section):
    """One of several rewards whose weighted sum is the score."""

    weight: float = knob(1.0, "factor of this term in the sum; negative: a price")
    function: str | None = knob(None, "package.module:function scoring (prompts, responses); or model")
    model: str | None = knob(
        None, "'reward' (the reward stage's model or ensemble), or a folder / hub name of a reward model; or function"
    )
    timeout_s: float | None = knob(
        None, "longest time of the function for a sample, which it gets one at a time in a process of its own; null: none",
        gt=0,
    )  # fmt: skip
    timeout_score: float | None = knob(None, "score of a sample over the limit, before the weight; null: the run stops")

    @model_validator(mode="after")
    def _one_source(self):
        if (self.function is None) == (self.model is None):
            has = "neither" if self.function is None else "both"
            raise ValueError(f"the term has {has} function and model; give it exactly one of the two")
        if self.timeout_s is not None and self.function is None:
            raise ValueError(
                f"timeout_s is {self.timeout_s:g}, but model '{self.model}' is no function; remove timeout_s"
            )
        if self.timeout_score is not None and self.timeout_s is None:
            raise ValueError(f"timeout_score is {self.timeout_score:g}, but there is no timeout_s; set it too")
        return self


#: ppo.advantage that compare the samples of a prompt, so that there have to be several
COMPARES_SAMPLES = ("rloo", "grpo", "dr_grpo", "reinforce_pp_baseline")


class PPOConfig(Section):
    """Proximal policy optimisation with a KL penalty to the SFT model."""

    steps: int = knob(100, "rollout-and-update iterations", gt=0)
    seed: int | None = knob(None, "of PPO's own draws, to repeat it on the same models; null: the recipe's seed", ge=0)
    rollout_batch_size: int = knob(64, "prompts a step, whole job", gt=0)
    samples_per_prompt: int = knob(1, "responses drawn for each prompt", gt=0)
    minibatch_size: int = knob(64, "rollouts an optimiser step, whole job", gt=0)
    microbatch_size: int = knob(32, "rollouts a forward pass, per rank", gt=0)
    ppo_epochs: int = knob(4, "passes over each rollout batch", gt=0)
    learning_rate: float = knob(1e-5, "policy's peak rate", gt=0)
    critic_learning_rate: float = knob(1e-5, "critic's peak rate", gt=0)
    anneal: bool = knob(True, "learning rates fall linearly to zero over the steps")
    adam_eps: float = knob(1e-5, "epsilon of AdamW (1e-5 as in OpenAI's code, not torch's 1e-8)", gt=0)
    max_grad_norm: float = knob(1.0, "gradient norm is clipped to this; 0: never", ge=0)
    kl_coef: float = knob(0.05, "weight of the per-token KL in the reward (start value if adaptive)", ge=0)
    adaptive_kl: KlConfig | None = knob(None, "adapt kl_coef to a target; null: fixed")
    gamma: float = knob(1.0, "discount", ge=0, le=1)
    gae_lambda: float = knob(0.95, "GAE's lambda", ge=0, le=1)
    advantage: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce_pp", "reinforce_pp_baseline"] = knob(
        "gae", "gae has a critic; the others compare the samples of a prompt, or whiten over the batch"
    )
    loss_aggregation: Literal["token", "sequence_sum", "sequence_mean", "constant"] = knob(
        "token",
        "mean over all tokens; over responses of their sums; of their means; of sums over max_new_tokens",
    )
    kl_in: Literal["reward", "loss"] = knob("reward", "where the KL stands: in each token's reward or in the loss")
    kl_estimator: Literal["k1", "k2", "k3"] = knob("k1", "estimator of the KL in the reward or the loss")
    clip_range: float = knob(0.2, "ratio clip of the policy loss", gt=0)
    clip_range_high: float | None = knob(None, "upper ratio clip (clip-higher); null: clip_range", gt=0)
    dual_clip: float | None = knob(None, "caps the loss of negative advantages at this multiple; null: off", gt=1)
    entropy_coef: float = knob(0.0, "weight of an entropy bonus in the policy loss", ge=0)
    max_approx_kl: float | None = knob(
        None, "end a step's policy updates once approx_kl of a minibatch exceeds this; null: never", gt=0
    )
    dynamic_sampling_rounds: int = knob(
        0,
        "a step draws other prompts for those whose samples all score the same, at most so often (DAPO); 0: never",
        ge=0,
    )
    critic_warmup_steps: int = knob(0, "first steps in which the critic trains alone", ge=0)
    value_clip_range: float = knob(0.2, "clip of the value loss around the old values", gt=0)
    vf_coef: float = knob(0.1, "weight of the value loss", gt=0)
    whiten_rewards: bool = knob(False, "divide rewards by their deviation over the batch, keeping the mean")
    whiten_advantages: bool | None = knob(
        None, "centre and scale advantages over the whole batch; null: with gae and reinforce_pp, not within groups"
    )
    missing_eos_penalty: float = knob(0.0, "subtracted from the score of a response that did not end", ge=0)
    missing_eos_score: float | None = knob(
        None, "the score of every response that did not end, in place of its own (OpenAI's -1); null: its own"
    )
    score_clip: float | None = knob(None, "scores are cut to between -this and this; null: as they are", gt=0)
    overlong_buffer: int = knob(
        0, "a penalty rises from 0 to 1 over this many tokens before max_new_tokens (DAPO); 0: none", ge=0
    )
    critic_init: Literal["reward", "sft"] = knob(
        "reward", "critic starts from the reward model, or from the SFT model with a zero head"
    )
    reward_function: str | None = knob(
        None, "package.module:function scoring (prompts, responses) in place of the reward model"
    )
    reward_timeout_s: float | None = knob(
        None, "longest time of reward_function for a sample, as timeout_s of a term of rewards", gt=0
    )
    reward_timeout_score: float | None = knob(None, "score of a sample over that limit; null: the run stops")
    rewards: dict[str, RewardTerm] = knob(
        {}, "name -> term of a weighted sum of rewards; empty: the reward model, or reward_function"
    )
    adam_form: Literal["torch", "tensorflow"] = knob(
        "torch", "whether adam_eps stands outside or inside the bias correction"
    )
    precision: Precision = knob("auto", "auto: bfloat16 where the hardware computes in it, else float32")
    lora: LoraConfig | None = knob(
        None, "train low-rank adapters of the policy; without them it is the reference. null: all weights"
    )
    critic_lora: LoraConfig | None = knob(None, "train low-rank adapters of the critic, and its value head; null: all")
    freeze_layers: int = knob(0, "the policy's embeddings and so many of its first blocks don't train", ge=0)
    critic_freeze_layers: int = knob(0, "the critic's embeddings and so many of its first blocks don't train", ge=0)
    gradient_checkpointing: bool = knob(
        False, "policy and critic compute activations again in the backward pass: less memory, more time"
    )
    eval_every: int = knob(20, "steps between evaluations on held-out prompts", gt=0)
    eval_prompts: int = knob(64, "held-out prompts of these evaluations", gt=0)
    judge_evaluations: bool = knob(False, "these evaluations ask the independent judge too (metric eval/judge)")
    best_by: Literal["score", "judge"] = knob("score", "whose held-out mean says which policy is the best one")
    patience: int | None = knob(
        None, "stop after so many evaluations in a row that find no better policy; null: never", gt=0
    )
    roll_back: bool = knob(False, "the stage's model is the best policy, not the last one")
    checkpoint_every: int = knob(20, "steps between checkpoints", gt=0)
    checkpoint_minutes: float = knob(20.0, "longest time between checkpoints", gt=0)
    keep_checkpoints: int = knob(2, "last good checkpoints kept", gt=0)
    max_mismatch: float = knob(
        0.5, "stop if a sampled token's log-prob differs by more between generator and policy", gt=0
    )
    max_first_approx_kl: float = knob(
        1e-3, "stop if approx_kl of an update's first minibatch, where the policy has not moved, is above", gt=0
    )

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def terms(self) -> dict[str, RewardTerm]:
        """What the score is made of, the shorthands written out."""
        if self.rewards:
            return self.rewards
        if self.reward_function is None:
            return {"reward": RewardTerm(model="reward")}
        return {"reward": RewardTerm(
            function=self.reward_function, timeout_s=self.reward_timeout_s, timeout_score=self.reward_timeout_score
        )}  # fmt: skip

    @property
    def uses_reward_model(self) -> bool:
        """Whether a term is the reward stage's model."""
        return any(term.model == "reward" for term in self.terms.values())

    @property
    def whitens_advantages(self) -> bool:
        if self.whiten_advantages is not None:
            return self.whiten_advantages
        return self.advantage in ("gae", "reinforce_pp", "reinforce_pp_baseline")

    @property
    def rollouts_per_step(self) -> int:
        return self.rollout_batch_size * self.samples_per_prompt

    @property
    def num_minibatches(self) -> int:
        return exact_div(
            self.rollouts_per_step,
            self.minibatch_size,
            "ppo.rollout_batch_size * samples_per_prompt must divide by minibatch_size",
        )

    @model_validator(mode="after")
    def _algorithm_fits(self):
        if self.advantage in COMPARES_SAMPLES and self.samples_per_prompt < 2:
            raise ValueError(
                f"ppo.advantage {self.advantage} compares the samples of a prompt, but samples_per_prompt is "
                f"{self.samples_per_prompt}; set it to 2 or more, or choose gae or reinforce_pp"
            )
        if self.dynamic_sampling_rounds > 0 and self.samples_per_prompt < 2:
            raise ValueError(
                "ppo.dynamic_sampling_rounds looks for prompts whose samples score differently, but samples_per_prompt is "
                f"{self.samples_per_prompt}; set it to 2 or more"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "ppo.kl_estimator is k1 and kl_in is loss: k1's expected gradient is zero, it would hold nothing back; "
                "set kl_estimator to k2 or k3"
            )
        if self.critic_warmup_steps > 0 and not self.has_critic:
            raise ValueError(
                f"ppo.critic_warmup_steps is {self.critic_warmup_steps}, but ppo.advantage {self.advantage} has no critic; "
                "set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _rewards_fit(self):
        if self.rewards and self.reward_function is not None:
            raise ValueError(
                f"ppo.rewards and ppo.reward_function ('{self.reward_function}') are both set; make the function a term "
                "of ppo.rewards"
            )
        for name in self.rewards:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise ValueError(
                    f"ppo.rewards has a term '{name}'; name it with letters, digits, '_', '.' and '-' only"
                )
        if self.reward_timeout_s is not None and self.reward_function is None:
            raise ValueError(
                f"ppo.reward_timeout_s is {self.reward_timeout_s:g}, but there is no ppo.reward_function; remove it, or "
                "set timeout_s of a term of ppo.rewards"
            )
        if self.reward_timeout_score is not None and self.reward_timeout_s is None:
            raise ValueError(
                f"ppo.reward_timeout_score is {self.reward_timeout_score:g}, but there is no ppo.reward_timeout_s; set it too"
            )
        if self.best_by == "judge" and not self.judge_evaluations:
            raise ValueError("ppo.best_by is 'judge' and ppo.judge_evaluations is false; set it to true")
        return self

    @model_validator(mode="after")
    def _trains_one_part(self):
        check_trained_part(self.lora, self.freeze_layers, ("ppo.lora", "ppo.freeze_layers"))
        check_trained_part(self.critic_lora, self.critic_freeze_layers, ("ppo.critic_lora", "ppo.critic_freeze_layers"))
        if not self.has_critic and (self.critic_lora is not None or self.critic_freeze_layers > 0):
            raise ValueError(
                f"ppo.critic_lora or ppo.critic_freeze_layers is set, but ppo.advantage {self.advantage} has no critic; "
                "set them to null and 0"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self):
        assert self.num_minibatches > 0
        exact_div(self.minibatch_size, self.microbatch_size, "ppo.minibatch_size must divide by microbatch_size")
        return self


class EvaluationConfig(Section):
    """SFT model against PPO model on held-out prompts."""

    prompts: int = knob(256, "held-out prompts", gt=0)
    samples: int = knob(12, "sample pairs shown in the report", gt=0)
    seeds: tuple[int, ...] = knob((0,), "sampling seeds; every prompt is drawn once for each")
    bootstrap: int = knob(2000, "resamples of the 95 % intervals", gt=0)
    judge_function: str | None = knob(
        None, "package.module:function(prompts, responses) -> scores: the known true utility"
    )
    max_kl: float | None = knob(
        None, "cap on the KL to the SFT model, nats a response; above it the result counts as failed", gt=0
    )
    judge_positive_above: float | None = knob(
        None, "raw judge score above which a response counts as positive (judge_positive)"
    )


class RoleConfig(Section):
    """How many Ray actors a role has and what each reserves."""

    actors: int = knob(1, "Ray actors of this role", gt=0)
    cpus: float = knob(0.3, "CPUs reserved for each", ge=0)
    gpus: float = knob(0.0, "GPUs reserved for each", ge=0)
    threads: int = knob(2, "torch threads of each; results are bit-equal only for a fixed number", gt=0)


class GroupConfig(RoleConfig):
    """A DeepSpeed group: `actors` is its number of ranks."""

    zero_stage: Literal[0, 1, 2, 3] = knob(0, "DeepSpeed ZeRO stage")


class ResourcesConfig(Section):
    """Placement of the PPO roles; the defaults fit on two cores."""

    generation: RoleConfig = knob(RoleConfig(), "generation actors")
    reward: RoleConfig = knob(RoleConfig(), "reward actors")
    reference: RoleConfig = knob(RoleConfig(), "reference actors")
    policy: GroupConfig = knob(GroupConfig(), "policy ranks")
    critic: GroupConfig = knob(GroupConfig(), "critic ranks")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = knob("PACK", "Ray placement-group strategy")
    start_timeout_s: float = knob(300.0, "longest wait for actors or workers to start", gt=0)
    call_timeout_s: float = knob(
        1800.0, "longest wait for any one call to an actor, and for a step of a supervised stage", gt=0
    )


class TrackingConfig(Section):
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = knob(True, "write TensorBoard event files")
    wandb: str | None = knob(None, "Weights & Biases project (needs the extra 'wandb')")
    mlflow: str | None = knob(None, "MLflow experiment (needs the extra 'mlflow')")


class Recipe(Section):
    """One run from data to evaluated model."""

    name: str = knob(..., "names the run folder runs/<name>", pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = knob(0, "every random draw follows from it", ge=0)
    model: ModelConfig = knob(ModelConfig(), "the language model")
    data: DataConfig = knob(DataConfig(), "the data")
    sft: SftConfig | None = knob(SftConfig(), "supervised fine-tuning; null: start from the model as it is")
    reward: RewardConfig | None = knob(RewardConfig(), "reward model; null where PPO is paid by others")
    judge: RewardConfig | None = knob(None, "independent judge, trained on data.judge")
    fluency: SftConfig | None = knob(None, "separately seeded language model for perplexity_independent")
    dpo: DpoConfig | None = knob(None, "DPO on the reward model's pairs, to compare with PPO")
    generation: GenerationConfig = knob(GenerationConfig(), "sampling")
    ppo: PPOConfig = knob(PPOConfig(), "PPO")
    evaluation: EvaluationConfig = knob(EvaluationConfig(), "final evaluation")
    resources: ResourcesConfig = knob(ResourcesConfig(), "actors and placement")
    tracking: TrackingConfig = knob(TrackingConfig(), "metric back-ends")

    @property
    def ppo_seed(self) -> int:
        return self.seed if self.ppo.seed is None else self.ppo.seed

    @property
    def ppo_roles(self) -> dict[str, RoleConfig]:
        """Role -> its actors, for the roles that are Ray actors of the PPO stage."""
        names = ("generation", "reward", "reference", "policy", *(("critic",) if self.ppo.has_critic else ()))
        if self.ppo.lora is not None:  # the policy with its adapter off is the reference
            names = tuple(name for name in names if name != "reference")
        return {name: getattr(self.resources, name) for name in names}

    @property
    def dpo_max_length(self) -> int:
        """dpo.max_length, or the reward model's."""
        assert self.dpo is not None
        return self.dpo.max_length or (self.reward or RewardConfig()).max_length

    @property
    def frozen_layers(self) -> dict[str, int]:
        """Key -> how many blocks it freezes, of those keys that freeze any of the recipe's model."""
        ppo = self.ppo
        counts = {"ppo.freeze_layers": ppo.freeze_layers, "ppo.critic_freeze_layers": ppo.critic_freeze_layers}
        counts |= {f"{name}.freeze_layers": stage.freeze_layers for name, stage in self._stages_on_own_model.items()}
        return {key: count for key, count in counts.items() if count > 0}

    @property
    def adapters(self) -> dict[str, LoraConfig]:
        """Key -> the adapters that it puts on the recipe's model."""
        adapters = {"ppo.lora": self.ppo.lora, "ppo.critic_lora": self.ppo.critic_lora}
        adapters |= {f"{name}.lora": stage.lora for name, stage in self._stages_on_own_model.items()}
        return {key: lora for key, lora in adapters.items() if lora is not None}

    @property
    def _stages_on_own_model(self) -> dict[str, TrainConfig]:
        stages = {name: getattr(self, name) for name in ("sft", "fluency", "reward", "judge", "dpo")}
        return {
            name: stage for name, stage in stages.items()
            if stage is not None and not (isinstance(stage, RewardConfig) and not stage.starts_within_run)
        }  # fmt: skip

    @model_validator(mode="after")
    def _fits_together(self):
        ppo = self.ppo
        for role, ranks in (("policy", self.resources.policy.actors), ("critic", self.resources.critic.actors)):
            per_rank = exact_div(
                ppo.minibatch_size, ranks, f"ppo.minibatch_size must divide by resources.{role}.actors"
            )
            exact_div(
                per_rank,
                min(ppo.microbatch_size, per_rank),
                f"ppo.minibatch_size / resources.{role}.actors must divide by ppo.microbatch_size",
            )
            group = getattr(self.resources, role)
            if group.zero_stage == 3 and ranks > 1:
                # Every forward gathers from all ranks: chunks of unlike size would leave one of them waiting.
                exact_div(
                    ppo.rollouts_per_step,
                    min(self.generation.chunk_size, ppo.rollouts_per_step),
                    f"resources.{role}.zero_stage is 3, so rollouts a step must divide by generation.chunk_size",
                )
        if self.reward is None and not ppo.rewards and ppo.reward_function is None:
            raise ValueError(
                "reward is null and neither ppo.reward_function nor ppo.rewards is set: nothing scores the responses; "
                "set one of them"
            )
        if self.reward is None and ppo.uses_reward_model:
            names = [name for name, term in ppo.terms.items() if term.model == "reward"]
            raise ValueError(
                f"ppo.rewards.{names[0]}.model is 'reward' but reward is null; set the section reward, or name a folder"
            )
        if self.reward is not None and self.reward.members > 1 and not ppo.uses_reward_model:
            raise ValueError(
                f"reward.members is {self.reward.members}, but no reward of PPO uses these models; set reward.members to 1, "
                "or give ppo.rewards a term with model: reward"
            )
        if ppo.judge_evaluations and self.judge is None and self.evaluation.judge_function is None:
            raise ValueError(
                "ppo.judge_evaluations is true, but there is no judge; set the section judge or evaluation.judge_function"
            )
        if ppo.overlong_buffer > self.generation.max_new_tokens:
            raise ValueError(
                f"ppo.overlong_buffer = {ppo.overlong_buffer} is longer than generation.max_new_tokens = "
                f"{self.generation.max_new_tokens}; lower it"
            )
        if self.reward is None and ppo.critic_init == "reward" and ppo.has_critic:
            raise ValueError("ppo.critic_init is 'reward' but reward is null; set ppo.critic_init to 'sft'")
        for name in ("reward", "judge"):
            stage = getattr(self, name)
            if stage is not None and stage.base == "fluency" and self.fluency is None:
                raise ValueError(
                    f"{name}.base is 'fluency', but fluency is null; set the section fluency or {name}.base to 'sft'"
                )
        if self.dpo is not None and self.reward is not None and self.reward.objective == "scores":
            raise ValueError(
                "dpo learns from the reward model's pairs, but reward.objective is 'scores', whose rows have no chosen "
                "and rejected reply; give pairs and set reward.objective to pairs, or set dpo: null"
            )
        threshold = self.evaluation.judge_positive_above
        if threshold is not None and self.judge is not None and self.judge.members > 1:
            raise ValueError(
                f"evaluation.judge_positive_above = {threshold:g} is on the scale of one judge's raw scores, but "
                f"judge.members is {self.judge.members}; set judge.members to 1, or judge_positive_above to null"
            )
        if self.model.is_from_scratch:
            self._random_weights_train()
            if self.sft is None:
                raise ValueError(
                    "model.name_or_path is 'from_scratch' and sft is null: nothing would train the model; set sft"
                )
            longest = self.data.max_prompt_tokens + self.generation.max_new_tokens
            if longest > self.model.from_scratch.positions:
                raise ValueError(
                    f"data.max_prompt_tokens + generation.max_new_tokens = {longest} is longer than "
                    f"model.from_scratch.positions = {self.model.from_scratch.positions}; lower one or raise positions"
                )
            for name in ("sft", "reward", "judge", "fluency", "dpo"):
                stage = getattr(self, name)
                if stage is not None and (stage.max_length or 0) > self.model.from_scratch.positions:
                    raise ValueError(
                        f"{name}.max_length = {stage.max_length} is longer than model.from_scratch.positions = "
                        f"{self.model.from_scratch.positions}; lower it or raise positions"
                    )
        return self

    def _random_weights_train(self) -> None:
        """ValueError where a model from scratch would keep weights that nothing ever trained, or has no such layers."""
        for key, count in self.frozen_layers.items():
            if count >= self.model.from_scratch.layers:
                raise ValueError(
                    f"{key} = {count}, but the model has {self.model.from_scratch.layers} blocks, so none would train; "
                    f"set it to {self.model.from_scratch.layers - 1} or less"
                )
        for name, stage in self._stages_on_own_model.items():
            if isinstance(stage, RewardConfig) and stage.base != "model":
                continue
            for key, is_set, off in (
                ("lora", stage.lora is not None, "null"),
                ("freeze_layers", stage.freeze_layers > 0, 0),
            ):
                if is_set:
                    raise ValueError(
                        f"{name}.{key} is set, but {name} starts from random weights, and those that don't train would "
                        f"stay random; set it to {off}, or name a model in model.name_or_path"
                    )


RecipePath = Annotated[str, "path of a recipe YAML, or the name of a packaged one"]

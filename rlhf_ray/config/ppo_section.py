"""The section `ppo`."""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict

from pydantic import model_validator

from rlhf_ray.config.base import LONGEST_S, SEEDS, OneOf, Precision, Section, exact_div, option
from rlhf_ray.config.kl_section import KlConfig, controller_problem, estimator_problem
from rlhf_ray.config.reward_term import RewardTerm, shorthand_problem
from rlhf_ray.config.supervised_sections import LoraConfig, check_trained_part
from rlhf_ray.tables.advantages import ADVANTAGES, Advantage


class Microbatches(TypedDict):
    """How rollouts are cut for a forward pass."""

    microbatch_size: int
    microbatch_tokens: int | None


#: Between the rounding of 16 bits and real faults, at temperature 1 (results/bench/README.md, "Rounding and faults").
MISMATCH, MISMATCH_KL = 0.35, 0.006


class PPOConfig(Section):
    """Proximal policy optimisation with a KL penalty to the SFT model."""

    steps: int = option(100, "rollout-and-update iterations", gt=0)
    seed: int | None = option(
        None, "seed of PPO's draws, to repeat PPO on the same models; null: the recipe's seed", ge=0, lt=SEEDS
    )
    rollout_batch_size: int = option(64, "prompts per step, all ranks", gt=0)
    samples_per_prompt: int = option(1, "responses drawn for each prompt", gt=0)
    minibatch_size: int = option(64, "rollouts per optimiser step, all ranks", gt=0)
    microbatch_size: int = option(32, "rollouts per forward pass, per rank", gt=0)
    microbatch_tokens: int | None = option(
        None,
        "tokens per forward pass, per rank, in place of microbatch_size: as many rollouts of like length as fit",
        gt=0,
    )
    reuse_forward: bool = option(
        False,
        "the first optimiser step starts from the passes that gave old log-probs and values: less time, more memory "
        "(the activations of a whole step)",
    )
    ppo_epochs: int = option(4, "passes over each rollout batch", gt=0)
    learning_rate: float = option(1e-5, "policy's peak rate", gt=0)
    critic_learning_rate: float = option(1e-5, "critic's peak rate", gt=0)
    anneal: bool = option(True, "learning rates fall linearly to zero over the steps")
    adam_eps: float = option(1e-5, "epsilon of AdamW (1e-5 as in OpenAI's code, not torch's 1e-8)", gt=0)
    max_grad_norm: float = option(1.0, "gradient norm is clipped to this; 0: never", ge=0)
    kl_coef: float = option(0.05, "weight of the per-token KL in the reward (start value if adaptive)", ge=0)
    reference: str | None = option(
        None, "folder / hub name of the model that the KL is measured to; null: the model that PPO starts from", min_length=1
    )
    adaptive_kl: KlConfig | None = option(None, "adapt kl_coef to a target; null: fixed")
    gamma: float = option(1.0, "discount", ge=0, le=1)
    gae_lambda: float = option(0.95, "GAE's lambda", ge=0, le=1)
    advantage: Annotated[str, OneOf(ADVANTAGES)] = option(
        "gae", "; ".join(f"{advantage.name}: {advantage.words}" for advantage in ADVANTAGES.values())
    )
    loss_aggregation: Literal["token", "sequence_sum", "sequence_mean", "constant"] = option(
        "token",
        "mean over all tokens; mean over responses of their sums, their means, or their sums / max_new_tokens",
    )
    kl_in: Literal["reward", "loss"] = option("reward", "where the KL stands: in each token's reward or in the loss")
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", "estimator of the KL in the reward or the loss")
    clip_range: float = option(0.2, "ratio clip of the policy loss", gt=0)
    clip_range_high: float | None = option(None, "upper ratio clip (clip-higher); null: clip_range", gt=0)
    dual_clip: float | None = option(None, "caps the loss of negative advantages at this multiple; null: off", gt=1)
    entropy_coef: float = option(0.0, "weight of an entropy bonus in the policy loss", ge=0)
    max_approx_kl: float | None = option(
        None, "end a step's policy updates once approx_kl of a minibatch exceeds this; null: never", gt=0
    )
    dynamic_sampling_rounds: int = option(
        0,
        "a step replaces prompts whose samples all score the same, in at most this many rounds (DAPO); 0: never",
        ge=0,
    )
    steps_ahead: int = option(
        0, "generation runs at most this many steps ahead of training, on older weights; 0: each waits for the other", ge=0
    )
    importance_cap: float = option(
        2.0, "with steps_ahead or importance_correction: highest importance weight per token", gt=0
    )
    importance_correction: bool = option(
        False,
        "weight tokens by the policy's probability over the generator's, at most importance_cap; always on with steps_ahead",
    )
    weights_in_flight: bool = option(
        False, "in-flight weight updates, with steps_ahead: generators take new weights between chunks, not only between steps"
    )
    critic_warmup_steps: int = option(0, "first steps in which only the critic trains", ge=0)
    value_clip_range: float = option(0.2, "clip of the value loss around the old values", gt=0)
    vf_coef: float = option(0.1, "weight of the value loss", gt=0)
    whiten_rewards: bool = option(False, "divide rewards by their deviation over the batch, keeping the mean")
    whiten_advantages: bool | None = option(
        None, "centre and scale advantages over the whole batch; null: "
        f"with {' and '.join(one.name for one in ADVANTAGES.values() if one.whitens)}",
    )
    missing_eos_penalty: float = option(0.0, "subtracted from the score of a response that did not end", ge=0)
    missing_eos_score: float | None = option(
        None, "the score of every response that did not end, in place of its own (OpenAI's -1); null: its own"
    )
    score_clip: float | None = option(None, "scores are cut to between -this and this; null: as they are", gt=0)
    overlong_buffer: int = option(
        0, "a penalty rises from 0 to 1 over this many tokens before max_new_tokens (DAPO); 0: none", ge=0
    )
    critic_init: Literal["reward", "sft"] = option(
        "reward", "critic starts from the reward model, or from the SFT model with a zero head"
    )
    reward_function: str | None = option(
        None, "package.module:function scoring (prompts, responses) in place of the reward model; equals one term of rewards"
    )
    reward_timeout_s: float | None = option(
        None, "longest time of reward_function per sample, as timeout_s of a term of rewards", gt=0, le=LONGEST_S
    )
    reward_timeout_score: float | None = option(None, "score of a sample over this limit; null: the run stops")
    rewards: dict[str, RewardTerm] = option(
        {}, "name -> term of a weighted sum of rewards; empty: the reward model, or reward_function"
    )
    accept_weak_reward: Literal[False, "early", True] = option(
        False,
        "train against a reward model that is no better than chance on held-out rows, as far as its 95 % interval says, or that "
        "max_minutes ended before its last step; early: only such a one as is above chance",
    )
    adam_form: Literal["torch", "tensorflow"] = option(
        "torch", "whether adam_eps stands outside or inside the bias correction"
    )
    precision: Precision = option("auto", "auto: bfloat16 where the hardware computes in it, else float32")
    float32_head: bool = option(
        False,
        "logits are computed in float32 where the rest is in bfloat16, by policy, reference and generation alike, in the "
        "evaluation too: they differ less, for more time and memory per logit",
    )
    lora: LoraConfig | None = option(
        None, "train low-rank adapters of the policy; without them it is the reference. null: all weights"
    )
    critic_lora: LoraConfig | None = option(None, "train low-rank adapters of the critic, and its value head; null: all")
    freeze_layers: int = option(0, "the policy's embeddings and first N blocks do not train", ge=0)
    critic_freeze_layers: int = option(0, "the critic's embeddings and first N blocks do not train", ge=0)
    gradient_checkpointing: bool = option(
        False, "policy and critic compute activations again in the backward pass: less memory, more time"
    )
    eval_every: int = option(20, "steps between evaluations on held-out prompts", gt=0)
    eval_prompts: int = option(64, "held-out prompts of these evaluations", gt=0)
    judge_evaluations: bool = option(False, "these evaluations ask the independent judge too (metric eval/judge)")
    best_by: Literal["score", "judge"] = option("score", "the score whose held-out mean decides which policy is the best")
    patience: int | None = option(
        None, "stop after this many evaluations in a row without a better policy; null: never", gt=0
    )
    roll_back: bool = option(False, "the stage's model is the best policy, not the last one")
    checkpoint_every: int = option(20, "steps between checkpoints", gt=0)
    checkpoint_minutes: float = option(20.0, "longest time between checkpoints", gt=0)
    publish_every: int | None = option(None, "steps between versions for the run's server (`rlhf-ray serve`); null: none", gt=0)
    publish_share: float = option(1.0, "share of the server's requests that a published version takes", gt=0, le=1)
    keep_checkpoints: int = option(2, "last good checkpoints kept", gt=0)
    max_mismatch: float | None = option(
        None,
        "stop if log-probs differ by more than this between generator and policy in 1 of 100 sampled tokens; null: 0.35 / "
        "generation.temperature, which divides the rounding of logits too",
        gt=0,
    )
    max_mismatch_kl: float | None = option(
        None,
        "stop if the KL (k3) of generator and policy exceeds this many nats per sampled token; null: 0.006 / "
        "generation.temperature squared",
        gt=0,
    )
    max_first_approx_kl: float | None = option(
        None,
        "stop if approx_kl of an update's first minibatch exceeds this: the policy has not moved yet; null: 0.001, or "
        "max_mismatch_kl where the policy computes in bfloat16, whose rounding depends on which rows a pass holds",
        gt=0,
    )

    def mismatch_limits(self, temperature: float) -> tuple[float, float]:
        """(max_mismatch, max_mismatch_kl), their defaults written out. A KL of small differences goes with their squares."""
        return self.max_mismatch or MISMATCH / temperature, self.max_mismatch_kl or MISMATCH_KL / temperature**2

    def first_approx_kl_limit(self, *, bfloat16: bool, temperature: float = 1.0) -> float:
        """max_first_approx_kl, its default written out. bfloat16: what the policy computes in."""
        return self.max_first_approx_kl or (self.mismatch_limits(temperature)[1] if bfloat16 else 1e-3)

    @property
    def estimator(self) -> Advantage:
        """The entry that `advantage` names."""
        return ADVANTAGES.named(self.advantage)

    @property
    def has_critic(self) -> bool:
        return self.estimator.needs_critic

    @property
    def corrects_importance(self) -> bool:
        return self.importance_correction or self.steps_ahead > 0

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

    def key_of(self, name: str) -> str:
        """Where the recipe says what the term is."""
        return f"ppo.rewards.{name}" if self.rewards else "ppo.reward_function"

    @property
    def uses_reward_model(self) -> bool:
        """Whether a term is the reward stage's model."""
        return any(term.model == "reward" for term in self.terms.values())

    @property
    def whitens_advantages(self) -> bool:
        return self.estimator.whitens if self.whiten_advantages is None else self.whiten_advantages

    @property
    def microbatches(self) -> Microbatches:
        """How rollouts are cut for a forward pass."""
        return {"microbatch_size": self.microbatch_size, "microbatch_tokens": self.microbatch_tokens}

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
        if self.estimator.compares_samples and self.samples_per_prompt < 2:
            others = " or ".join(one.name for one in ADVANTAGES.values() if not one.compares_samples)
            raise ValueError(
                f"ppo.advantage {self.advantage} compares the samples of a prompt, but samples_per_prompt is "
                f"{self.samples_per_prompt}; set it to 2 or more, or choose {others}"
            )
        if self.dynamic_sampling_rounds > 0 and self.samples_per_prompt < 2:
            raise ValueError(
                "ppo.dynamic_sampling_rounds looks for prompts whose samples score differently, but samples_per_prompt is "
                f"{self.samples_per_prompt}; set it to 2 or more"
            )
        if self.steps_ahead > 0 and self.dynamic_sampling_rounds > 0:
            raise ValueError(
                f"ppo.steps_ahead is {self.steps_ahead} and dynamic_sampling_rounds is {self.dynamic_sampling_rounds}: which "
                "prompts are drawn again depends on scores that are not there when a later step is drawn; set one of them to 0"
            )
        if self.weights_in_flight and self.steps_ahead == 0:
            raise ValueError(
                "ppo.weights_in_flight is true and steps_ahead is 0: nothing is drawn while weights move; set steps_ahead to 1 "
                "or more, or weights_in_flight to false"
            )
        if self.critic_warmup_steps > 0 and not self.has_critic:
            raise ValueError(
                f"ppo.critic_warmup_steps is {self.critic_warmup_steps}, but ppo.advantage {self.advantage} has no critic; "
                "set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _kl_penalty_works(self):
        problem = estimator_problem(self.kl_in, self.kl_estimator)
        problem = problem or controller_problem(self.adaptive_kl, self.kl_coef, self.rollouts_per_step)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _rewards_fit(self):
        problem = shorthand_problem(
            self.rewards, self.reward_function, self.reward_timeout_s, self.reward_timeout_score
        )
        if problem is not None:
            raise ValueError(problem)
        if self.best_by == "judge" and not self.judge_evaluations:
            raise ValueError("ppo.best_by is 'judge' and ppo.judge_evaluations is false; set it to true")
        return self

    @model_validator(mode="after")
    def _trains_one_part(self):
        if self.lora is not None and self.reference is not None:
            raise ValueError(
                f"ppo.lora is set and ppo.reference is '{self.reference}': the policy with its adapter off is the reference, so "
                "that is what PPO starts from; set one of them to null"
            )
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
        if self.reuse_forward and self.num_minibatches > 1:
            raise ValueError(
                f"ppo.reuse_forward is true, but ppo.minibatch_size = {self.minibatch_size} cuts a step's "
                f"{self.rollouts_per_step} rollouts into {self.num_minibatches} minibatches, and all but the first meet a "
                "policy that has moved; set it to false, or minibatch_size to all rollouts"
            )
        if self.microbatch_tokens is None:
            exact_div(self.minibatch_size, self.microbatch_size, "ppo.minibatch_size must divide by microbatch_size")
        return self

"""The whole recipe, the sections that only it has, and what its sections must agree on."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rlhf_ray.config.base import Section, exact_div, option
from rlhf_ray.config.data import DataConfig, ModelConfig
from rlhf_ray.config.generation import GenerationConfig
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.stages import DpoConfig, LoraConfig, RewardConfig, SftConfig, TrainConfig


class EvaluationConfig(Section):
    """SFT model against PPO model on held-out prompts."""

    prompts: int = option(256, "held-out prompts", gt=0)
    samples: int = option(12, "sample pairs shown in the report", gt=0)
    seeds: tuple[int, ...] = option((0,), "sampling seeds; every prompt is drawn once for each")
    bootstrap: int = option(2000, "resamples of the 95 % intervals", gt=0)
    judge_function: str | None = option(
        None, "package.module:function(prompts, responses) -> scores: the known true utility; may ask for columns, too"
    )
    trait_function: str | None = option(
        None,
        "package.module:function(prompts, responses) -> {trait: scores}, higher is better: figures of each model beside its scores",
    )
    max_kl: float | None = option(
        None, "cap on the KL to the SFT model, nats per response; above it the result counts as failed", gt=0
    )
    judge_positive_above: float | None = option(
        None, "raw judge score above which a response counts as positive (judge_positive)"
    )


class RoleConfig(Section):
    """How many Ray actors a role has and what each reserves."""

    actors: int = option(1, "Ray actors of this role", gt=0)
    cpus: float = option(0.3, "CPUs reserved for each", ge=0)
    gpus: float = option(0.0, "GPUs reserved for each", ge=0)
    threads: int | None = option(
        None,
        "torch threads of each, on which bits depend; null: a share of the node's cores, kept in the run's recipe.yaml",
        gt=0,
    )


class GroupConfig(RoleConfig):
    """A DeepSpeed group: `actors` is its number of ranks."""

    zero_stage: Literal[0, 1, 2, 3] = option(0, "DeepSpeed ZeRO stage")


class ResourcesConfig(Section):
    """Placement of the PPO roles; the defaults fit on two cores."""

    generation: RoleConfig = option(RoleConfig(), "generation actors")
    reward: RoleConfig = option(RoleConfig(), "reward actors")
    reference: RoleConfig = option(RoleConfig(), "reference actors")
    policy: GroupConfig = option(GroupConfig(), "policy ranks")
    critic: GroupConfig = option(GroupConfig(), "critic ranks")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = option("PACK", "Ray placement-group strategy")
    weight_transport: Literal["auto", "object_store", "collective", "ipc"] = option(
        "auto",
        "how new weights reach the generation actors: through Ray's object store; by one broadcast, each on a GPU of its own (or "
        "all on CPUs); as handles of one GPU's memory, which policy and generation share; auto: the latter two where GPUs allow",
    )
    start_timeout_s: float = option(300.0, "longest wait for actors or workers to start", gt=0)
    call_timeout_s: float = option(
        1800.0, "longest wait for any one call to an actor, and for a step of a supervised stage", gt=0
    )


class TrackingConfig(Section):
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = option(True, "write TensorBoard event files")
    wandb: str | None = option(None, "Weights & Biases project (needs the extra 'wandb')")
    mlflow: str | None = option(None, "MLflow experiment (needs the extra 'mlflow')")


class Recipe(Section):
    """One run from data to evaluated model."""

    name: str = option(..., "names the run folder runs/<name>", pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = option(0, "every random draw follows from it", ge=0)
    model: ModelConfig = option(ModelConfig(), "the language model")
    data: DataConfig = option(DataConfig(), "the data")
    sft: SftConfig | None = option(SftConfig(), "supervised fine-tuning; null: start from the model as it is")
    reward: RewardConfig | None = option(RewardConfig(), "reward model; null where PPO's reward comes from elsewhere")
    judge: RewardConfig | None = option(None, "independent judge, trained on data.judge")
    fluency: SftConfig | None = option(None, "separately seeded language model for perplexity_independent")
    dpo: DpoConfig | None = option(None, "DPO on the reward model's pairs, to compare with PPO")
    generation: GenerationConfig = option(GenerationConfig(), "sampling")
    ppo: PPOConfig = option(PPOConfig(), "PPO")
    evaluation: EvaluationConfig = option(EvaluationConfig(), "final evaluation")
    resources: ResourcesConfig = option(ResourcesConfig(), "actors and placement")
    tracking: TrackingConfig = option(TrackingConfig(), "metric back-ends")

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
    def _ranks_share_batches(self):
        ppo = self.ppo
        for role, ranks in (("policy", self.resources.policy.actors), ("critic", self.resources.critic.actors)):
            per_rank = exact_div(
                ppo.minibatch_size, ranks, f"ppo.minibatch_size must divide by resources.{role}.actors"
            )
            if ppo.microbatch_tokens is None:
                exact_div(
                    per_rank,
                    min(ppo.microbatch_size, per_rank),
                    f"ppo.minibatch_size / resources.{role}.actors must divide by ppo.microbatch_size",
                )
            group = getattr(self.resources, role)
            if ppo.reuse_forward and ranks > 1:
                raise ValueError(
                    f"ppo.reuse_forward is true, but resources.{role}.actors = {ranks}, and ranks score other rollouts than "
                    "they train on; set it to false, or actors to 1"
                )
            if ppo.reuse_forward and group.zero_stage == 3:
                raise ValueError(
                    f"ppo.reuse_forward is true, but resources.{role}.zero_stage is 3, whose backward pass has to follow its "
                    "forward pass; set it to false, or zero_stage to 2 or less"
                )
            if group.zero_stage == 3 and ranks > 1:
                # Every forward gathers from all ranks: chunks of unlike size would leave one of them waiting.
                exact_div(
                    ppo.rollouts_per_step,
                    min(self.generation.chunk_size, ppo.rollouts_per_step),
                    f"resources.{role}.zero_stage is 3, so rollouts a step must divide by generation.chunk_size",
                )
        return self

    @model_validator(mode="after")
    def _weights_can_travel_so(self):
        way, gpus = self.resources.weight_transport, (self.resources.policy.gpus, self.resources.generation.gpus)
        if way in ("collective", "ipc") and self.ppo.steps_ahead > 0:
            raise ValueError(
                f"resources.weight_transport is {way} and ppo.steps_ahead is {self.ppo.steps_ahead}: generators take weights when "
                "they have drawn what they were asked for, and the policy would wait for them; set it to object_store or auto"
            )
        if way == "ipc" and not all(0 < share < 1 for share in gpus):
            raise ValueError(
                f"resources.weight_transport is ipc, for policy and generation on one GPU, but policy.gpus is {gpus[0]:g} and "
                f"generation.gpus is {gpus[1]:g}; give each a share of one (below 1), or set it to auto"
            )
        if way == "collective" and (gpus[0] > 0) != (gpus[1] > 0):
            raise ValueError(
                f"resources.weight_transport is collective, but policy.gpus is {gpus[0]:g} and generation.gpus is {gpus[1]:g}: "
                "one broadcast reaches either GPUs or CPUs; set it to auto"
            )
        return self

    @model_validator(mode="after")
    def _something_scores(self):
        ppo = self.ppo
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
        threshold = self.evaluation.judge_positive_above
        if threshold is not None and self.judge is not None and self.judge.members > 1:
            raise ValueError(
                f"evaluation.judge_positive_above = {threshold:g} is on the scale of one judge's raw scores, but "
                f"judge.members is {self.judge.members}; set judge.members to 1, or judge_positive_above to null"
            )
        return self

    @model_validator(mode="after")
    def _stages_have_what_they_need(self):
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
        return self

    @model_validator(mode="after")
    def _a_sequence_fits_the_token_budget(self):
        longest, budget = self.data.max_prompt_tokens + self.generation.max_new_tokens, self.ppo.microbatch_tokens
        if budget is not None and budget < longest:
            raise ValueError(
                f"ppo.microbatch_tokens = {budget} does not hold one sequence, which may have {longest} tokens "
                "(data.max_prompt_tokens + generation.max_new_tokens); raise it, or set it to null"
            )
        return self

    @model_validator(mode="after")
    def _a_model_from_scratch_fits(self):
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
            if (isinstance(stage, RewardConfig) and stage.base != "model") or (name == "dpo" and self.sft is not None):
                continue  # it starts from a trained model
            for key, is_set, off in (
                ("lora", stage.lora is not None, "null"),
                ("freeze_layers", stage.freeze_layers > 0, 0),
            ):
                if is_set:
                    raise ValueError(
                        f"{name}.{key} is set, but {name} starts from random weights, and those that don't train would "
                        f"stay random; set it to {off}, or name a model in model.name_or_path"
                    )

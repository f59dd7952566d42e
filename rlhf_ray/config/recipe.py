"""The whole recipe, and what its sections must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

from pydantic import ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from rlhf_ray.config.base import SEEDS, Section, exact_div, option
from rlhf_ray.config.data_sections import DataConfig, ModelConfig
from rlhf_ray.config.evaluation_section import EvaluationConfig
from rlhf_ray.config.generation_section import GenerationConfig
from rlhf_ray.config.plugin_sections import details, plugin_section
from rlhf_ray.config.ppo_section import PPOConfig
from rlhf_ray.config.resource_sections import ResourcesConfig, RoleConfig, TrackingConfig, sharing_problem
from rlhf_ray.config.rounds_section import RoundsConfig
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.config.supervised_sections import DpoConfig, LoraConfig, RewardConfig, SftConfig, TrainConfig
from rlhf_ray.config.user_functions import import_plugins

FOLDER_NAME = r"^[A-Za-z0-9._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*$"  # not . or .., which are other folders


class Recipe(Section):
    """One run from data to evaluated model. The section of a plugin's stage stands beside the others."""

    model_config = ConfigDict(extra="allow")  # sections of plugins, which `_plugins_are_known` checks

    name: str = option(..., "names the run folder runs/<name>", pattern=FOLDER_NAME, max_length=200)
    seed: int = option(0, "every random draw follows from it", ge=0, lt=SEEDS)
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
    rounds: RoundsConfig = option(RoundsConfig(), "further rounds of training on votes (`rlhf-ray round`)")
    resources: ResourcesConfig = option(ResourcesConfig(), "actors and placement")
    tracking: TrackingConfig = option(TrackingConfig(), "metric back-ends")
    plugins: tuple[str, ...] = option(
        (), "modules of your own, imported first; they register stages, advantages, rewards, engines, families, figures"
    )

    def section(self, name: str) -> Section | None:
        """The section of a stage; None where the recipe lacks that stage."""
        section = dict(self).get(name)
        assert section is None or isinstance(section, Section), name
        return section

    @property
    def stages(self) -> list[str]:
        """The stages that this recipe has, in order."""
        return [name for name in STAGES if self.section(name) is not None]

    @property
    def trained(self) -> dict[str, TrainConfig]:
        """Stage -> its section, for the supervised stages that this recipe has."""
        sections = {name: self.section(name) for name in self.stages}
        return {name: section for name, section in sections.items() if isinstance(section, TrainConfig)}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """In another process the plugins' stages have to be in its table too."""
        import_plugins(state["__dict__"]["plugins"])
        super().__setstate__(state)

    @property
    def ppo_seed(self) -> int:
        return self.seed if self.ppo.seed is None else self.ppo.seed

    @property
    def ppo_roles(self) -> dict[str, RoleConfig]:
        """Role -> its actors, for the roles that are Ray actors of the PPO stage."""
        names = ("generation", "reward", "reference", "policy", *(("critic",) if self.ppo.has_critic else ()))
        if self.ppo.lora is not None:  # the policy with its adapter off is the reference
            names = tuple(name for name in names if name != "reference")
        return {name: self.resources.roles[name] for name in names}

    def max_length_of(self, stage: str) -> int:
        """Tokens of the longest sequence that a supervised stage trains on: its max_length, or the reward model's."""
        return self.trained[stage].max_length or (self.reward or RewardConfig()).max_length

    @property
    def frozen_layers(self) -> dict[str, int]:
        """Key -> how many blocks of the recipe's model it freezes, for each key that freezes any."""
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
        return {
            name: stage for name, stage in self.trained.items()
            if not isinstance(stage, RewardConfig) or stage.starts_within_run
        }  # fmt: skip

    @model_validator(mode="wrap")
    @classmethod
    def _plugins_are_known(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Import the plugins, and validate the sections of their stages, which are not fields."""
        if not isinstance(values, dict):
            return handler(values)
        given, problems = dict(cast(dict[str, Any], values)), list[InitErrorDetails]()
        listed = given.get("plugins")
        plugins = cast(Sequence[Any], listed) if isinstance(listed, (list, tuple)) else ()
        import_plugins(name for name in plugins if isinstance(name, str))
        for name in [name for name in given if name not in cls.model_fields]:
            try:
                given[name] = plugin_section(name, given[name], has_plugins=bool(plugins))
            except ValidationError as error:
                problems += details(error, (name,))
                del given[name]
        try:
            recipe = handler(given)
        except ValidationError as error:
            raise ValidationError.from_exception_data(cls.__name__, problems + details(error)) from None
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return recipe

    @model_validator(mode="after")
    def _ranks_share_batches(self):
        ppo = self.ppo
        for role, group in (("policy", self.resources.policy), ("critic", self.resources.critic)):
            ranks = group.actors
            per_rank = exact_div(
                ppo.minibatch_size, ranks, f"ppo.minibatch_size must divide by resources.{role}.actors"
            )
            if ppo.microbatch_tokens is None:
                exact_div(
                    per_rank,
                    min(ppo.microbatch_size, per_rank),
                    f"ppo.minibatch_size / resources.{role}.actors must divide by ppo.microbatch_size",
                )
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
                    f"resources.{role}.zero_stage is 3, so rollouts per step must divide by generation.chunk_size",
                )
        return self

    @model_validator(mode="after")
    def _roles_have_gpus_as_they_can(self):
        problem = sharing_problem(self.ppo_roles, self.generation.tensor_parallel)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _weights_can_travel_so(self):
        way, gpus = self.resources.weight_transport, (self.resources.policy.gpus, self.resources.generation.gpus)
        if way == "ipc" and self.ppo.steps_ahead > 0:
            raise ValueError(
                f"resources.weight_transport is ipc and ppo.steps_ahead is {self.ppo.steps_ahead}: generators take weights when "
                "they have drawn what they were asked for, and the policy would wait for them; set it to collective, "
                "object_store or auto"
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
        if self.rounds.decided_by == "judge" and self.judge is None and self.evaluation.judge_function is None:
            raise ValueError(
                "rounds.decided_by is 'judge', but there is no judge; set the section judge or evaluation.judge_function"
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
        for name, stage in self.trained.items():
            if isinstance(stage, RewardConfig) and stage.base == "fluency" and self.fluency is None:
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
            for name, stage in self.trained.items():
                if (stage.max_length or 0) > self.model.from_scratch.positions:
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
            starts_from_sft = self.sft is not None and "sft" in STAGES[name].needs
            if stage.base != "model" if isinstance(stage, RewardConfig) else starts_from_sft:
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

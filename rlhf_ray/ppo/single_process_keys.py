"""Which keys of a recipe `single_process` acts on. It refuses every other key that differs from its default.

A new key of `ppo`, `generation` or `model` is in neither table. So a recipe that sets it is refused, and
tests/test_single_process.py asks for a decision.
"""

from __future__ import annotations

from typing import Any

from rlhf_ray.config import Recipe, Section
from rlhf_ray.errors import UserError

#: Keys that change what a step computes.
ACTS_ON: dict[str, frozenset[str]] = {
    "ppo": frozenset({
        "steps", "seed", "rollout_batch_size", "samples_per_prompt", "minibatch_size", "ppo_epochs",
        "learning_rate", "critic_learning_rate", "anneal", "adam_eps", "max_grad_norm",
        "kl_coef", "reference", "gamma", "gae_lambda", "loss_aggregation",
        "clip_range", "clip_range_high", "dual_clip", "value_clip_range", "vf_coef",
        "whiten_rewards", "whiten_advantages", "missing_eos_penalty", "missing_eos_score", "score_clip", "overlong_buffer",
        "critic_init", "reward_function", "reward_timeout_s", "reward_timeout_score", "rewards",
    }),
    "generation": frozenset({"max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop"}),
    "model": frozenset({"name_or_path"}),
}  # fmt: skip

_MEMORY = "it changes time and memory; the whole batch goes through the models at once here"
_EVALUATIONS = "it is about evaluations between steps, which this page does not make"
_CHECKPOINTS = "it is about checkpoints, which this page does not write"
_CHECKS = "it stops a run whose processes disagree; here there is one process"
_FLOAT32 = "this page computes in float32 throughout, and says so"
_VLLM = "it is about vLLM, which this page does not use"

#: Keys without influence on the weights, each with the reason.
NO_INFLUENCE: dict[str, dict[str, str]] = {
    "ppo": {
        "microbatch_size": _MEMORY, "microbatch_tokens": _MEMORY, "reuse_forward": _MEMORY,
        "gradient_checkpointing": _MEMORY,
        "precision": _FLOAT32, "float32_head": _FLOAT32,
        "accept_weak_reward": "it lets PPO begin, here too, and changes no step",
        "importance_cap": "it counts with importance_correction or steps_ahead only, and both are refused",
        "eval_every": _EVALUATIONS, "eval_prompts": _EVALUATIONS, "judge_evaluations": _EVALUATIONS,
        "best_by": _EVALUATIONS, "patience": _EVALUATIONS, "roll_back": _EVALUATIONS,
        "checkpoint_every": _CHECKPOINTS, "checkpoint_minutes": _CHECKPOINTS, "keep_checkpoints": _CHECKPOINTS,
        "publish_every": _CHECKPOINTS, "publish_share": _CHECKPOINTS,
        "max_mismatch": _CHECKS, "max_mismatch_kl": _CHECKS, "max_first_approx_kl": _CHECKS,
    },
    "generation": {
        "chunk_size": _MEMORY, "precision": _FLOAT32, "max_num_seqs": _VLLM, "tensor_parallel": _VLLM,
    },
    "model": {
        "from_scratch": "the SFT stage has built the model",
        "chat_template": "the data stage has applied it to the prompts",
    },
}  # fmt: skip

#: Sections that this page does not look into, each with the reason. `name` and `seed` are not sections.
OTHER_SECTIONS = {
    "data": "the data stage has prepared the prompts",
    "sft": "the stage has trained the model that PPO starts from",
    "reward": "the stage has trained the reward model; an ensemble of them is read as in a distributed run",
    "judge": _EVALUATIONS,
    "fluency": "it is for the final evaluation",
    "dpo": "it is another way to train a policy, beside PPO",
    "evaluation": "it is for the final evaluation",
    "rounds": "they are runs of their own",
    "resources": "it places actors, and there are none",
    "tracking": "nothing is written",
    "plugins": "what they add counts where one of the keys here names it",
}


def refuse_other_keys(recipe: Recipe) -> None:
    """UserError that names every key that is set and that `single_process` does not act on."""
    sections: dict[str, Section] = {"ppo": recipe.ppo, "generation": recipe.generation, "model": recipe.model}
    refused: dict[str, Any] = {}  # key -> its default
    found: list[str] = []
    for name, section in sections.items():
        for key, value in section:
            default = type(section).model_fields[key].default
            if key not in ACTS_ON[name] and key not in NO_INFLUENCE[name] and value != default:
                refused[f"{name}.{key}"] = default
                found.append(f"{name}.{key} = {_shown(value)}")
    if found:
        defaults = ", ".join(f"{key} to {_shown(default)}" for key, default in refused.items())
        raise UserError(
            f"single_process does not act on {', '.join(found)}; set {defaults}, or run the recipe with rlhf-ray run"
        )


def _shown(value: Any) -> str:
    """A value as the recipe file writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "{...}" if isinstance(value, (Section, dict)) else str(value)

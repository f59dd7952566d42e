"""An estimate of the PPO stage's peak memory, before any of it exists.   Bytes. The supervised stages': `stage_memory`.

Counted are weights, gradients and Adam's moments, what a backward pass keeps, logits, autocast's 16-bit copies of weights, and
the cache of keys and values. Not counted: allocators' slack, rollouts, the object store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.config import GroupConfig, Recipe, RoleConfig
from rlhf_ray.models.size import ModelShape, parameters, shape_of_model, shape_of_other, trained_parameters
from rlhf_ray.tables.engines import ENGINES

GB = 1e9
IMPORTED = 0.44e9  # a process that has imported torch, transformers and DeepSpeed, before its model
FORKED = 0.12e9  # the same as a fork of another process: what the two do not share
#: Bytes kept for the backward pass per token, channel and block, by bytes of the compute dtype: measured on GPT-2's
#: blocks and on gated ones (Llama, Qwen2) without dropout (tests/test_memory.py). Korthikanti et al. 2022 (arXiv
#: 2205.05198, section 4.1) count 34 in 16 bits with dropout's masks.
KEPT = {2: (38, 60), 4: (67, 89)}
KEPT_AT_CHECKPOINTS = 4  # the float32 input of each block
KEPT_AT_THE_END = 10  # the last norm's, whatever the blocks keep
PASSING = 24  # without a backward pass, at any one time: a block's widest tensors in float32


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """Bytes that one actor of a role takes."""

    role: str
    config: RoleConfig
    state: float  # weights, gradients, moments: always there
    work: float  # what a forward or backward pass or a batch of generation adds

    @property
    def model(self) -> float:
        return self.state + self.work


def memory_plan(recipe: Recipe, *, itemsize: int = 4) -> list[RoleMemory]:
    """One row per role of the PPO stage. itemsize: bytes of the dtype that the roles compute in."""
    ppo, generation = recipe.ppo, recipe.generation
    weights, scorers = 4.0 * parameters(recipe), scorer_parameters(recipe)
    trained = trained_by_role(recipe)
    rows = []
    for name, role in recipe.ppo_roles.items():
        state = 4.0 * sum(scorers) if name == "reward" else weights
        its = 4 if name == "generation" and generation.precision == "float32" else itemsize
        if name == "generation":
            on_gpu = role.gpus > 0
            state *= (1 + ENGINES.named(generation.engine).copies[on_gpu]) * (1.0 if on_gpu else its / 4)
            if ppo.lora is not None:
                state += weights  # what merged weights are computed from
        sharded = isinstance(role, GroupConfig) and role.zero_stage == 3
        state += 3.0 * 4 * trained.get(name, 0)
        state = state / role.actors if sharded else state
        if name in trained:
            work = training_bytes(recipe, ranks=role.actors, itemsize=itemsize, head=name == "policy")
        elif name == "generation":
            work = generation_bytes(recipe, itemsize=its)
        elif name == "reward":
            work = scoring_bytes(recipe, itemsize=itemsize, head=False, cast=max(scorers)) if scorers else 0.0
        else:
            work = scoring_bytes(recipe, itemsize=itemsize, head=True, cast=parameters(recipe))
        rows.append(RoleMemory(name, role, state, work))
    return rows


def scorer_parameters(recipe: Recipe) -> list[int]:
    """Of each model that the reward role holds: those of the reward stage, and those from elsewhere."""
    models = {term.model for term in recipe.ppo.terms.values()} - {None}
    own, reward = parameters(recipe), recipe.reward
    found = [own] * reward.members if "reward" in models and reward is not None else []
    for name in models - {"reward"}:
        assert name is not None
        found.append(shape_of_other(recipe, name).parameters or own)  # as large as the policy, as far as is known
    return found


def trained_by_role(recipe: Recipe) -> dict[str, int]:
    """Trained role -> the number of its weights that train."""
    ppo = recipe.ppo
    found = {"policy": trained_parameters(recipe, ppo.lora, ppo.freeze_layers)}
    if ppo.has_critic:
        found["critic"] = trained_parameters(recipe, ppo.critic_lora, ppo.critic_freeze_layers)
    return found


def training_bytes(recipe: Recipe, *, ranks: int, itemsize: int, head: bool) -> float:
    """A forward pass with what it keeps, where every sequence is as long as the recipe allows."""
    ppo, shape = recipe.ppo, shape_of_model(recipe)
    longest = recipe.data.max_prompt_tokens + recipe.generation.max_new_tokens
    if ppo.reuse_forward:
        tokens = ppo.minibatch_size // ranks * longest  # the passes of a whole step wait for their backward
    else:
        tokens = ppo.microbatch_tokens or ppo.microbatch_size * longest
    kept = kept_bytes(shape, tokens=tokens, itemsize=itemsize, checkpointing=ppo.gradient_checkpointing)
    if not head:
        return kept
    logits = tokens * recipe.generation.max_new_tokens / longest * shape.vocabulary * itemsize
    return kept + 2 * logits  # and their gradient


def kept_bytes(shape: ModelShape, *, tokens: int, itemsize: int, checkpointing: bool) -> float:
    """What a forward pass over `tokens` keeps for its backward pass, without logits."""
    block = tokens * shape.width * KEPT[itemsize][shape.gated]
    kept = tokens * shape.width * shape.layers * KEPT_AT_CHECKPOINTS + block if checkpointing else block * shape.layers
    copied = shape.embeddings if checkpointing else shape.parameters
    cast = 2.0 * copied if itemsize == 2 else 0.0  # autocast's copies; those of a block last as long as its activations
    return kept + tokens * shape.width * KEPT_AT_THE_END + cast


def scoring_bytes(recipe: Recipe, *, itemsize: int, head: bool, cast: int) -> float:
    """A forward pass alone. cast: the model's weights, of which autocast keeps copies for as long as the pass lasts."""
    ppo, shape = recipe.ppo, shape_of_model(recipe)
    longest = recipe.data.max_prompt_tokens + recipe.generation.max_new_tokens
    tokens = ppo.microbatch_tokens or ppo.microbatch_size * longest
    logits = tokens * recipe.generation.max_new_tokens / longest * shape.vocabulary * itemsize if head else 0.0
    return tokens * shape.width * PASSING + logits + (2.0 * cast if itemsize == 2 else 0.0)


def generation_bytes(recipe: Recipe, *, itemsize: int) -> float:
    """Keys and values of a chunk of the longest sequences, and a step's logits and their probabilities."""
    shape, rows = shape_of_model(recipe), recipe.generation.chunk_size
    longest = recipe.data.max_prompt_tokens + recipe.generation.max_new_tokens
    return 2.0 * shape.layers * shape.key_value_width * rows * longest * itemsize + 3.0 * 4 * rows * shape.vocabulary


def memory_problems(
    recipe: Recipe,
    *,
    host: float,
    gpus: Sequence[float],
    itemsize: int = 4,
    gpu_itemsize: int = 2,
    forked: bool = False,
) -> list[str]:
    """What does not fit into `host` bytes of memory or into `gpus` (bytes of each), in sentences with the remedy.

    forked: the actors' processes are forks of one (`forking.server_process`).
    """
    problems = []
    on_cpu = [row for row in memory_plan(recipe, itemsize=itemsize) if row.config.gpus == 0]
    everyone = sum(role.actors for role in recipe.ppo_roles.values())
    imported = IMPORTED + everyone * FORKED if forked else everyone * IMPORTED
    needed = imported + sum(row.config.actors * row.model for row in on_cpu)
    if needed > host:
        there = f"this machine has {host / GB:.1f} GB"
        if imported > needed / 2:
            problems.append(
                f"the PPO actors need about {needed / GB:.1f} GB of memory, {there}; most of it is what {everyone} processes take "
                "before they load a model; use fewer actors"
            )
        else:
            problems.append(_too_much(needed, there, on_cpu))
    on_gpu = [row for row in memory_plan(recipe, itemsize=gpu_itemsize) if row.config.gpus > 0]
    needed = sum(row.config.actors * row.model for row in on_gpu)
    if on_gpu and gpus and needed > sum(gpus):
        problems.append(_too_much(needed, f"the {len(gpus)} GPU(s) here have {sum(gpus) / GB:.1f} GB", on_gpu))
    return problems


def _too_much(needed: float, there: str, rows: Sequence[RoleMemory]) -> str:
    largest = max(rows, key=lambda row: row.config.actors * row.model)
    of_it = f"the PPO actors need about {needed / GB:.1f} GB of memory, {there}; most of it is the {largest.role}'s: "
    if largest.work <= largest.state:
        return (
            f"{of_it}{largest.state / GB:.1f} GB of weights per actor; use a smaller model, fewer actors, or a cluster"
        )
    remedy = {
        "generation": "lower generation.chunk_size or generation.max_new_tokens",
        "policy": "lower ppo.microbatch_size, or set ppo.gradient_checkpointing to true and ppo.reuse_forward to false",
    }
    remedy["critic"] = remedy["policy"]
    return f"{of_it}{largest.work / GB:.1f} GB for a batch; {remedy.get(largest.role, 'lower ppo.microbatch_size')}"

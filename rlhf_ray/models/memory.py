"""An estimate of the PPO stage's peak memory, before any of it exists.   Bytes. The supervised stages': `stage_memory`.

Counted are weights, gradients and Adam's moments, what a backward pass keeps, logits, autocast's 16-bit copies of weights, the
cache of keys and values, and the sets of tokens that truncated sampling draws among (`support_tokens`). Not counted: allocators'
slack, the rest of the rollouts, the object store.
"""

from __future__ import annotations

import math
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
SUPPORT_ID, SUPPORT_TOKEN = 4, 8  # of `messages.Support`: a kept token's id; a response token's count and log mass
SUPPORT_PLACE = 16  # place and id of a kept token, in int64, as a forward pass takes them


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


def memory_plan(recipe: Recipe, *, itemsize: int = 4, support: int | None = None) -> list[RoleMemory]:
    """One row per role of the PPO stage. itemsize: bytes of the dtype that the roles compute in. support: tokens that each token
    is drawn among; None: the most that there can be (`support_tokens`)."""
    ppo, generation = recipe.ppo, recipe.generation
    support = support_tokens(recipe) if support is None else support
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
        if name == "generation":  # each row's own sets, and the chunk's together
            work += 2.0 * support_bytes(generation.chunk_size * generation.max_new_tokens, support)
        elif name in ("policy", "reference"):
            work += support_mask_bytes(
                recipe, support, tokens=pass_tokens(recipe, ranks=role.actors if name == "policy" else None)
            )
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
    shape, tokens = shape_of_model(recipe), pass_tokens(recipe, ranks=ranks)
    kept = kept_bytes(shape, tokens=tokens, itemsize=itemsize, checkpointing=recipe.ppo.gradient_checkpointing)
    if not head:
        return kept
    return kept + 2 * _response_share(recipe) * tokens * shape.vocabulary * itemsize  # logits and their gradient


def pass_tokens(recipe: Recipe, *, ranks: int | None = None) -> int:
    """Tokens of a forward pass over the longest rows. ranks: of a role that trains, whose passes may wait for their backward."""
    ppo, longest = recipe.ppo, _longest(recipe)
    if ppo.reuse_forward and ranks is not None:
        return ppo.minibatch_size // ranks * longest  # a whole step
    return ppo.microbatch_tokens or ppo.microbatch_size * longest


def _longest(recipe: Recipe) -> int:
    return recipe.data.max_prompt_tokens + recipe.generation.max_new_tokens


def _response_share(recipe: Recipe) -> float:
    """Of the tokens of the longest sequence; logits are computed of these only."""
    return recipe.generation.max_new_tokens / _longest(recipe)


def kept_bytes(shape: ModelShape, *, tokens: int, itemsize: int, checkpointing: bool) -> float:
    """What a forward pass over `tokens` keeps for its backward pass, without logits."""
    block = tokens * shape.width * KEPT[itemsize][shape.gated]
    kept = tokens * shape.width * shape.layers * KEPT_AT_CHECKPOINTS + block if checkpointing else block * shape.layers
    copied = shape.embeddings if checkpointing else shape.parameters
    cast = 2.0 * copied if itemsize == 2 else 0.0  # autocast's copies; those of a block last as long as its activations
    return kept + tokens * shape.width * KEPT_AT_THE_END + cast


def scoring_bytes(recipe: Recipe, *, itemsize: int, head: bool, cast: int) -> float:
    """A forward pass alone. cast: the model's weights, of which autocast keeps copies for as long as the pass lasts."""
    shape, tokens = shape_of_model(recipe), pass_tokens(recipe)
    logits = _response_share(recipe) * tokens * shape.vocabulary * itemsize if head else 0.0
    return tokens * shape.width * PASSING + logits + (2.0 * cast if itemsize == 2 else 0.0)


def generation_bytes(recipe: Recipe, *, itemsize: int) -> float:
    """Keys and values of a chunk of the longest sequences, and a step's logits and their probabilities."""
    shape, rows = shape_of_model(recipe), recipe.generation.chunk_size
    return (
        2.0 * shape.layers * shape.key_value_width * rows * _longest(recipe) * itemsize
        + 3.0 * 4 * rows * shape.vocabulary
    )


def support_tokens(recipe: Recipe) -> int:
    """Tokens that a response's token is drawn among, at most, where sampling drops others; 0: all, and nobody notes them.

    Assumed is a model that finds all V tokens as good as equally likely: top_k keeps k of them, top_p that share of what top_k
    left, and min_p drops none. Trained models keep far fewer under top_p and min_p. Tokens that tie with the last one kept
    are kept, too; those are not counted.
    """
    generation, vocabulary = recipe.generation, shape_of_model(recipe).vocabulary
    if not generation.sampling.truncates:
        return 0
    return math.ceil(generation.top_p * min(generation.top_k or vocabulary, vocabulary))


def support_bytes(tokens: int, support: int) -> float:
    """What `messages.Support` takes for this many response tokens, each drawn among `support` others; 0 where that is 0."""
    return float(tokens) * (SUPPORT_ID * support + SUPPORT_TOKEN) if support else 0.0


def support_mask_bytes(recipe: Recipe, support: int, *, tokens: int) -> float:
    """Places and ids of what was kept, and the mask that a forward pass over `tokens` makes of them."""
    return (
        _response_share(recipe) * tokens * (SUPPORT_PLACE * support + shape_of_model(recipe).vocabulary)
        if support
        else 0.0
    )


def support_store_bytes(recipe: Recipe, support: int) -> float:
    """Of a step's supports in the object store, all responses as long as the recipe allows.

    They stand in the rollouts (those of steps ahead, too, and once more where dynamic sampling packs others in their place) and
    in the shards: a rank has a row once, however many epochs train on it.
    """
    ppo = recipe.ppo
    shards = min(recipe.resources.policy.actors, ppo.ppo_epochs)
    packed = ppo.dynamic_sampling_rounds + 1 if ppo.dynamic_sampling_rounds else 0
    a_step = support_bytes(ppo.rollouts_per_step * recipe.generation.max_new_tokens, support)
    return a_step * (1 + ppo.steps_ahead + packed + shards)


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

    forked: the actors' processes are forks of one (`forking.server_process`). Of what truncated sampling keeps, only what top_k
    bounds is held against a recipe: the bound of top_p and min_p is the vocabulary, and trained models are far below it.
    """
    problems = []
    support = support_tokens(recipe) if recipe.generation.top_k else 0
    on_cpu = [row for row in memory_plan(recipe, itemsize=itemsize, support=support) if row.config.gpus == 0]
    everyone = sum(role.actors for role in recipe.ppo_roles.values())
    imported = IMPORTED + everyone * FORKED if forked else everyone * IMPORTED
    kept = 2 * support_store_bytes(recipe, support)  # in the store, and where the experience is joined and cut
    needed = imported + kept + sum(row.config.actors * row.model for row in on_cpu)
    if needed > host:
        there = f"this machine has {host / GB:.1f} GB"
        if kept > needed / 2:
            problems.append(
                f"the PPO actors need about {needed / GB:.1f} GB of memory, {there}; most of it says which tokens each token of a "
                f"response was drawn among, up to {support} of them; lower generation.top_k"
            )
        elif imported > needed / 2:
            problems.append(
                f"the PPO actors need about {needed / GB:.1f} GB of memory, {there}; most of it is what {everyone} processes take "
                "before they load a model; use fewer actors"
            )
        else:
            problems.append(_too_much(needed, there, on_cpu))
    on_gpu = [row for row in memory_plan(recipe, itemsize=gpu_itemsize, support=support) if row.config.gpus > 0]
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

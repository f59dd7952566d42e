"""What is wrong with a recipe's model, found without training: the model part of `rlhf-ray doctor`.

Imports happen where they are needed: transformers takes seconds, and a model from scratch has nothing to look at.
"""

from __future__ import annotations

from rlhf_ray.config import Recipe, RewardConfig
from rlhf_ray.errors import UserError
from rlhf_ray.models.size import shape_of_model


def check_model(recipe: Recipe) -> list[str]:
    """Problems of the model that is tuned: not there, no EOS, sequences longer than its positions, missing layers.
    Loads no weights."""
    model = recipe.model
    found = _base_problems(recipe)
    if model.is_from_scratch:
        scratch = model.from_scratch  # whose sizes are checked when the recipe is read
        split = _split_problems(recipe, scratch.heads, scratch.key_value_heads or scratch.heads)
        return found + _adapter_problems(recipe) + split
    from rlhf_ray.models.hub import look_up
    from rlhf_ray.models.load import load_config
    from rlhf_ray.models.positions import check_positions
    from rlhf_ray.models.tokenizer import load_tokenizer
    from rlhf_ray.models.trained_part import check_freeze

    try:
        look_up(model.name_or_path, where="model.name_or_path")
    except UserError as error:
        return [*found, str(error)]
    problems = found
    try:
        load_tokenizer(model.name_or_path, model.trust_remote_code)
    except UserError as error:
        problems.append(str(error))
    try:
        config = load_config(model.name_or_path, model.trust_remote_code)
    except UserError as error:
        return [*problems, str(error)]
    lengths = {
        "data.max_prompt_tokens + generation.max_new_tokens": recipe.data.max_prompt_tokens
        + recipe.generation.max_new_tokens
    }
    for name, section in recipe.trained.items():
        if not isinstance(section, RewardConfig) or section.starts_within_run:
            lengths[f"{name}.max_length"] = recipe.max_length_of(name)
    for what, longest in lengths.items():
        try:
            check_positions(config, longest, what)
        except UserError as error:
            problems.append(str(error))
    for key, count in recipe.frozen_layers.items():
        try:
            check_freeze(count, config.get_text_config().num_hidden_layers, key)
        except UserError as error:
            problems.append(str(error))
    options = config.get_text_config().to_dict()
    heads = options.get("num_attention_heads") or options.get("n_head") or 1
    split = _split_problems(recipe, heads, options.get("num_key_value_heads") or heads)
    return problems + _adapter_problems(recipe) + split


def _split_problems(recipe: Recipe, heads: int, key_value_heads: int) -> list[str]:
    """Why an engine can't split the model over so many GPUs: each takes whole heads, of keys and values too (or one that several
    have), and as many channels of a feed-forward layer as the others."""
    parts, channels = recipe.generation.tensor_parallel, shape_of_model(recipe).feed_forward

    def fits(count: int) -> bool:
        return heads % count == channels % count == 0 and 0 in (key_value_heads % count, count % key_value_heads)

    if fits(parts):
        return []
    able = [str(count) for count in range(1, parts) if fits(count)]
    return [
        f"generation.tensor_parallel = {parts} can't split a model of {heads} heads, {key_value_heads} of keys and values, and "
        f"feed-forward layers of {channels} channels; set it, and resources.generation.gpus, to {' or '.join(able)}"
    ]


def _base_problems(recipe: Recipe) -> list[str]:
    """Other models, which reward model and judge start from or PPO stays close to, and that are nowhere."""
    bases = {f"{name}.base": section.base for name, section in recipe.trained.items()
             if isinstance(section, RewardConfig) and not section.starts_within_run}  # fmt: skip
    if recipe.ppo.reference is not None:
        bases["ppo.reference"] = recipe.ppo.reference
    if not bases:
        return []
    from rlhf_ray.models.hub import look_up

    problems = []
    for where, base in bases.items():
        try:
            look_up(base, where=where)
        except UserError as error:
            problems.append(str(error))
    return problems


def _adapter_problems(recipe: Recipe) -> list[str]:
    """Named target modules that the recipe's model lacks."""
    named = {key: lora for key, lora in recipe.adapters.items() if lora.target_modules is not None}
    if not named:
        return []
    from rlhf_ray.models.load import empty_causal_lm
    from rlhf_ray.models.trained_part import adapted_layers

    problems = []
    for key, lora in named.items():
        try:
            adapted_layers(empty_causal_lm(recipe.model), lora)
        except UserError as error:
            problems.append(f"{key}.{error}")
    return problems

"""What is wrong with a recipe's data and model, found without training: the data part of `rlhf-ray doctor`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlhf_ray.config import Recipe
from rlhf_ray.data.formats import detect
from rlhf_ray.data.prepare import LISTS, needed_lists, preference_section
from rlhf_ray.data.sources import columns_of, find_builder
from rlhf_ray.errors import UserError
from rlhf_ray.models.load import check_positions, empty_causal_lm, load_config
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.models.trained import adapted_layers, check_freeze


def check_data(recipe: Recipe) -> list[str]:
    """Problems of the recipe's data, one sentence each; [] if none is seen. Reads no more than the first rows.

    A builder is imported and its arguments are matched with its signature; it is not called.
    """
    data, problems = recipe.data, []

    def attempt(check: Callable) -> None:
        try:
            check()
        except UserError as error:
            problems.append(str(error))

    if data.root is not None and not Path(data.root).expanduser().is_dir():
        return [f"data.root = '{data.root}' is not a folder; give the folder that holds the data"]
    needed = needed_lists(recipe)
    given = [role for role in LISTS if getattr(data, role)]
    if data.builder is not None:
        attempt(lambda: find_builder(data, recipe.seed))
        problems += [f"data.builder and data.{role} are both set, the builder stands in place of lists; remove one"
                     for role in given]  # fmt: skip
        return problems
    problems += [f"'{section}' is set and data.{role} is empty; give it rows, or set {section}: null"
                 for role, section in needed.items() if role not in given]  # fmt: skip
    if "sft" not in needed and "preferences" not in given and "prompts" not in given:
        problems.append(
            "data.prompts is empty and there is no other data to take prompts from; list a source of prompts"
        )
    for role in given:
        if role not in needed and not role.endswith("prompts") and not (role == "preferences" and not data.prompts):
            continue  # prepare does not read it either
        form = _form(recipe, role)
        for index, source in enumerate(getattr(data, role)):
            where = f"data.{role}[{index}]"

            def columns_fit(source=source, where=where, form=form) -> None:
                columns = columns_of(source, data.root, where)
                if columns is not None:
                    detect(columns, source.columns, form, where)

            attempt(columns_fit)
        weights = [source.weight for source in getattr(data, role)]
        if None in weights and any(weight is not None for weight in weights):
            problems.append(f"some of data.{role} have a weight and some have none; give all of them one, or none")
    return problems


def check_model(recipe: Recipe) -> list[str]:
    """Problems of the model that is tuned: not there, no EOS, sequences longer than its positions, layers that it has not.
    Loads no weights."""
    model = recipe.model
    if model.is_from_scratch:
        return _adapter_problems(recipe)  # its sizes are checked when the recipe is read
    problems = []
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
    if recipe.dpo is not None:
        lengths["dpo.max_length"] = recipe.dpo_max_length
    for name in ("sft", "fluency", "reward", "judge"):
        section = getattr(recipe, name)
        if section is not None and (name not in ("reward", "judge") or section.starts_within_run):
            lengths[f"{name}.max_length"] = section.max_length
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
    return problems + _adapter_problems(recipe)


def _adapter_problems(recipe: Recipe) -> list[str]:
    """Named target modules that the recipe's model has not."""
    problems = []
    for key, lora in recipe.adapters.items():
        if lora.target_modules is None:
            continue
        try:
            adapted_layers(empty_causal_lm(recipe.model), lora)
        except UserError as error:
            problems.append(f"{key}.{error}")
    return problems


def _form(recipe: Recipe, role: str) -> str:
    section = preference_section(recipe, role)
    if section is not None:
        return section.objective
    return "sft" if role == "sft" else "prompts"

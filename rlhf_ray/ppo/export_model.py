"""`rlhf-ray export`: a Hugging Face folder from a run folder, a PPO checkpoint or a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from rlhf_ray.config import Recipe
from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.config.stage_table import model_names
from rlhf_ray.errors import UserError, whole_message
from rlhf_ray.models.target import refuse_taken
from rlhf_ray.runs.run_folder import RunFolder, start_model

if TYPE_CHECKING:
    import torch


def export_model(source: Path, target: Path, stage: str, dtype: str, push_to_hub: str | None) -> Path:
    """Write `target`; returns it. Raises UserError where the source holds no model or the target is taken."""
    import torch

    from rlhf_ray.models.card import model_card
    from rlhf_ray.models.load import load_causal_lm, load_config, load_reward_model
    from rlhf_ray.models.save import save_model
    from rlhf_ray.models.tokenizer import load_tokenizer
    from rlhf_ray.models.trained_part import load_trained
    from rlhf_ray.ppo.checkpoint import read_state

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise UserError(f"--dtype {dtype!r} is neither float32 nor bfloat16")
    refuse_taken(target)
    if (source / "state.json").exists():
        recipe, start = _checkpoint_start(source.absolute())
        trust = recipe.model.trust_remote_code
        model, tokenizer = load_causal_lm(start, None, trust), load_tokenizer(start, trust)
        ppo = recipe.ppo
        load_trained(model, _checkpoint_weights(source), lora=ppo.lora, freeze_layers=ppo.freeze_layers)
        model.config.response_stops = list(recipe.generation.stop)  # as the PPO stage writes it
        card = model_card(recipe, "ppo", {"steps": read_state(source)["step"]})
    else:
        folder = _model_folder(source.absolute(), stage)
        is_reward = any("SequenceClassification" in name for name in load_config(folder).architectures or [])
        model, tokenizer = (load_reward_model if is_reward else load_causal_lm)(folder), load_tokenizer(folder)
        own = folder / "README.md"
        card = own.read_text() if own.exists() else f"Exported from {source.name}.\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rmdir()
    cast(torch.nn.Module, model).to(dtypes[dtype])  # transformers' own annotation of `to` has lost its `self`
    save_model(model, tokenizer, target, card)
    if push_to_hub is not None:
        _push(target, push_to_hub)
    return target


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage] - the HTTP library changes from version to version
    )

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True, private=True)
        api.upload_folder(folder_path=str(folder), repo_id=repository)
    except (HTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"can't upload to '{repository}' ({whole_message(error)}); the folder {folder} is written; "
            "check the name, the network and `hf auth login`"
        ) from error


def _model_folder(source: Path, stage: str) -> Path:
    """Where the config, the tokenizer and the weights are."""
    if (source / "config.json").exists():
        return source
    run = RunFolder(source)
    if run.recipe.exists():
        load_recipe(str(run.recipe))  # imports its plugins, which may have stages
    folders = {name: run.best_model if name == "best" else run.stage(name).model for name in model_names()}
    if stage not in folders:
        raise UserError(f"--stage {stage!r} is none of {', '.join(folders)}")
    if not (folders[stage] / "config.json").exists():
        there = [name for name, folder in folders.items() if (folder / "config.json").exists()]
        raise UserError(
            f"{source} holds no model of '{stage}'"
            + (f"; it has {', '.join(there)}" if there else "; name a run folder, a PPO checkpoint or a model folder")
        )
    return folders[stage]


def _checkpoint_start(checkpoint: Path) -> tuple[Recipe, str]:
    """The recipe of the run that wrote RUN/ppo/checkpoints/step_..., and the model whose shape and tokenizer it has."""
    run = RunFolder(checkpoint.parents[2])
    if not run.recipe.exists():
        raise UserError(
            f"{run.recipe} is not there, and a checkpoint has no config and tokenizer of its own; "
            "export from inside its run folder"
        )
    recipe = load_recipe(str(run.recipe))
    return recipe, start_model(recipe, run)


def _checkpoint_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    from rlhf_ray.models.trained_part import plain_name
    from rlhf_ray.ppo.checkpoint import read_role

    state, _ = read_role(checkpoint, "policy")
    weights = {name.removeprefix("weight/"): tensor for name, tensor in state.items() if name.startswith("weight/")}
    return {plain_name(name): tensor for name, tensor in weights.items()}

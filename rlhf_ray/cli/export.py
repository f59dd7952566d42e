"""`rlhf-ray export`: a Hugging Face folder from a run folder, a PPO checkpoint or a model folder."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.errors import UserError
from rlhf_ray.run_folder import RunFolder


def export_model(source: Path, target: Path, stage: str, dtype: str, push_to_hub: str | None) -> Path:
    """Write `target`; returns it. Raises UserError where the source holds no model or the target is taken."""
    import torch

    from rlhf_ray.models.load import load_causal_lm, load_config, load_reward_model, save_model
    from rlhf_ray.models.tokenizer import load_tokenizer
    from rlhf_ray.models.wire import load_named

    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype!r} is neither float32 nor bfloat16")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} exists and is not empty; choose another folder")
    folder, weights = _model_folder(source.absolute(), stage), None
    if (source / "state.json").exists():
        weights = _checkpoint_weights(source)
    is_reward = any("SequenceClassification" in name for name in load_config(folder).architectures or [])
    model = (load_reward_model if is_reward else load_causal_lm)(folder)
    if weights is not None:
        load_named(model, weights)
    tokenizer = load_tokenizer(folder)
    card = (folder / "README.md").read_text() if (folder / "README.md").exists() else f"Exported from {source.name}.\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rmdir()
    save_model(model.to(getattr(torch, dtype)), tokenizer, target, card)
    if push_to_hub is not None:
        _push(target, push_to_hub)
    return target


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from requests.exceptions import RequestException

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True, private=True)
        api.upload_folder(folder_path=str(folder), repo_id=repository)
    except (HfHubHTTPError, RequestException, OSError) as error:
        raise UserError(
            f"can't upload to '{repository}' ({str(error).splitlines()[0]}); the folder {folder} is written; "
            "check the name, the network and `hf auth login`"
        ) from error


def _model_folder(source: Path, stage: str) -> Path:
    """Where the config, the tokenizer and (but for a checkpoint) the weights are."""
    if (source / "config.json").exists():
        return source
    if (source / "state.json").exists():  # RUN/ppo/checkpoints/step_...: the shape is the SFT model's
        run = RunFolder(source.parents[2])
        folder = run.stage("sft").model
        if not folder.exists():
            raise UserError(
                f"{folder} is not there, and a checkpoint's weights need its config and tokenizer; "
                "export from inside its run folder"
            )
        return folder
    run = RunFolder(source)
    folders = {"best": run.best_model} | {
        name: run.stage(name).model for name in ("ppo", "sft", "fluency", "reward", "judge")
    }
    if stage not in folders:
        raise UserError(f"--stage {stage!r} is none of {', '.join(folders)}")
    if not (folders[stage] / "config.json").exists():
        there = [name for name, folder in folders.items() if (folder / "config.json").exists()]
        raise UserError(
            f"{source} holds no model of '{stage}'"
            + (f"; it has {', '.join(there)}" if there else "; name a run folder, a PPO checkpoint or a model folder")
        )
    return folders[stage]


def _checkpoint_weights(checkpoint: Path) -> dict:
    from rlhf_ray.checkpoint import read_role

    state, _ = read_role(checkpoint, "policy")
    return {name.removeprefix("weight/model."): tensor for name, tensor in state.items() if name.startswith("weight/")}

"""Which folder to serve: a Hugging Face model folder, or the policy of a run folder or a results folder."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_ray.config.stage_table import policies
from rlhf_ray.config.user_paths import expanded
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder

# In a results folder, which has no fixed layout, the first of these that holds a language model is served.
_OTHER_NAMES = ("policy", "model")


def find_model(path: str | Path) -> Path:
    """The absolute model folder that `path` stands for. UserError if there is none, or it holds no language model."""
    given = expanded(path)
    folder = given.resolve()
    if not folder.is_dir():
        raise UserError(f"'{given}' is not a folder; give a run folder or a Hugging Face model folder")
    if _is_model(folder):
        return _checked(folder)
    run = RunFolder(folder)
    for stage in policies():
        if _is_model(run.stage(stage).model):
            return _checked(run.stage(stage).model)
    found = _language_models_in(folder)
    adapter = next((each for each in (folder, *sorted(folder.iterdir())) if is_adapter(each)), None)
    if not found and adapter is not None:
        raise UserError(
            f"'{given}' holds an adapter and no model; give the model that it is for, and the adapter beside it: "
            f"rlhf-ray serve MODEL --model {folder.name}={adapter}"
        )
    if not found:
        raise UserError(
            f"'{given}' holds no model: neither config.json, nor {', '.join(f'{name}/model' for name in policies())}, nor a "
            "folder with a language model; give a finished run folder or a Hugging Face model folder"
        )
    first, *others = policies()
    named = [name for name in (first, *_OTHER_NAMES, *others) if name in found]
    if named or len(found) == 1:
        return _checked(found[(named or list(found))[0]])
    raise UserError(f"'{given}' holds several models ({', '.join(found)}); give one of these folders")


def model_name(path: str | Path, model: Path) -> str:
    """The id to serve it under: the run folder's name, or the model folder's own."""
    given = expanded(path).resolve()
    if given != model or model.name != "model":
        return given.name
    # RUN/ppo/model, given directly
    return f"{model.parent.parent.name}-{model.parent.name}"


def is_adapter(folder: Path) -> bool:
    """Whether it holds an adapter in peft's format, and no model."""
    return (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file() and not _is_model(folder)


def _language_models_in(folder: Path) -> dict[str, Path]:
    """Name of each sub-folder that is a language model, or whose model/ is one -> that model folder."""
    found = {}
    for child in sorted(folder.iterdir()):
        for candidate in (child, child / "model"):
            if _is_model(candidate) and _is_causal(candidate):
                found.setdefault(child.name, candidate)
    return found


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _architectures(folder: Path) -> list[str]:
    try:
        return json.loads((folder / "config.json").read_text()).get("architectures") or []
    except (ValueError, AttributeError):
        raise UserError(
            f"'{folder / 'config.json'}' is not a model's config; give a Hugging Face model folder"
        ) from None


def _is_causal(folder: Path) -> bool:
    names = _architectures(folder)
    return not names or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _checked(folder: Path) -> Path:
    if not _is_causal(folder):
        raise UserError(
            f"'{folder}' holds a {_architectures(folder)[0]}, which writes no text; give the folder of a language model"
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"'{folder}' holds no safetensors weights; pickled ones are not loaded because they can run code: "
            "convert them with save_pretrained"
        )
    return folder

"""A model and its tokenizer as a Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from rlhf_ray.models.chat_shape import saved_ends
from rlhf_ray.models.finite_weights import refuse_bad


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    card: str,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write a Hugging Face folder (safetensors, config, tokenizer, README.md = `card`), whole or not at all.

    It is written beside `folder`, flushed to disk and renamed; what was there before is replaced. `state_dict`
    overrides the model's own weights (gathered ones, say). generation_config gets every token that ends a response. NotFinite,
    and nothing is written, where a weight is not finite.
    """
    folder = Path(folder)
    buffers = dict(model.named_buffers())  # masks may hold infinities
    weights = (model.state_dict() if state_dict is None else state_dict).items()
    refuse_bad(((name, each) for name, each in weights if name not in buffers), f"the model {folder} is not written")
    if model.can_generate():
        assert model.generation_config is not None
        model.generation_config.eos_token_id = saved_ends(tokenizer, model.generation_config.eos_token_id)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    transformers_logging.disable_progress_bar()
    model.save_pretrained(temporary, state_dict=state_dict)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card)
    mode = (temporary / "README.md").stat().st_mode
    for file in temporary.iterdir():
        file.chmod(mode)  # safetensors makes its files readable by their owner alone, whatever the umask
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder

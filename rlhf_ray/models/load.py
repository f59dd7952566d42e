"""Models: built from random weights, loaded (safetensors only), checked.   D hidden size."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Set
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rlhf_ray.config import FromScratch, ModelConfig
from rlhf_ray.errors import UserError, whole_message
from rlhf_ray.models.activation import fast_activation
from rlhf_ray.models.chat_shape import saved_ends
from rlhf_ray.models.embeddings import fit_embeddings
from rlhf_ray.models.generation_defaults import impossible, mended
from rlhf_ray.models.hub import look_up
from rlhf_ray.models.without_weights import without_weights
from rlhf_ray.tables.families import FAMILIES

SHORT_POSITIONS = 512  # models up to this length use plain attention on CPUs
#: what transformers raises for a folder that is damaged: a config that was edited by hand fails wherever its numbers are used
BROKEN = (
    OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, ImportError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip
ONE_OUTPUT = {"id2label": {0: "reward"}, "label2id": {"reward": 0}}


def scratch_config(cfg: FromScratch, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The Hugging Face config of a model of this architecture and this tokenizer, without dropout."""
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return FAMILIES.named(cfg.architecture).scratch_config(cfg, ids)


def build_causal_lm(cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The recipe's model before any training, in float32: random weights drawn from `seed`, or a loaded model.

    A loaded model gets embedding rows for those of the tokenizer's tokens that it lacks.
    """
    if cfg.is_from_scratch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = scratch_config(cfg.from_scratch, tokenizer)
            model = fast_activation(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    else:
        model = load_causal_lm(cfg.name_or_path, trust_remote_code=cfg.trust_remote_code)
        fit_embeddings(model, tokenizer)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = saved_ends(tokenizer)
    return model


def empty_causal_lm(cfg: ModelConfig) -> PreTrainedModel:
    """The recipe's model without weights, for the names and kinds of its layers."""
    if cfg.is_from_scratch:
        shape = cfg.from_scratch
        config = FAMILIES.named(shape.architecture).scratch_config(shape, {"vocab_size": shape.vocab_size})
    else:
        config = load_config(cfg.name_or_path, cfg.trust_remote_code)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code)
    except BROKEN as error:
        raise UserError(_cannot_load(cfg.name_or_path, error)) from error


def load_causal_lm(
    path: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False, weights: bool = True
) -> PreTrainedModel:
    """Any causal LM from a folder or the hub, in float32 unless `dtype` says otherwise, in eval mode.

    weights=False: without them (`models.without_weights`).
    """
    return _load(AutoModelForCausalLM, path, dtype, trust_remote_code, weights=weights)


def build_reward_model(
    source: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A sequence classifier with one output on the body of a causal LM (a folder, a hub name, or a loaded model).

    The head's weights are N(0, 1/sqrt(D + 1)) from `seed`; no dropout; the PAD id is the tokenizer's, so the score is
    read at the last token that is not PAD: EOS.
    """
    if isinstance(source, PreTrainedModel):
        config = type(source.config).from_dict(source.config.to_dict() | ONE_OUTPUT)
        model = AutoModelForSequenceClassification.from_config(config, dtype=source.dtype)
        model.base_model.load_state_dict(source.base_model.state_dict())
        fast_activation(model).eval()
    else:
        model = _load(
            AutoModelForSequenceClassification, source, None, trust_remote_code, new={"score.weight"}, **ONE_OUTPUT
        )
    fit_embeddings(model, tokenizer)
    head = score_head(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1))
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    disable_dropout(model)
    return model


def load_reward_model(
    path: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False, weights: bool = True
) -> PreTrainedModel:
    """A sequence classifier with one output, from anywhere. Its logits are raw; see `reward_normalisation`."""
    model = _load(AutoModelForSequenceClassification, path, dtype, trust_remote_code, weights=weights)
    if model.config.num_labels != 1:
        raise UserError(
            f"'{path}' has {model.config.num_labels} outputs, but a reward model has one; "
            "train one with 'rlhf-ray reward', or give a sequence-classification model with num_labels 1"
        )
    return model


def reward_normalisation(config: PretrainedConfig) -> tuple[float, float]:
    """(mean, deviation) of the normalised score (raw - mean) / deviation; (0, 1) for a model trained elsewhere."""
    own = config.to_dict()  # the reward stage adds two keys to its models' configs
    mean, std = own.get("reward_mean"), own.get("reward_std")
    if mean is None and std is None:
        return 0.0, 1.0
    if isinstance(mean, (int, float)) and isinstance(std, (int, float)) and math.isfinite(mean) and 0 < std < math.inf:
        return mean, std
    raise UserError(
        f"the reward model's config.json has reward_mean {mean!r} and reward_std {std!r}, which normalise no score; "
        "take both out, or delete the reward stage's folder to train it again"
    )


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer of a reward model: hidden state [.., D] -> score [.., 1]."""
    head = dict(model.named_children()).get("score")
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__} has no linear layer named 'score' on a causal body (GPT-2, Llama, Qwen2 and most "
            "others have one); choose another base model for the reward model, or set ppo.critic_init: sft"
        )
    return head


def disable_dropout(model: nn.Module) -> None:
    """No dropout, whatever train() says: PPO's ratio is 1 before the first update only without it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("attention_dropout"), float):
            vars(module)["attention_dropout"] = 0.0  # Llama and its relatives keep the probability, not a layer
    if isinstance(model, PreTrainedModel):
        for name, value in model.config.to_dict().items():
            if name.endswith(("pdrop", "dropout")) and isinstance(value, float):
                setattr(model.config, name, 0.0)


def fast_attention(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """Choose the attention that trains faster on `device`; returns the model.

    On CPUs the fused kernel's bfloat16 forward and backward take 1.2-1.3 times as long as plain matrix products up to
    256 tokens (4 layers, width 256). Beyond, its memory counts: it does not grow with the square of the length.
    """
    if torch.device(device).type == "cpu" and model.config.get_text_config().max_position_embeddings <= SHORT_POSITIONS:
        model.set_attn_implementation("eager")
    return model


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head. transformers' annotation says nn.Module."""
    return cast(PreTrainedModel, model.base_model)


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """In place, as if it had been loaded in `dtype`: `to` would cast buffers too, among them the angles of rotary positions."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def to_device(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """`model.to(device)`. transformers' own annotation of `to` has lost its `self`."""
    cast(nn.Module, model).to(device)
    return model


def load_config(path: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """A model's config without its weights."""
    if Path(path).exists():
        return _read_config(str(path), trust_remote_code)
    look_up(path)
    return copy.deepcopy(_hub_config(str(path), trust_remote_code))


@functools.cache
def _hub_config(name: str, trust_remote_code: bool) -> PretrainedConfig:
    """Read once per process: each reading asks the hub whether its file has changed."""
    return _read_config(name, trust_remote_code)


def _read_config(path: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except BROKEN as error:
        raise UserError(_cannot_load(path, error)) from error


def _load(
    auto: Any,  # AutoModelForCausalLM or AutoModelForSequenceClassification
    path: str | Path,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    new: Set[str] = frozenset(),
    weights: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """from_pretrained on safetensors, refusing a checkpoint that leaves weights (other than `new`) random."""
    look_up(path)
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of missing weights; what matters is raised below
    try:
        without = impossible(path)
        if without:  # those that transformers does not take out of a config by itself
            kept = vars(AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code))
            kwargs |= {name: None for name in without if name in kept}
        if not weights:
            config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, **kwargs)
            empty = without_weights(auto, config, trust_remote_code=trust_remote_code, dtype=dtype or torch.float32)
            return fast_activation(empty).eval()
        model, info = auto.from_pretrained(
            str(path), dtype=dtype or torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code,
            output_loading_info=True, generation_config=mended(path), **kwargs,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except BROKEN as error:
        raise UserError(_cannot_load(path, error)) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(set(info["missing_keys"]) - new)
    if missing:
        raise UserError(
            f"'{path}' has no weights for {', '.join(missing[:3])}{' and others' if missing[3:] else ''} of "
            f"{type(model).__name__}, so they would be random; give a folder of that kind of model"
        )
    return fast_activation(model).eval()


def _cannot_load(path: str | Path, error: BaseException) -> str:
    folder = Path(path)
    if folder.is_dir():
        names = {file.name for file in folder.iterdir()}
        if "config.json" in names and not any(name.endswith(".safetensors") for name in names):
            return (
                f"'{path}' holds no safetensors weights ({', '.join(sorted(names)[:6])}); pickled weights are not "
                "loaded because they can run code: convert them with save_pretrained"
            )
    return f"no model could be loaded from '{path}' ({whole_message(error)}); give a Hugging Face folder or hub name"

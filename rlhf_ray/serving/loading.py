"""From a model folder to a running engine."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, cast
from weakref import WeakValueDictionary

import torch

from rlhf_ray.config.user_functions import import_plugins
from rlhf_ray.errors import UserError
from rlhf_ray.generation.engine_protocol import EngineSetting
from rlhf_ray.generation.kv_cache import slot_bytes
from rlhf_ray.models.embeddings import fit_embeddings
from rlhf_ray.models.finite_weights import first_bad
from rlhf_ray.models.load import cast_weights, load_causal_lm, to_device
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.serving.config import EngineOptions, Limits
from rlhf_ray.serving.prompts import PromptReader
from rlhf_ray.serving.runner import EngineRunner
from rlhf_ray.tables.engines import ENGINES
from rlhf_ray.training.precision import resolve_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# One model at a time in a process: transformers changes torch's classes while it loads one.
LOADING = threading.Lock()


class Bases(WeakValueDictionary[str, "PreTrainedModel"]):
    """folder -> a model of it that is in memory, whose weights adapters share"""


def load(
    options: EngineOptions, limits: Limits, bases: Bases | None = None, *, beside: bool = False
) -> tuple[EngineRunner, PromptReader]:
    """Load the model and start its engine. UserError for a folder that holds no usable language model.

    bases: models in memory, for adapters to share. Without it, an adapter is merged into a model of its own.
    beside: while other engines of this process compute. To load a model in 16 bits, transformers changes torch's default dtype
    for all threads, and with it what those engines compute; so it is loaded in 32 bits and cast.
    """
    torch.set_num_threads(options.threads)
    import_plugins(options.plugins)
    entry = ENGINES.named(options.engine)
    if entry.alone:
        _check_alone(options, beside)
    own = options.adapter is not None and (Path(options.adapter) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(cast(str, options.adapter) if own else options.model, options.trust_remote_code)
    dtype = resolve_precision(options.precision, options.device)
    if options.adapter is None:
        model = _whole(options, dtype, beside)
        bad = first_bad(model.named_parameters())
        if bad is not None:
            raise UserError(f"the model {options.model} holds values that are not finite ({bad}); write it again")
        if bases is not None:
            bases.setdefault(options.model, model)
    elif bases is not None:
        model = _adapted(options, dtype, bases, beside)
    else:
        from rlhf_ray.models.low_rank import load_merged  # peft takes a second

        model = load_merged(options.model, options.adapter, dtype, options.trust_remote_code)
    fit_embeddings(model, tokenizer)
    to_device(model, options.device)
    slot = slot_bytes(model)
    engine = entry.serving_engine(
        EngineSetting(
            folder=options.model, model=model, tokenizer=tokenizer, rows=limits.max_rows, device=options.device,
            trust_remote_code=options.trust_remote_code,
            max_cache_tokens=check_cache(limits.max_cache_tokens, model.device, slot) or room_for_cache(model.device, slot),
        )
    )  # fmt: skip
    reader = PromptReader(
        tokenizer=tokenizer, positions=engine.max_length, vocab_size=engine.vocab_size, limits=limits,
        # getattr: the PPO stage adds this key to its models' configs; other models do not have it.
        stops=tuple(getattr(model.config, "response_stops", ())), allow_special_tokens=options.allow_special_tokens,
    )  # fmt: skip
    runner = EngineRunner(engine, max_rows=limits.max_rows, max_waiting_rows=limits.max_waiting_rows)
    runner.precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
    runner.continues = entry.continues
    return runner, reader


def _whole(options: EngineOptions, dtype: torch.dtype, beside: bool) -> PreTrainedModel:
    model = load_causal_lm(options.model, torch.float32 if beside else dtype, options.trust_remote_code)
    return cast_weights(model, dtype)


def _adapted(options: EngineOptions, dtype: torch.dtype, bases: Bases, beside: bool) -> PreTrainedModel:
    """The adapter's model, on weights that are in memory once."""
    from rlhf_ray.models.low_rank import with_adapter  # peft takes a second

    base = bases.get(options.model)
    if base is None:
        base = bases[options.model] = _whole(options, dtype, beside)
    return with_adapter(base, options.model, cast(str, options.adapter))


def _check_alone(options: EngineOptions, beside: bool) -> None:
    """UserError for what one engine of a process can't do."""
    if options.adapter is not None:
        raise UserError(
            f"the engine {options.engine} serves no adapter ({options.adapter}); merge it into its model, or give --engine torch"
        )
    if beside:
        raise UserError(
            f"a replica has one engine {options.engine}, and it serves another version or model; start the server again with this "
            "one, or give --engine torch, which takes versions while it serves"
        )


def check_cache(tokens: int | None, device: torch.device, slot: int) -> int | None:
    """tokens, the server's --max-cache-tokens. UserError where their keys and values, `slot` bytes each, take more than is free."""
    if tokens is not None and tokens * slot > (free := free_memory(device)):
        raise UserError(
            f"--max-cache-tokens {tokens} takes {tokens * slot / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free beside the model; "
            f"lower it to {free // slot} or less"
        )
    return tokens


def room_for_cache(device: torch.device, slot: int) -> int:
    """Tokens whose keys and values, `slot` bytes each, take half of the memory that is free on the device."""
    return free_memory(device) // 2 // slot


def free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of the host's memory that processes can still get, as Linux estimates them; elsewhere all that it has."""
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

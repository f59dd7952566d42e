"""From a model folder to a running engine."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from rlhf_ray.config.user_functions import import_plugins
from rlhf_ray.errors import UserError
from rlhf_ray.generation.engine_protocol import ContinuousEngine, EngineSetting
from rlhf_ray.models.finite_weights import first_bad
from rlhf_ray.models.load import fit_embeddings, load_causal_lm
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.serving.config import EngineOptions, Limits
from rlhf_ray.serving.prompts import PromptReader
from rlhf_ray.serving.runner import EngineRunner
from rlhf_ray.tables.engines import ENGINES
from rlhf_ray.training.precision import resolve_precision


def load(options: EngineOptions, limits: Limits) -> tuple[EngineRunner, PromptReader]:
    """Load the model and start its engine. UserError for a folder that holds no usable language model."""
    torch.set_num_threads(options.threads)
    import_plugins(options.plugins)
    own = options.adapter is not None and (Path(options.adapter) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(cast(str, options.adapter) if own else options.model, options.trust_remote_code)
    dtype = resolve_precision(options.precision, options.device)
    if options.adapter is None:
        model = load_causal_lm(options.model, dtype, options.trust_remote_code)
        bad = first_bad(model.named_parameters())
        if bad is not None:
            raise UserError(f"the model {options.model} holds values that are not finite ({bad}); write it again")
    else:
        from rlhf_ray.models.low_rank import load_merged  # peft takes a second

        model = load_merged(options.model, options.adapter, dtype, options.trust_remote_code)
    fit_embeddings(model, tokenizer)
    # That it is a continuous one is what its entry says.
    engine = cast(
        ContinuousEngine,
        ENGINES.named(options.engine).engine(
            EngineSetting(
                folder=options.model, model=model, tokenizer=tokenizer, rows=limits.max_rows, device=options.device,
                trust_remote_code=options.trust_remote_code,
            )
        ),
    )  # fmt: skip
    reader = PromptReader(
        tokenizer=tokenizer, positions=engine.max_length, vocab_size=engine.vocab_size, limits=limits,
        # getattr: the PPO stage adds this key to its models' configs; other models do not have it.
        stops=tuple(getattr(model.config, "response_stops", ())), allow_special_tokens=options.allow_special_tokens,
    )  # fmt: skip
    return EngineRunner(engine, max_rows=limits.max_rows, max_waiting_rows=limits.max_waiting_rows), reader

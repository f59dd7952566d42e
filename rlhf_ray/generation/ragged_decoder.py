"""Prefill and decode steps of a Hugging Face causal LM over rows of different lengths.   n rows, V vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from rlhf_ray.errors import UserError
from rlhf_ray.generation.acceleration import accelerate
from rlhf_ray.generation.decode_step import decode_step_of
from rlhf_ray.generation.graph_step import GraphStep
from rlhf_ray.generation.kv_cache import PLAIN_LENGTH, RAGGED, RaggedCache, causal_mask, round_up
from rlhf_ray.models.generation_memory import PREFILL_TOKENS
from rlhf_ray.models.last_block import last_feed_forward, only_at
from rlhf_ray.models.positions import positions_of
from rlhf_ray.tables.families import is_tested


class RaggedDecoder:
    """A model, and caches to run it with.

    It takes the model over: evaluation mode, and a decode attention of its own where the model's is sdpa (other callers
    of the same model object still get what sdpa gives).
    graphs: decode steps of known families are CUDA graphs (`generation.graph_step`).
    """

    def __init__(self, model: PreTrainedModel, *, graphs: bool = False):
        self.model = model.eval()
        self.config = model.config.get_text_config(decoder=True)
        self.num_layers, self.max_length = _layers_and_max_length(self.config)
        parameters = inspect.signature(model.forward).parameters
        if "position_ids" not in parameters or "past_key_values" not in parameters:
            raise UserError(
                f"a model of type '{self.config.model_type}' takes no position_ids, so rows of different lengths can't "
                "share a batch; use a model with learned or rotary positions"
            )
        if model.config._attn_implementation not in ("sdpa", "eager", RAGGED):
            raise UserError(
                f"attention '{model.config._attn_implementation}' takes no mask of its own for every row; "
                "load the model with attn_implementation='sdpa'"
            )
        if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
            model.set_attn_implementation(RAGGED)
        self._last_feed_forward = last_feed_forward(model)
        self.additive_mask = model.config._attn_implementation == "eager"
        # `kv_cache.plain_products`: a part of a row's slots would be copied, and masked ones are cheaper.
        on_cpu = model.device.type == "cpu"
        self.reads_all_slots = (on_cpu or graphs) and model.config._attn_implementation == RAGGED
        step = decode_step_of(model) if self.reads_all_slots else None
        self.step = None if step is None else GraphStep(step) if graphs else accelerate(step)
        self.centred = on_cpu and self.reads_all_slots and model.dtype != torch.float32
        self.takes_logits_to_keep = "logits_to_keep" in parameters
        # Any other family than the tested ones is compared with a plain forward pass once.
        if not is_tested(self.config.model_type):
            self._compare_with_plain_forward()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def new_cache(self, most: int | None = None) -> RaggedCache:
        """most: see `RaggedCache`."""
        return RaggedCache(self.num_layers, centred=self.centred, most=most)

    def check_length(self, prompt_length: int, max_new_tokens: int) -> None:
        """UserError if prompt and response together may not fit the model."""
        if self.max_length is not None and prompt_length + max_new_tokens > self.max_length:
            raise UserError(
                f"a prompt of {prompt_length} tokens and max_new_tokens = {max_new_tokens} need "
                f"{prompt_length + max_new_tokens} positions, but the model attends over {self.max_length}; "
                "shorten the prompt or lower max_new_tokens"
            )

    def prefill(self, cache: RaggedCache, first_row: int, prompts: Sequence[np.ndarray]) -> None:
        """Store all but the last token of each prompt in rows first_row... of the cache.

        The last token is fed by the first decode step: every logit then comes from the same call, for the last
        position only. Rows are padded on the right with their last token; what that stores is masked until overwritten.
        Long prompts are read in parts of `PREFILL_TOKENS` over all rows, each after the cache of those before it.
        """
        longest = max(len(ids) for ids in prompts) - 1
        if self.centred:
            longest = max(longest, 1)  # a row's keys need a centre: that of one token is its own
        if longest == 0:
            return
        padded = np.stack([np.pad(ids[:-1], (0, longest + 1 - len(ids)), constant_values=ids[-1]) for ids in prompts])
        lengths = np.array([len(ids) - 1 for ids in prompts])
        nowhere = torch.empty(0, dtype=torch.int64, device=self.device)
        part = max(PREFILL_TOKENS // len(prompts), 1)
        for start in range(0, longest, part):
            end = min(start + part, longest)
            own = torch.from_numpy((lengths - start).clip(1, end - start)).to(self.device)
            cache.begin_prefill(first_row, own, start)
            positions = torch.arange(start, end)[None].expand(len(prompts), -1)
            with only_at(self._last_feed_forward, nowhere):  # keys and values are all that is wanted
                self._forward(cache, torch.from_numpy(padded[:, start:end]), positions, self._prefill_mask(start, end))

    def _prefill_mask(self, start: int, end: int) -> torch.Tensor:
        """What tokens [start, end) see, [1, 1, end - start, end]; `causal_mask` where attention needs no such triangle."""
        short = self.device.type == "cpu" and end <= PLAIN_LENGTH
        if start == 0 and end > 1 and self.model.config._attn_implementation == RAGGED and not short:
            return causal_mask(self.device)
        return torch.ones(end - start, end, dtype=torch.bool, device=self.device).tril(start)[None, None]

    def decode(self, cache: RaggedCache, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Feed tokens [n] at positions [n] of rows [0, n); the logits of what follows, [n, V], valid until the next call."""
        length = round_up(int(positions.max()) + 1)
        cache.reserve(len(tokens), length)
        if self.reads_all_slots:
            cache.shrink(length)
            length = cache.write.slots
        if self.step is not None:
            return self.step(cache, tokens, positions)
        inputs = torch.from_numpy(np.stack([tokens, positions])).to(self.device)
        cache.begin_decode(inputs[1], length)
        mask = (torch.arange(length, device=self.device) <= inputs[1, :, None])[:, None, None]
        return self._forward(cache, inputs[0, :, None], inputs[1, :, None], mask)

    def forget(self) -> None:
        """Give back what steps over a cache leave behind; there may be more of them."""
        if self.step is not None:
            self.step.forget()

    def _forward(self, cache, input_ids, position_ids, mask) -> torch.Tensor:
        if self.additive_mask:
            mask = torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        keep = {"logits_to_keep": 1} if self.takes_logits_to_keep else {}
        return self.model(
            input_ids=input_ids.to(self.device),
            position_ids=position_ids.to(self.device),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **keep,
        ).logits[:, -1]

    @torch.inference_mode()
    def _compare_with_plain_forward(self) -> None:
        """Refuse a family whose logits change when its rows are ragged and cached (positions or masks of its own)."""
        rows = [np.arange(1, 1 + length) % self.vocab_size for length in (2, 6, 9)]
        rows = [ids[: self.max_length] for ids in rows]
        cache = self.new_cache()
        cache.reserve(len(rows), 16)
        self.prefill(cache, 0, [ids[:-1] for ids in rows])
        worst = 0.0
        for back in (2, 1):  # the last two tokens of each row by decode steps
            positions = np.array([len(ids) - back for ids in rows])
            logits = self.decode(cache, np.array([ids[-back] for ids in rows]), positions)
            for ids, cached in zip(rows, logits.float().log_softmax(-1), strict=True):
                plain = self.model(torch.from_numpy(ids[None, : len(ids) - back + 1]).to(self.device), use_cache=False)
                plain = plain.logits[0, -1].float().log_softmax(-1)
                worst = max(worst, float((plain.exp() * (plain - cached).abs()).sum()))
        if not worst < (1e-3 if self.model.dtype == torch.float32 else 0.1):
            raise UserError(
                f"a model of type '{self.config.model_type}' gives other log-probs with this engine's cache than "
                f"without a cache (mean difference {worst:.2g}); use a Llama-, Qwen2- or GPT-2-like model"
            )


def _layers_and_max_length(config) -> tuple[int, int | None]:
    """Cached layers, and the longest sequence that every layer attends over in full (None: no limit)."""
    layer_types, layer_kwargs = get_layer_types_and_kwargs(config)
    positions = positions_of(config)
    limits = [] if positions is None else [positions]
    for layer_type, kwargs in zip(layer_types, layer_kwargs, strict=False):  # shared layers at the end have no cache
        if layer_type not in ("full_attention", "sliding_attention", "chunked_attention"):
            raise UserError(
                f"a model of type '{config.model_type}' has layers of type '{layer_type}', which this engine can't "
                "cache; use a model with full attention"
            )
        # A window as long as the sequence hides nothing from its last token, so up to it the layer is a full one.
        limits += [kwargs["sliding_window"]] if "sliding_window" in kwargs else []
    return len(layer_types), min(limits, default=None)

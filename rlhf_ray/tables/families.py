"""Model families, by the `model_type` of their Hugging Face config. Models of others work too, as any causal LM: what is said
here is what can start from random weights, and which of the faster ways tests have compared with the plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_ray.tables.table import Table, loaded

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rlhf_ray.config import FromScratch


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    name: str  # the config's model_type
    words: str
    #: (the recipe's shape, vocab_size and the ids of BOS, EOS and PAD) -> the config of a model without dropout;
    #: None: no model of it starts from random weights
    config: Callable[[FromScratch, Mapping[str, int | None]], PretrainedConfig] | str | None = None
    tokenizer: Literal["gpt2", "qwen2"] = "gpt2"  # how a tokenizer trained for it splits text into words
    gated: bool = True  # the feed-forward layer has three matrices, not two
    #: its packed lines, cached decoding and cut last block are compared with plain passes by tests; those of other families
    #: are compared when a model is loaded, or go without
    tested: bool = False
    #: its ForSequenceClassification reads the score at one token by its head and does nothing else
    scores_at_one_token: bool = False

    def scratch_config(self, shape: FromScratch, token_ids: Mapping[str, int | None]) -> PretrainedConfig:
        assert self.config is not None, f"{self.name} does not start from random weights"
        return loaded(self.config)(shape, token_ids)


_HERE = "rlhf_ray.models.scratch_configs"
FAMILIES: Table[Family] = Table(
    "a model family",
    Family(
        name="gpt2", words="GPT-2", config=f"{_HERE}:gpt2_config", gated=False, tested=True, scores_at_one_token=True,
    ),
    Family(name="llama", words="Llama", config=f"{_HERE}:llama_config", tested=True, scores_at_one_token=True),
    Family(
        name="qwen2", words="Qwen2", config=f"{_HERE}:qwen2_config", tokenizer="qwen2", tested=True, scores_at_one_token=True,
    ),
    Family(name="qwen3", words="Qwen3", scores_at_one_token=True),
    Family(name="mistral", words="Mistral", scores_at_one_token=True),
)  # fmt: skip


def is_tested(model_type: str) -> bool:
    family = FAMILIES.get(model_type)
    return family is not None and family.tested


def is_gated(model_type: str) -> bool:
    """Of a family that is not here, as most are."""
    family = FAMILIES.get(model_type)
    return family is None or family.gated

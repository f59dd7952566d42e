"""Tokenizers and models of the tests of `rlhf_ray.models`."""

import pytest
import torch

from rlhf_ray.config import FromScratch, ModelConfig
from rlhf_ray.data.tokens import encode_pairs
from rlhf_ray.models.load import build_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import train_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, and the cat sat on the mat. It's 1999! "
FAMILIES = ("gpt2", "llama", "qwen2")


def settings_of(family):
    return ModelConfig(
        from_scratch=FromScratch(architecture=family, layers=2, width=32, heads=4, positions=64, vocab_size=320)
    )


@pytest.fixture(name="family", scope="module", params=FAMILIES)
def built_family(request):
    return request.param


@pytest.fixture(name="tokenizer", scope="module")
def built_tokenizer(family):
    return train_tokenizer([TEXT] * 20, 320, family)


@pytest.fixture(name="folder", scope="module")
def built_folder(family, tokenizer, tmp_path_factory):
    return save_model(
        build_causal_lm(settings_of(family), tokenizer, 3),
        tokenizer,
        tmp_path_factory.mktemp(family) / "model",
        "# card",
    )


@pytest.fixture(name="batch")
def built_batch(tokenizer):
    """Two rows padded on the right, and their lengths."""
    rows = [ids for ids, _ in encode_pairs(tokenizer, ["the quick", "the"], [" brown fox jumps over", " cat"])]
    width = max(map(len, rows))
    return torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]), [
        len(row) for row in rows
    ]

"""Public models' generation_config: what transformers refuses to save is mended when a model is loaded."""

import json

import pytest
import torch
from chat_models import chat_tokenizer
from crossed import crossed
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlhf_ray.config import ModelConfig
from rlhf_ray.models.load import build_causal_lm, build_reward_model, load_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import load_tokenizer

#: what the file says -> what must come of it (None: the value is unset)
CASES = [
    ({"temperature": 0.6}, {"temperature": 0.6, "do_sample": True}),
    ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9, "do_sample": True}),
    ({"top_p": 0.9}, {"top_p": 0.9, "do_sample": True}),
    ({"top_k": 20}, {"top_k": 20, "do_sample": True}),
    ({"min_p": 0.1}, {"min_p": 0.1, "do_sample": True}),
    ({"typical_p": 0.5}, {"typical_p": 0.5, "do_sample": True}),
    ({"epsilon_cutoff": 3e-4}, {"epsilon_cutoff": 3e-4, "do_sample": True}),
    ({"temperature": 0.6, "do_sample": False}, {"temperature": None}),
    ({"temperature": 0.0}, {"temperature": None}),
    ({"num_beams": 4, "temperature": 0.6, "early_stopping": True}, {"num_beams": 4, "early_stopping": True, "temperature": None}),
    ({"early_stopping": True}, {"early_stopping": None}),
    ({"length_penalty": 0.8, "repetition_penalty": 1.1}, {"length_penalty": None, "repetition_penalty": 1.1}),
    ({"num_return_sequences": 3}, {"num_return_sequences": None}),
    ({"num_return_sequences": 3, "temperature": 0.6}, {"num_return_sequences": 3, "temperature": 0.6, "do_sample": True}),
    ({"num_return_sequences": 9, "num_beams": 2}, {"num_return_sequences": None, "num_beams": 2}),
    ({"early_stopping": "soon"}, {"early_stopping": None}),
    ({"max_new_tokens": 0}, {"max_new_tokens": None}),
    ({"cache_implementation": "none of them"}, {"cache_implementation": None}),
    ({"output_scores": True}, {"output_scores": None}),
    ({"pad_token_id": -1}, {}),
    ({"temperature": 0.7, "top_k": 0, "max_length": 200}, {"temperature": 0.7, "max_length": 200, "do_sample": True}),
]
SOUND = [{"temperature": 0.7, "do_sample": True, "top_p": 0.8}, {"num_beams": 3, "early_stopping": True}, {}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = chat_tokenizer("base")
    config = LlamaConfig(vocab_size=len(tokenizer) + 8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=None)  # fmt: skip
    return save_model(LlamaForCausalLM(config), tokenizer, tmp_path_factory.mktemp("models") / "base", "tiny")


def with_defaults(base, values, folder, file="generation_config.json"):
    folder.mkdir()
    for source in base.iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    before = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(before | values))
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    return folder


def saved_again(folder, target):
    """As the stages do: build, save -> what plain transformers reads back."""
    tokenizer = load_tokenizer(folder)
    model = build_causal_lm(ModelConfig(name_or_path=str(folder)), tokenizer, seed=0)
    save_model(model, tokenizer, target, "tiny")
    return AutoModelForCausalLM.from_pretrained(target).generation_config


@crossed(
    "file, values, expected", ["generation_config.json", "config.json"], {json.dumps(each[0]): each for each in CASES}
)
def test_what_transformers_refuses_to_save_is_mended_on_load(base, tmp_path, values, expected, file):
    with pytest.raises(ValueError):
        GenerationConfig(**values).validate(strict=True)
    folder = with_defaults(base, values, tmp_path / "model", file)
    found = saved_again(folder, tmp_path / "again")
    defaults = GenerationConfig()
    for name, value in expected.items():
        assert getattr(found, name) == (getattr(defaults, name) if value is None else value), name
    if "do_sample" not in expected:
        assert not found.do_sample or values.get("do_sample")
    # Every other way to load: a policy, and a reward model on its body.
    assert load_causal_lm(folder).generation_config.validate(strict=True) is None
    save_model(build_reward_model(folder, load_tokenizer(folder), seed=1), load_tokenizer(folder), tmp_path / "reward", "tiny")


@pytest.mark.parametrize("values", SOUND, ids=json.dumps)
def test_what_can_be_saved_stays(base, tmp_path, values):
    folder = with_defaults(base, values, tmp_path / "model")
    expected = AutoModelForCausalLM.from_pretrained(folder).generation_config.to_diff_dict()
    found = saved_again(folder, tmp_path / "again").to_diff_dict()
    for name in values:
        assert found[name] == expected[name] == values[name]

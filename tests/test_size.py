"""Models are counted exactly, without their weights: against what their makers publish."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_recipe

from rlhf_ray.config import FromScratch, LoraConfig, ModelConfig
from rlhf_ray.models.held_weights import held_weights
from rlhf_ray.models.load import empty_causal_lm
from rlhf_ray.models.size import SCRATCH_WEIGHTS, adapter_parameters, parameters, shape_of_model, tensor_shapes

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
# What differs between them: tied embeddings, grouped keys and values, gated feed-forward layers, biases.
PUBLISHED = {
    "gpt2": ({"model_type": "gpt2"}, 124_439_808),
    "Qwen2.5-0.5B": (QWEN | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}, 494_032_768),
    "Qwen2.5-7B": (QWEN | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}, 7_615_616_512),
    "SmolLM2-135M": (LLAMA | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                              "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}, 134_515_008),
    "Llama-3.2-1B": (LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                              "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
                     1_235_814_400),
}  # fmt: skip


def recipe_of(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return tiny_recipe(model={"name_or_path": str(folder)})


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_as_its_makers_say(name, tmp_path):
    config, count = PUBLISHED[name]
    assert parameters(recipe_of(tmp_path, config)) == count


def test_grouped_keys_are_narrower(tmp_path):
    shape = shape_of_model(recipe_of(tmp_path, PUBLISHED["SmolLM2-135M"][0]))
    assert (shape.key_value_width, shape.layers, shape.embeddings) == (3 * 64, 30, 49152 * 576)


@pytest.mark.parametrize("shared", [None, 2, 1])
@pytest.mark.parametrize("architecture", SCRATCH_WEIGHTS)
def test_a_model_from_scratch_is_counted_without_building_it(architecture, shared):
    if architecture == "gpt2":
        shared = None
    scratch = FromScratch(
        architecture=architecture, layers=3, width=96, heads=4, key_value_heads=shared, positions=80, vocab_size=700
    )
    built = empty_causal_lm(ModelConfig(from_scratch=scratch))
    recipe = tiny_recipe(model={"from_scratch": scratch.model_dump()}, data={"max_prompt_tokens": 16})
    assert parameters(recipe) == sum(weight.numel() for weight in built.parameters())
    assert shape_of_model(recipe).key_value_width == 24 * (shared or 4)
    # The last block, the norm after it, and in these families no output layer of its own.
    trained = sum(w.numel() for name, w in built.named_parameters() if any(part in name for part in (".2.", "ln_f", "model.norm")))
    held = held_weights(shape_of_model(recipe), recipe.model, lora=None, freeze_layers=2, language=True, itemsize=4)
    assert held.trained == trained and held.bytes == 4 * parameters(recipe)


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_counts_where_it_is_not_the_embeddings(tied, tmp_path):
    """50 tokens of width 16."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
              "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50, "tie_word_embeddings": tied}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of_model(tiny_recipe(model={"name_or_path": str(tmp_path)}))
    assert (shape.output, shape.head, shape.embeddings) == (0 if tied else 800, 800, 800)
    assert shape.body == 800 + shape.blocks[0] + 16 == shape.parameters - shape.output


def test_adapters_have_a_row_per_input_and_output():
    """GPT-2 of width 32: 32 to 96, 32 to 32, 32 to 128 and 128 to 32, in two blocks, at rank 4."""
    model = tiny_recipe().model
    assert adapter_parameters(model, LoraConfig(rank=4)) == 4 * 2 * (128 + 64 + 160 + 160)
    assert adapter_parameters(model, LoraConfig(rank=4, target_modules=("c_attn",))) == 4 * 2 * 128


def test_a_folder_that_can_not_be_built_is_counted_by_the_headers_of_its_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody_knows"}))
    for number, size in ((1, 10), (2, 7)):
        tensors = {f"w{number}": torch.zeros(size, 3), f"b{number}": torch.zeros(size)}
        save_file(tensors, tmp_path / f"model-{number}.safetensors", metadata={"format": "pt"})
    save_file({"again": torch.zeros(1000)}, tmp_path / "consolidated.safetensors")
    weights = {f"{part}{number}": f"model-{number}.safetensors" for part in "wb" for number in (1, 2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert sorted(tensor_shapes(tmp_path / "model-1.safetensors")) == [[10], [10, 3]]
    assert parameters(tiny_recipe(model={"name_or_path": str(tmp_path)})) == 10 * 4 + 7 * 4


def test_what_is_not_there_has_no_weights(tmp_path):
    assert parameters(tiny_recipe(model={"name_or_path": str(tmp_path / "none")})) == 0


def test_heads_that_groups_can_not_share_are_refused():
    with pytest.raises(ValueError, match="heads must divide by key_value_heads"):
        FromScratch(architecture="llama", heads=4, key_value_heads=3)
    with pytest.raises(ValueError, match="GPT-2 has as many as heads"):
        FromScratch(architecture="gpt2", heads=4, key_value_heads=2)

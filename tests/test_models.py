"""Tokenizers and causal models: built, loaded, refused."""

import os

import pytest
import torch
from built_models import TEXT, built_batch, built_family, built_folder, built_tokenizer, settings_of  # noqa: F401 - fixtures
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from rlhf_ray.data.tokens import encode_pairs
from rlhf_ray.errors import UserError
from rlhf_ray.models.embeddings import fit_embeddings
from rlhf_ray.models.load import build_causal_lm, disable_dropout, load_causal_lm, load_reward_model
from rlhf_ray.models.positions import check_positions, position_ids_of
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import load_tokenizer, same_tokens, train_tokenizer

ODD = "  It's   déjà vu — 你好, 12345\n\n\tthe end "


def test_a_trained_tokenizer_encodes_any_text_and_is_the_same_after_a_reload(tokenizer, folder):
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len(tokenizer) <= 320
    assert tokenizer.decode(tokenizer(ODD).input_ids) == ODD
    # Beside a model's config AutoTokenizer may choose a class of its own: it has to give the same ids.
    for loaded in (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)):
        assert loaded(ODD).input_ids == tokenizer(ODD).input_ids
        assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert len(loaded) == len(tokenizer) and same_tokens(loaded, tokenizer)


def test_same_tokens_tells_tokenizers_apart(tokenizer):
    assert not same_tokens(tokenizer, train_tokenizer(["other words altogether"] * 9, 320))


def test_pad_that_is_eos_is_replaced(tmp_path):
    tokenizer = train_tokenizer([TEXT] * 20, 320)
    before = len(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_special_tokens({})  # PAD as an entry of the vocabulary stays, so the new one takes its place
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id != loaded.eos_token_id
    assert len(loaded) == before  # <|pad|> was there already


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = train_tokenizer([TEXT] * 20, 320)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="nowhere' does not exist"):
        load_tokenizer(tmp_path / "nowhere")


def test_an_added_pad_gets_a_row_where_there_is_none(family, tokenizer, folder):
    model, bigger = load_causal_lm(folder), load_tokenizer(folder)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    assert fit_embeddings(model, bigger) == 0
    bigger.add_special_tokens({"pad_token": "<|another pad|>"})
    assert fit_embeddings(model, bigger) == 1
    after = model(ids).logits
    torch.testing.assert_close(after[..., :-1], before)
    # The new output row is the mean of the others, and logits are linear in it.
    torch.testing.assert_close(after[..., -1], before.mean(-1), atol=1e-5, rtol=0)
    assert model.config.vocab_size == len(bigger) == after.shape[-1]


def test_random_weights_follow_from_the_seed_and_disturb_nobody(family, tokenizer):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one, same, other = (build_causal_lm(settings_of(family), tokenizer, seed).state_dict() for seed in (1, 1, 2))
    assert torch.rand(1) == expected
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(*(s[next(name for name in s if "mlp" in name)] for s in (one, other)))


def test_a_saved_model_is_what_it_was(family, tokenizer, folder, batch):
    built, loaded = build_causal_lm(settings_of(family), tokenizer, 3).eval(), load_causal_lm(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not loaded.training and loaded.dtype == torch.float32
    for model in (loaded, plain):
        assert torch.equal(model(batch[0]).logits, built(batch[0]).logits)
        assert (
            model.config.eos_token_id == tokenizer.eos_token_id and model.config.pad_token_id == tokenizer.pad_token_id
        )
    assert load_causal_lm(folder, torch.bfloat16).dtype == torch.bfloat16
    names = {file.name for file in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert [file.name for file in folder.parent.iterdir()] == ["model"]  # nothing temporary is left


def test_saving_replaces_what_was_there_and_only_when_it_is_whole(tokenizer, folder, tmp_path):
    model, target = load_causal_lm(folder), tmp_path / "model"
    save_model(model, tokenizer, target, "first")
    changed = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    save_model(model, tokenizer, target, "second", state_dict=changed)
    assert (target / "README.md").read_text() == "second"
    assert all(not weight.any() for weight in load_file(target / "model.safetensors").values())
    with pytest.raises(TypeError):
        save_model(model, tokenizer, target, None)  # breaks after the weights are written
    assert (target / "README.md").read_text() == "second" and load_causal_lm(target)


def test_train_mode_draws_nothing_after_disable_dropout():
    configs = [
        GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=50, bos_token_id=0, eos_token_id=0),
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=2, vocab_size=50, attention_dropout=0.5),
    ]  # fmt: skip
    ids = torch.arange(20)[None]
    for config in configs:
        model = AutoModelForCausalLM.from_config(config).train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        disable_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)
        rebuilt = AutoModelForCausalLM.from_config(model.config).train()  # the config says so too
        assert torch.equal(rebuilt(ids).logits, rebuilt(ids).logits)


def test_left_padding_needs_position_ids(family, tokenizer, folder):
    model = load_causal_lm(folder)
    [(ids, _)] = encode_pairs(tokenizer, ["the quick brown fox"], [" jumps"])
    pads = 5
    padded = torch.tensor([[tokenizer.pad_token_id] * pads + ids])
    mask = torch.tensor([[0] * pads + [1] * len(ids)])
    assert position_ids_of(mask).tolist() == [[0] * pads + list(range(len(ids)))]
    with torch.no_grad():
        right = model(torch.tensor([ids])).logits[0, -1]
        with_positions = model(padded, attention_mask=mask, position_ids=position_ids_of(mask)).logits[0, -1]
        without = model(padded, attention_mask=mask, position_ids=torch.arange(padded.shape[1])[None]).logits[0, -1]
    torch.testing.assert_close(with_positions, right, atol=1e-5, rtol=0)
    if family == "gpt2":  # absolute positions; rotary ones hide the mistake
        assert (without - right).abs().max() > 1e-3


class Explosive:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_not_even_opened(tmp_path, folder):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save({"weight": Explosive(tmp_path / "exploded")}, tmp_path / "pytorch_model.bin")
    for load in (load_causal_lm, load_reward_model):
        with pytest.raises(UserError, match="holds no safetensors weights"):
            load(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_weights_that_are_not_there_are_not_made_up(tmp_path, folder):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "mlp" in name)
    save_file(
        {name: weight for name, weight in weights.items() if name != lost},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="has no weights for"):
        load_causal_lm(tmp_path)
    with pytest.raises(UserError, match=r"no weights for score\.weight"):
        load_reward_model(folder)  # a language model is no reward model


def test_a_missing_folder_is_said_in_words(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_causal_lm(tmp_path / "nowhere")


def test_positions(family, tokenizer):
    config = build_causal_lm(settings_of(family), tokenizer, 0).config
    check_positions(config, 64)
    with pytest.raises(UserError, match="= 65 tokens is longer than the model's 64 positions"):
        check_positions(config, 65)

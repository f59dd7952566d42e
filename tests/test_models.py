"""Tokenizers and models of three families: built, saved, loaded, turned into reward models and critics."""

import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
)

from rlhf_ray.config import FromScratch, ModelConfig, Recipe
from rlhf_ray.data.tokens import encode_pairs
from rlhf_ray.errors import UserError
from rlhf_ray.models.activation import PIECE, SigmoidGELU
from rlhf_ray.models.card import model_card
from rlhf_ray.models.critic import Critic, build_critic, critic_from_causal_lm, critic_from_reward_model
from rlhf_ray.models.load import (
    build_causal_lm,
    build_reward_model,
    check_positions,
    disable_dropout,
    fit_embeddings,
    load_causal_lm,
    load_reward_model,
    position_ids_of,
    save_model,
    score_head,
)
from rlhf_ray.models.tokenizer import load_tokenizer, same_tokens, train_tokenizer
from rlhf_ray.models.wire import as_tensor, pack_weights

TEXT = "the quick brown fox jumps over the lazy dog, and the cat sat on the mat. It's 1999! "
ODD = "  It's   déjà vu — 你好, 12345\n\n\tthe end "
FAMILIES = ("gpt2", "llama", "qwen2")


def settings_of(family):
    return ModelConfig(
        from_scratch=FromScratch(architecture=family, layers=2, width=32, heads=4, positions=64, vocab_size=320)
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(family):
    return train_tokenizer([TEXT] * 20, 320, family)


@pytest.fixture(scope="module")
def folder(family, tokenizer, tmp_path_factory):
    return save_model(
        build_causal_lm(settings_of(family), tokenizer, 3),
        tokenizer,
        tmp_path_factory.mktemp(family) / "model",
        "# card",
    )


@pytest.fixture
def batch(tokenizer):
    """Two rows padded on the right, and their lengths."""
    rows = [ids for ids, _ in encode_pairs(tokenizer, ["the quick", "the"], [" brown fox jumps over", " cat"])]
    width = max(map(len, rows))
    return torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]), [
        len(row) for row in rows
    ]


# --- tokenizers -------------------------------------------------------------------------------------------------------


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


# --- causal models ----------------------------------------------------------------------------------------------------


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


# --- what is refused --------------------------------------------------------------------------------------------------


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


# --- reward models ----------------------------------------------------------------------------------------------------


def test_a_reward_model_is_the_body_with_a_small_random_head(family, tokenizer, folder, batch):
    model = build_reward_model(folder, tokenizer, 5)
    from_model = build_reward_model(load_causal_lm(folder), tokenizer, 5)
    body = load_causal_lm(folder).base_model.state_dict()
    for reward in (model, from_model):
        assert all(torch.equal(weight, body[name]) for name, weight in reward.base_model.state_dict().items())
        assert torch.equal(score_head(reward).weight, score_head(model).weight)
        assert reward.config.num_labels == 1 and reward(batch[0]).logits.shape == (2, 1)
    assert not torch.equal(score_head(build_reward_model(folder, tokenizer, 6)).weight, score_head(model).weight)
    heads = torch.cat(
        [score_head(build_reward_model(folder, tokenizer, seed)).weight.detach().flatten() for seed in range(20)]
    )
    # 640 draws of N(0, 1/sqrt(33)): the deviation is known to 3 %.
    assert abs(heads.std().item() * math.sqrt(33) - 1) < 0.1


def test_the_score_is_read_at_eos_whatever_the_padding(tokenizer, folder, batch):
    model = build_reward_model(folder, tokenizer, 5).eval()
    ids, lengths = batch
    with torch.no_grad():
        scores = model(ids).logits[:, 0]
        for row, length, score in zip(ids, lengths, scores, strict=True):
            hidden = model.base_model(row[None, :length]).last_hidden_state[0, -1]
            assert row[length - 1] == tokenizer.eos_token_id
            torch.testing.assert_close(score, score_head(model).weight[0] @ hidden, atol=1e-5, rtol=0)


def test_a_saved_reward_model_gives_raw_logits_anywhere(tokenizer, folder, batch, tmp_path):
    model = build_reward_model(folder, tokenizer, 5)
    model.config.reward_mean, model.config.reward_std = 3.0, 2.0
    save_model(model, tokenizer, tmp_path / "model", "card")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(plain(batch[0]).logits, model.eval()(batch[0]).logits)
    assert (plain.config.reward_mean, plain.config.reward_std) == (3.0, 2.0)
    assert plain.config.pad_token_id == tokenizer.pad_token_id


# --- critics ----------------------------------------------------------------------------------------------------------


def test_a_critic_from_a_reward_model_starts_at_the_normalised_score(tokenizer, folder, batch, tmp_path):
    model = build_reward_model(folder, tokenizer, 5).eval()
    model.config.reward_mean, model.config.reward_std = 0.7, 2.5
    save_model(model, tokenizer, tmp_path / "model", "card")
    ids, lengths = batch
    with torch.no_grad():
        raw = model(ids).logits[:, 0]
        for critic in (build_critic(tmp_path / "model", "reward"), critic_from_reward_model(model)):
            values = critic.eval()(ids)
            assert values.shape == ids.shape and values.dtype == torch.float32
            at_eos = values[torch.arange(2), torch.tensor(lengths) - 1]  # after EOS was read
            torch.testing.assert_close(at_eos, (raw - 0.7) / 2.5, atol=1e-5, rtol=0)


def test_a_critic_from_a_language_model_starts_at_zero(tokenizer, folder, batch):
    for critic in (build_critic(folder, "sft"), critic_from_causal_lm(load_causal_lm(folder))):
        assert not critic(batch[0]).any()


def some_critic(folder, tokenizer) -> Critic:
    return critic_from_reward_model(build_reward_model(folder, tokenizer, 5)).eval()


def test_a_value_knows_the_tokens_up_to_its_index_and_none_after(tokenizer, folder, batch):
    critic, ids = some_critic(folder, tokenizer), batch[0][:1]
    changed = ids.clone()
    changed[0, 3] = 40
    with torch.no_grad():
        before, after = critic(ids)[0], critic(changed)[0]
    torch.testing.assert_close(after[:3], before[:3], atol=1e-6, rtol=0)
    assert (after[3:] != before[3:]).all()


def test_values_do_not_depend_on_the_side_of_the_padding(tokenizer, folder, batch):
    critic, (ids, lengths) = some_critic(folder, tokenizer), batch
    short = ids[1, : lengths[1]]
    pads = ids.shape[1] - lengths[1]
    left = torch.cat([torch.full((pads,), tokenizer.pad_token_id), short])[None]
    mask = (torch.arange(ids.shape[1]) >= pads).long()[None]
    with torch.no_grad():
        alone = critic(short[None])[0]
        torch.testing.assert_close(critic(ids)[1, : lengths[1]], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(critic(left, attention_mask=mask)[0, pads:], alone, atol=1e-5, rtol=0)


def test_the_value_head_is_float32_also_under_autocast(tokenizer, folder, batch):
    critic = some_critic(folder, tokenizer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        values = critic(batch[0])
        hidden = critic.backbone(batch[0]).last_hidden_state.float()
    expected = (hidden.double() @ critic.value_head.weight[0].double() + critic.value_head.bias.double()).float()
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_model_is_and_how_it_did():
    recipe = Recipe(name="mine", seed=7)
    card = model_card(recipe, "reward", {"accuracy": 0.87654, "rows": 500})
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification\n")
    assert "| accuracy | 0.8765 |" in card and "| rows | 500 |" in card and "seed 7" in card
    assert "base_model: org/name" in model_card(Recipe(name="mine", model={"name_or_path": "org/name"}), "ppo", {})


def test_gpt2s_activation_has_the_same_values(tmp_path):
    config = GPT2Config(n_layer=1, n_embd=64, n_head=2, n_positions=16, vocab_size=32, activation_function="gelu_new")
    torch.manual_seed(0)
    slow = GPT2LMHeadModel(config).eval()
    for weight in slow.parameters():
        weight.data *= 10
    slow.save_pretrained(tmp_path)
    fast = load_causal_lm(tmp_path)
    ids = torch.arange(16).expand(40, -1)  # enough numbers for the pieces
    torch.testing.assert_close(fast(ids).logits, slow(ids).logits, atol=1e-3, rtol=1e-5)
    assert isinstance(fast.transformer.h[0].mlp.act, SigmoidGELU)
    assert fast.config.activation_function == "gelu_new", "what is saved says what it was"


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_activation_and_its_gradient_against_the_formula(dtype, atol):
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) and its derivative, in float64; two pieces and a rest."""
    x = torch.linspace(-8, 8, 2 * PIECE + 77, dtype=torch.float64).to(dtype).requires_grad_()
    result = SigmoidGELU()(x)
    result.backward(torch.full_like(x, 0.5))
    y = x.detach().double().requires_grad_()
    expected = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    expected.backward(torch.full_like(y, 0.5))
    assert result.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(result.double(), expected.detach(), atol=atol, rtol=0)
    torch.testing.assert_close(x.grad.double(), y.grad, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype, shares", [(torch.float32, True), (torch.bfloat16, False)])
def test_packed_weights_are_copies_unless_they_may_be_the_live_ones(dtype, shares):
    weight = torch.arange(6.0).reshape(2, 3)
    copied, live = (pack_weights([("w", weight)], 1, dtype, copy=copy)[0]["w"] for copy in (True, False))
    weight += 10
    assert as_tensor(copied).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert as_tensor(live).tolist() == ([[10, 11, 12], [13, 14, 15]] if shares else [[0, 1, 2], [3, 4, 5]])

"""Reward models, critics and the card."""

import math

import pytest
import torch
from built_models import built_batch, built_family, built_folder, built_tokenizer  # noqa: F401 - fixtures
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from rlhf_ray.config import Recipe
from rlhf_ray.models.activation import PIECE, SigmoidGELU
from rlhf_ray.models.card import model_card
from rlhf_ray.models.critic import Critic, build_critic, critic_from_causal_lm, critic_from_reward_model
from rlhf_ray.models.load import build_reward_model, load_causal_lm, score_head
from rlhf_ray.models.save import save_model
from rlhf_ray.models.wire import as_tensor, pack_weights


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

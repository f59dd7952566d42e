"""What PPO maximises: ensembles, weighted sums, reward models of other people, the correlation with length."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny_recipe, write_start
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.algorithms.ensembles import combine_scores, disagreement
from rlhf_ray.algorithms.experience import AdvantageConfig
from rlhf_ray.algorithms.scores import length_correlation, zero_variance_groups
from rlhf_ray.config import FromScratch, ModelConfig
from rlhf_ray.errors import UserError
from rlhf_ray.messages import Chunk, RolloutBatch, Scores, Sequences
from rlhf_ray.models.load import build_causal_lm, build_reward_model
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import load_tokenizer, train_tokenizer
from rlhf_ray.rewards.from_recipe import judge_scorer, reward_scorer
from rlhf_ray.rewards.scorer import EnsembleScorer, RewardScorer, WeightedSum
from rlhf_ray.roles.experience_maker import ExperienceConfig, ExperienceMaker, score_stats
from rlhf_ray.roles.reward import Reward
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.tables.advantages import ADVANTAGES

# -- by hand ----------------------------------------------------------------------------------------------------------

MEMBERS = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]])


def test_three_ways_to_combine_three_members():
    """1, 2, 6: mean 3, lowest 1, deviation sqrt((4 + 1 + 9) / 3). 0, 0, 3: mean 1, lowest 0, deviation sqrt(6 / 3)."""
    apart = [math.sqrt(14 / 3), math.sqrt(2)]
    assert disagreement(MEMBERS).tolist() == pytest.approx(apart)
    assert combine_scores(MEMBERS, combine="mean", std=9.0).tolist() == pytest.approx([3.0, 1.0])
    assert combine_scores(MEMBERS, combine="worst", std=9.0).tolist() == [1.0, 0.0]
    less = combine_scores(MEMBERS, combine="mean_minus_std", std=0.5).tolist()
    assert less == pytest.approx([3.0 - 0.5 * apart[0], 1.0 - 0.5 * apart[1]])
    assert disagreement(MEMBERS[:1]).tolist() == [0.0, 0.0]


def test_a_flat_group_is_one_whose_samples_all_score_the_same():
    scores = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.5, 0.5])
    assert zero_variance_groups(scores, group_size=2).tolist() == [True, False, True]
    assert zero_variance_groups(scores, group_size=3).tolist() == [False, False]


def test_samples_are_alike_if_the_scores_that_the_advantages_see_are():
    """Clipped at 5 the first two are 5 and 5; unended the next two are -1 and -1; 6 tokens of at most 6 with a buffer of 2 cost
    1, so 2 - 1 is the last one's 1, and 1 and 1 of different lengths are not alike."""
    options = AdvantageConfig(
        advantage=ADVANTAGES["grpo"], group_size=2, kl_in_reward=True, kl_estimator="k1", gamma=1.0, gae_lambda=1.0,
        score_clip=5.0, missing_eos_penalty=0.0, missing_eos_score=-1.0, overlong_buffer=2, max_new_tokens=6,
        whiten_rewards=False, whiten_advantages=False,
    )  # fmt: skip
    maker = ExperienceMaker(ExperienceConfig(
        advantages=options, minibatch_size=8, ppo_epochs=1, policy_ranks=1, critic_ranks=0, seed=0
    ))  # fmt: skip
    lengths = [1, 1, 1, 1, 6, 1, 6, 1]
    rollout = RolloutBatch(
        chunk=Chunk(step=0, index=0, prompt_indices=(0, 0, 1, 1, 2, 2, 3, 3), sample_indices=(0, 1) * 4), policy_version=0,
        sequences=Sequences.of([[1]] * 8, [[1] * length for length in lengths]),
        ended=np.array([True, True, False, False, True, True, True, True]), rollout_logprobs=np.zeros(sum(lengths), np.float32),
    )  # fmt: skip
    scores = Scores(total=np.array([7, 9, 0, 3, 2, 1, 1, 1], np.float32))
    assert maker.zero_variance([rollout], [scores]) == [True, True, True, False]


def test_the_correlation_with_length_by_hand():
    """Scores 1, 2, 3, 4 and lengths 2, 1, 5, 4: products of the deviations add up to 5, norms sqrt(5) and sqrt(10)."""
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert length_correlation(scores, torch.tensor([2, 1, 5, 4])) == pytest.approx(5 / math.sqrt(50))
    assert math.isnan(length_correlation(scores, torch.tensor([7, 7, 7, 7])))


def test_scores_are_joined_cut_and_told():
    first = Scores(
        total=np.array([1.0, 2.0], np.float32), terms={"a": np.array([3.0, 5.0], np.float32)},
        disagreement=np.array([0.5, 1.5], np.float32), late=np.array([True, False]),
    )  # fmt: skip
    both = Scores.join([first, first.rows([1])])
    assert both.total.tolist() == [1.0, 2.0, 2.0] and both.late.tolist() == [True, False, False]
    assert score_stats(both, "objective") == pytest.approx(
        {"objective/score/a": 13 / 3, "objective/disagreement": 3.5 / 3, "objective/timeouts": 1.0}
    )
    plain = Scores(total=np.ones(2, np.float32))
    assert score_stats(Scores.join([plain, plain]), "eval") == {} and len(plain.rows([0])) == 1


# -- sums of rewards --------------------------------------------------------------------------------------------------


def letters(prompts, responses):
    return [float(len(response)) for response in responses]


def spaces(prompts, responses):
    return [float(response.count(" ")) for response in responses]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with two reward models: the second is other weights in member_1/, and another scale."""
    recipe = tiny_recipe()
    folder = write_start(recipe, RunFolder(tmp_path_factory.mktemp("rewards")))
    tokenizer = load_tokenizer(folder.stage("sft").model)
    other = build_reward_model(folder.stage("sft").model, tokenizer, seed=7)
    other.config.reward_mean, other.config.reward_std = -0.2, 0.25
    member = folder.stage("reward").member(1)
    member.path.mkdir()
    save_model(other, tokenizer, member.model, "another")
    return folder


PROMPTS, RESPONSES, ENDED = ["please tell", "me about"], [" number 1", " a"], [True, False]


def scorer_of(recipe, folder):
    return reward_scorer(recipe, folder, torch.float32, "cpu")


def test_a_weighted_sum_by_hand(folder):
    """2 * 9 - 3 * 2 and 2 * 2 - 3 * 1."""
    terms = {
        "long": {"function": "test_rewards:letters", "weight": 2.0},
        "gaps": {"function": "test_rewards:spaces", "weight": -3},
    }
    recipe = tiny_recipe(reward=None, ppo={"rewards": terms, "critic_init": "sft"})
    scorer = scorer_of(recipe, folder)
    assert isinstance(scorer, WeightedSum)
    found = scorer.score(PROMPTS, RESPONSES, ENDED)
    assert found.total.tolist() == [12.0, 1.0] and found.total.dtype == np.float32
    assert {name: part.tolist() for name, part in found.terms.items()} == {"long": [9.0, 2.0], "gaps": [2.0, 1.0]}
    assert found.disagreement is None and found.late is None


def test_an_ensemble_and_a_function_together(folder):
    each = [
        RewardScorer(folder.stage("reward").member(number).model).score(PROMPTS, RESPONSES, ENDED).total
        for number in (0, 1)
    ]
    assert abs(each[0] - each[1]).min() > 1e-3, "the case needs models that differ"
    terms = {"model": {"model": "reward", "weight": 0.5}, "gaps": {"function": "test_rewards:spaces", "weight": -1}}
    recipe = tiny_recipe(reward={"members": 2, "combine": "worst"}, ppo={"rewards": terms})
    found = scorer_of(recipe, folder).score(PROMPTS, RESPONSES, ENDED)
    worst = np.minimum(*each)
    np.testing.assert_allclose(found.terms["model"], worst, rtol=1e-6)
    np.testing.assert_allclose(found.total, 0.5 * worst - [2.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(found.disagreement, abs(each[0] - each[1]) / 2, rtol=1e-4)


def test_only_what_is_used_is_loaded(folder, tmp_path):
    """A run folder without a reward model; one model that two terms name is there once."""
    recipe = tiny_recipe(ppo={"reward_function": "test_rewards:letters", "critic_init": "sft"})
    assert scorer_of(recipe, RunFolder(tmp_path)).score(PROMPTS, RESPONSES, ENDED).total.tolist() == [9.0, 2.0]
    with pytest.raises(UserError, match="run the stage 'reward' first"):
        scorer_of(tiny_recipe(), RunFolder(tmp_path))
    with pytest.raises(UserError, match="member_2"):
        scorer_of(tiny_recipe(reward={"members": 3}), folder)
    path = str(folder.stage("reward").model)
    terms = {"one": {"model": path}, "two": {"model": path, "weight": -1.0}, "stage": {"model": "reward"}}
    recipe = tiny_recipe(ppo={"rewards": terms})
    scorer = scorer_of(recipe, folder)
    assert scorer.terms["one"].scorer is scorer.terms["two"].scorer
    found = scorer.score(PROMPTS, RESPONSES, ENDED)
    np.testing.assert_array_equal(found.total, found.terms["stage"])


def test_the_judge_may_be_an_ensemble_too(folder):
    (folder.path / "judge").symlink_to(folder.path / "reward")
    recipe = tiny_recipe(judge={"max_length": 64, "members": 2, "combine": "mean_minus_std", "combine_std": 2.0})
    scorer = judge_scorer(recipe, folder, torch.float32, "cpu")
    assert isinstance(scorer, EnsembleScorer) and scorer.std == 2.0
    assert judge_scorer(tiny_recipe(), folder, torch.float32, "cpu") is None


# -- a reward model of other people -----------------------------------------------------------------------------------

OTHER_TEXTS = [f"an altogether different text with {i} other words" for i in range(40)]


def other_model(folder, case):
    """A Llama with a tokenizer of its own, in the ways that other people save one."""
    tokenizer = train_tokenizer(OTHER_TEXTS, 340, "llama")
    scratch = {"architecture": "llama", "layers": 2, "width": 32, "heads": 2, "positions": 96, "vocab_size": 340}
    body = build_causal_lm(ModelConfig(from_scratch=FromScratch(**scratch)), tokenizer, seed=5)
    model = build_reward_model(body, tokenizer, seed=6)
    if case == "with BOS":
        tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
        )
    if case == "PAD is EOS":
        tokenizer.pad_token, model.config.pad_token_id = tokenizer.eos_token, tokenizer.eos_token_id
    if case == "no PAD":
        tokenizer.pad_token = model.config.pad_token_id = None
    model.config.reward_mean, model.config.reward_std = 0.3, 0.7
    if case == "raw":
        del model.config.reward_mean, model.config.reward_std
    save_model(model, tokenizer, folder, "somebody's")


@pytest.mark.parametrize("case", ["plain", "with BOS", "PAD is EOS", "no PAD", "raw"])
def test_a_model_with_another_tokenizer_scores_the_text_as_plain_transformers_do(folder, tmp_path, case):
    """Ended by EOS, ended by a stop string, cut off: in the policy's ids on one side, as text on the other."""
    other_model(tmp_path / "other", case)
    policy = load_tokenizer(folder.stage("sft").model)
    prompts = ["please tell me about number 1", "tell", "about me, please"]
    texts = [" the words of number 7", " a text that goes on", " different: né"]
    read = [texts[0], " a text ", texts[2]]  # what is scored: the second ends where its stop string begins
    endings = [[policy.eos_token_id], [], []]
    sequences = Sequences.of(
        [np.array(policy(prompt).input_ids) for prompt in prompts],
        [np.array(policy(text).input_ids + ending) for text, ending in zip(texts, endings, strict=True)],
    )
    chunk = Chunk(step=0, index=0, prompt_indices=(0, 1, 2), sample_indices=(0, 0, 0))
    rollout = RolloutBatch(
        chunk=chunk, policy_version=0, sequences=sequences, ended=np.array([True, True, False]),
        rollout_logprobs=np.zeros(len(sequences.response_ids), np.float32),
    )  # fmt: skip
    terms = {"other": {"model": str(tmp_path / "other")}}
    recipe = tiny_recipe(reward=None, ppo={"rewards": terms, "critic_init": "sft"})
    found = Reward(scorer_of(recipe, folder), folder.stage("sft").model, stop=("that",)).score(rollout)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "other")
    assert len(tokenizer) != len(policy)
    mean, std = (0.0, 1.0) if case == "raw" else (0.3, 0.7)
    for i, (prompt, text, ended) in enumerate(zip(prompts, read, [1, 1, 0], strict=True)):
        ids = tokenizer(prompt).input_ids + tokenizer(text, add_special_tokens=False).input_ids
        ids += [tokenizer.eos_token_id] * ended
        assert (ids[0] == tokenizer.bos_token_id) == (case == "with BOS")
        with torch.no_grad():
            raw = model(torch.tensor([ids])).logits.item()
        assert found.total[i] == pytest.approx((raw - mean) / std, abs=1e-5)
    assert len(set(found.total.round(4))) == 3

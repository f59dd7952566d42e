"""A number that is not finite stops the run before it reaches an update, a file or a generator; the sample is named."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from in_process import LocalRoles
from loops import Diary, real_loop
from test_isolated_functions import isolated, module  # noqa: F401 - a fixture
from test_single_process import folder  # noqa: F401 - a fixture
from tiny import tiny_recipe

from rlhf_ray.algorithms.experience import assemble
from rlhf_ray.algorithms.finite_values import BadNumber
from rlhf_ray.algorithms.masking import masked_whiten
from rlhf_ray.errors import NotFinite, RunFailed, UserError
from rlhf_ray.messages import Chunk, RolloutBatch, Scores, Sequences
from rlhf_ray.ppo.single_process import SingleProcessPPO
from rlhf_ray.rewards.finite_scores import ModelScore, UserScore
from rlhf_ray.rewards.scorer import EnsembleScorer, FunctionScorer, RewardScorer, WeightedSum, WeightedTerm
from rlhf_ray.roles.reward import Reward

# -- scores -----------------------------------------------------------------------------------------------------------

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "1e39": 1e39, "-1e300": -1e300}
PROMPTS, RESPONSES, ENDED = ["tell me", "about"], [" one", " two"], [True, True]
given = {"value": 0.0}


def two(prompts, responses):
    """Fine for the first sample of a call; the test says what the second gets."""
    return [1.0, given["value"]][: len(prompts)]


def numpy_two(prompts, responses):
    return np.array([1.0, given["value"]])


class Fixed:
    """A plug-in's scorer."""

    def __init__(self, values):
        self.values = values

    def score(self, prompts, responses, ended, columns=None):
        return Scores(total=np.array(self.values[: len(prompts)]))


@pytest.mark.parametrize("name", ["two", "numpy_two"])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD.keys())
def test_a_functions_score_is_named_as_it_was_returned(name, value):
    given["value"] = value
    with pytest.raises(UserScore) as told:
        FunctionScorer(f"test_not_finite:{name}").score(PROMPTS, RESPONSES, ENDED)
    assert f"test_not_finite:{name} returned {value:g} for prompt 'about', response ' two'" in str(told.value)
    assert told.value.place == 1 and isinstance(told.value, UserError)


HUGE = '''
def huge(prompts, responses):
    return [1.0 if responses[0] == "a" else float(responses[0])]
'''


def test_so_is_one_of_a_function_in_its_own_process(module):  # noqa: F811
    (module / "huge_scores.py").write_text(HUGE)
    scorer = isolated(timeout_s=20.0)
    scorer.path = "huge_scores:huge"
    scorer.close()  # the next call starts a process with that function
    for value in ("nan", "inf", "-inf", "1e39", "-1e300"):
        with pytest.raises(UserScore) as told:
            scorer.score(["p0", "p1"], ["a", value], [True, True])
        assert f"huge_scores:huge returned {float(value):g} for prompt 'p1', response '{value}'" in str(told.value)
        assert told.value.place == 1
    assert scorer.score(["p"], ["3e38"], [True]).total.tolist() == [np.float32(3e38)]
    scorer.close()


@pytest.fixture
def reward_model(folder):  # noqa: F811
    return RewardScorer(folder.stage("reward").model)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_models_logit(reward_model, bad):
    with torch.no_grad():
        reward_model.model.score.weight[0, 3] = bad
    with pytest.raises(ModelScore, match="the reward model .*reward/model gave the score .* for prompt 'tell me', response ' one'"):
        reward_model.score(PROMPTS, RESPONSES, ENDED)
    assert issubclass(ModelScore, RunFailed) and not issubclass(ModelScore, UserError)


@pytest.mark.parametrize("mean, std", [(0.0, 0.0), (math.nan, 1.0), (1e39, 1.0), (0.0, 1e-46)])
def test_a_reward_models_normalisation(reward_model, mean, std):
    reward_model.mean, reward_model.std = mean, std
    with pytest.raises(ModelScore, match="reward_mean and reward_std"):
        reward_model.score(PROMPTS, RESPONSES, ENDED)


def test_an_ensembles_combination():
    members = [Fixed([0.0, 3e38]), Fixed([0.0, -3e38])]
    with pytest.raises(ModelScore, match=r"mean_minus_std\) is -\S+ for prompt 'about', response ' two'"):
        EnsembleScorer(members, combine="mean_minus_std", std=1e5).score(PROMPTS, RESPONSES, ENDED)


@pytest.mark.parametrize(
    "terms, says",
    [
        ({"a": (1e39, [1.0, 1.0])}, r"the sum of ppo.rewards \(1e\+39 a\) is inf for prompt 'tell me'.*lower the weights"),
        ({"a": (10.0, [1.0, 1e38]), "b": (1.0, [0.0, 0.0])}, r"\(10 a \+ 1 b\) is inf for prompt 'about'"),
        ({"a": (1.0, [1.0, 3e38]), "b": (1.0, [0.0, 3e38])}, "is inf for prompt 'about'"),
        ({"a": (1e39, [1.0, 0.0])}, "is inf for prompt 'tell me'"),
        ({"a": (1e39, [0.0, 0.0])}, "is nan for prompt 'tell me'"),
        ({"a": (0.0, [1.0, math.nan]), "b": (1.0, [0.0, 0.0])}, "the reward 'a' is nan for prompt 'about'"),
        ({"a": (1.0, [1.0, 1e39])}, "the reward 'a' is 1e\\+39 for prompt 'about', response ' two', which is infinite as a 32-bit"),
    ],
)
def test_a_weighted_sum_names_its_weights_and_a_bad_term(terms, says):
    with pytest.raises(UserScore, match=says):
        WeightedSum({name: WeightedTerm(weight, Fixed(values)) for name, (weight, values) in terms.items()}).score(
            PROMPTS, RESPONSES, ENDED
        )


def rollout_of(folder, evaluation=False):  # noqa: F811
    ids = [np.array([5, 6]), np.array([7])]
    return RolloutBatch(
        chunk=Chunk(step=17, index=0, prompt_indices=(9, 4), sample_indices=(0, 2), evaluation=evaluation), policy_version=17,
        sequences=Sequences.of(ids, ids), rollout_logprobs=np.zeros(3, np.float32), ended=np.ones(2, bool),
    )  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, 1e39])
def test_the_reward_role_adds_step_row_and_sample_whoever_scored(folder, value):  # noqa: F811
    role = Reward(Fixed([0.0, value]), folder.stage("sft").model, judge=Fixed([value, 0.0]))
    with pytest.raises(UserScore, match=r"the reward's score \(Fixed\) is .*\(step 17, prompt 4, sample 2\)$"):
        role.score(rollout_of(folder))
    with pytest.raises(UserScore, match=r"the judge's score .*\(evaluation, held-out prompt 9, sample 0\)$"):
        role.judge(rollout_of(folder, evaluation=True))
    given["value"] = value
    role = Reward(FunctionScorer("test_not_finite:two"), folder.stage("sft").model)
    with pytest.raises(UserScore, match=r"two returned .*response .*\(step 17, prompt 4, sample 2\)$"):
        role.score(rollout_of(folder))


# -- the experience ---------------------------------------------------------------------------------------------------

MASK = torch.tensor([[True, True], [True, False]])


def assembled(whitens=False, **changes):
    from masks import CONFIG

    values = {
        "scores": torch.tensor([1.0, 2.0]), "ended": torch.tensor([True, True]), "rollout_logprobs": torch.zeros(2, 2),
        "old_logprobs": torch.zeros(2, 2), "ref_logprobs": torch.zeros(2, 2), "old_values": torch.zeros(2, 2),
    }  # fmt: skip
    return assemble(*(values | changes).values(), MASK, replace(CONFIG, whiten_advantages=whitens), kl_coef=0.1)


def with_bad(bad, row=1, column=0):
    values = torch.zeros(2, 2)
    values[row, column] = bad
    return values


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["rollout_logprobs", "old_logprobs", "ref_logprobs", "old_values"])
def test_each_input_of_the_experience_is_looked_at_where_it_counts(name, bad):
    with pytest.raises(BadNumber) as told:
        assembled(**{name: with_bad(bad)})
    assert told.value.row == 1 and str(bad) in str(told.value)
    assembled(**{name: with_bad(bad, row=1, column=1)})  # padding


def test_scores_too_large_to_be_whitened_are_refused_rather_than_made_0():
    """1e25 is finite, its square is not (the largest 32-bit float is 3.4e38): whitened it would be 0 for every token."""
    with pytest.raises(BadNumber, match=r"variance of a batch with 1e\+25 in it is inf"):
        masked_whiten(torch.tensor([[1e25, 0.0], [0.0, 0.0]]), MASK, shift_mean=True)
    with pytest.raises(BadNumber):
        assembled(whitens=True, scores=torch.tensor([1.0, 1e25]))
    assert torch.isfinite(assembled(whitens=True, scores=torch.tensor([1.0, 1e15])).advantages).all()


def test_a_reward_that_overflows_with_its_penalty_is_refused():
    with pytest.raises(BadNumber, match="a reward less its KL penalty is inf"):
        assembled(scores=torch.tensor([1.0, 3.4e38]), ref_logprobs=with_bad(3.4e38))


# -- whole steps ------------------------------------------------------------------------------------------------------


def huge_at_step_two(prompts, responses):
    given["value"] += 1
    return [1e39 if given["value"] > 3 and number == len(prompts) - 1 else 0.1 * len(text) for number, text in enumerate(responses)]


def weights_of(module):  # noqa: F811
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_stops_before_the_update_and_names_the_sample(folder):  # noqa: F811
    """Both ways of PPO: nothing has moved since the step before."""
    recipe = tiny_recipe(ppo={"reward_function": "test_not_finite:huge_at_step_two"})
    given["value"] = 0  # two chunks per evaluation and per step: the fourth call is a training step's
    roles, diary = LocalRoles(recipe, folder), Diary()
    before = roles.weights()
    with pytest.raises(UserError, match=r"returned 1e\+39 for prompt 'please .*\(step 0, prompt \d+, sample 0\)"):
        real_loop(recipe, roles, diary).run()
    assert same(before, roles.weights()) and diary.saves == []
    given["value"] = 3
    single = SingleProcessPPO(recipe, folder)
    before = weights_of(single.policy)
    with pytest.raises(UserError, match=r"returned 1e\+39 .*\(step 0, prompt \d+, sample 0\)"):
        single.step(0)
    assert same(before, weights_of(single.policy))


OTHERS = {"reference": "a log-prob under the reference is nan", "critic": "a value of the critic is nan"}


@pytest.mark.parametrize("attribute, says", OTHERS.items())
def test_another_models_nan_stops_the_step(folder, attribute, says):  # noqa: F811
    single = SingleProcessPPO(tiny_recipe(), folder)
    with torch.no_grad():
        next(getattr(single, attribute).parameters()).fill_(math.nan)
    before = weights_of(single.policy)
    with pytest.raises(NotFinite, match=rf"{says} \(step 0, prompt \d+, sample 0\)"):
        single.step(0)
    assert same(before, weights_of(single.policy))


def test_a_learning_rate_that_blows_up_gives_nothing_to_the_generator(folder):  # noqa: F811
    single = SingleProcessPPO(tiny_recipe(ppo={"learning_rate": 1e36, "anneal": False}), folder)
    drawn = weights_of(single.generator.engine.model)
    with pytest.raises(NotFinite):
        for step in range(3):
            single.step(step)
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(single.generator.engine.model).values())
    assert same(drawn, weights_of(single.generator.engine.model))


def test_logits_that_are_not_numbers_end_generation_in_words(folder):  # noqa: F811
    single = SingleProcessPPO(tiny_recipe(), folder)
    with torch.no_grad():
        single.generator.engine.model.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(NotFinite, match=r"begins with step 0, prompt \d+, sample 0: .*not finite.*generation.temperature"):
        single.step(0)

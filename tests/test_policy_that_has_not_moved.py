"""Patience and the adaptive KL coefficient wait for a policy that moves; the coefficient stays above 0."""

import dataclasses

import pytest
import torch
from loops import Diary, ScriptedRoles, scripted_loop
from pydantic import ValidationError

from rlhf_ray.algorithms.kl import adapt_kl_coef
from rlhf_ray.config import PPOConfig
from rlhf_ray.ppo.loop import LoopState


class StillRoles(ScriptedRoles):
    """Whose updates have no gradient for the first `still` policy updates."""

    still = 0

    def update(self, shards, learning_rate, kl_coef=None):
        handles = super().update(shards, learning_rate, kl_coef)
        if kl_coef is not None:
            handles[0].value["policy/grad_norm"] = 0.0 if self.still > 0 else 1.0
            self.still -= 1
        return handles


def ran(roles=None, state=None, diary=None, **options):
    """Scores that never rise: patience ends the run as soon as it counts."""
    roles, diary = roles or ScriptedRoles(), diary or Diary()
    loop = scripted_loop(roles, diary, state, steps=20, **{"eval_every": 2, **options})
    loop.run()
    return loop, diary


@pytest.mark.parametrize("warmup", [0, 1, 2, 5, 6])
def test_evaluations_of_the_critics_warm_up_do_not_count(warmup):
    """Two evaluations after the policy's first step: with a warm-up of 6 those of steps 8 and 10."""
    loop, _ = ran(critic_warmup_steps=warmup, patience=2)
    first = next(step for step in range(2, 21, 2) if step > warmup)
    assert loop.state.step == first + 2 and loop.state.worse_since == 2


def test_nor_does_a_lucky_one_make_the_start_the_best_policy_again():
    """A judge that is a noisy function may like the same responses better the second time."""
    roles = ScriptedRoles(eval_scores=[0.0, 5.0, 4.0, 1.0, 0.5, 0.2])
    loop, diary = ran(roles, critic_warmup_steps=4, patience=2, roll_back=True)
    assert (loop.state.best_step, loop.state.best_score) == (6, 1.0)
    assert diary.best == [0, 6] and loop.state.step == 10


def test_a_policy_without_a_gradient_has_not_moved_either():
    """All samples of all prompts score the same: nothing to learn, as in a task that is too hard at first."""
    roles = StillRoles()
    roles.still = 7
    loop, _ = ran(roles, patience=2)
    assert loop.state.step == 10, "the eighth step has a gradient: evaluations of steps 8 and 10 count"
    roles = StillRoles()
    loop, _ = ran(roles, patience=2)
    assert loop.state.step == 4


@pytest.mark.parametrize("stop_after", range(1, 10))
def test_a_stopped_run_has_as_much_patience_in_the_warm_up(stop_after):
    options = {"critic_warmup_steps": 5, "patience": 2, "adaptive_kl": {"target": 2.0, "horizon": 10}}
    whole, _ = ran(**options)
    first = Diary(stop_after=stop_after)
    ran(diary=first, **options)
    state = LoopState.from_json(first.saves[-1].to_json())
    again, _ = ran(state=state, **options)
    assert dataclasses.asdict(again.state) == dataclasses.asdict(whole.state)


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_coefficient_starts_to_move_with_the_policy(warmup):
    """After the warm-up it goes as without one: kl 3 against 2, 4 episodes of 10, so 1.08 per step."""
    roles = ScriptedRoles(kl=3.0)
    diary = Diary()
    scripted_loop(
        roles, diary, steps=warmup + 3, critic_warmup_steps=warmup, adaptive_kl={"target": 2.0, "horizon": 10}, kl_coef=0.1
    ).run()
    used = [event[1] for event in roles.events if event[0] == "assemble"]
    assert used == pytest.approx([0.1] * warmup + [0.1, 0.108, 0.11664])


# -- the coefficient --------------------------------------------------------------------------------------------------


def config(**options):
    return PPOConfig.model_validate({"rollout_batch_size": 8, "minibatch_size": 8, "microbatch_size": 8, **options})


@pytest.mark.parametrize("horizon, samples", [(1, 1), (1, 8), (8, 5), (7, 8)])
def test_a_horizon_that_lets_it_become_0_or_less_is_refused(horizon, samples):
    """1 - 0.2 * rollouts / horizon <= 0 exactly where rollouts >= 5 * horizon."""
    rollouts = 8 * samples
    assert rollouts >= 5 * horizon
    with pytest.raises(ValidationError, match=f"horizon = {horizon} .*set horizon to {rollouts} or more"):
        config(adaptive_kl={"horizon": horizon}, samples_per_prompt=samples)
    with pytest.raises(AssertionError):
        adapt_kl_coef(0.05, 0.0, target=6.0, horizon=horizon, episodes=rollouts)


@pytest.mark.parametrize("horizon", [2, 3, 8, 10000])
def test_what_is_allowed_stays_above_0_for_any_kl(horizon):
    config(adaptive_kl={"horizon": horizon})
    coefficient = 0.05
    for kl in [-1.0, 0.0, 5.9, 0.0, -1e30, 1e30] * 5:
        coefficient = adapt_kl_coef(coefficient, kl, target=6.0, horizon=horizon, episodes=8)
        assert coefficient > 0


def test_a_controller_that_multiplies_0_is_refused():
    with pytest.raises(ValidationError, match="kl_coef is 0"):
        config(adaptive_kl={}, kl_coef=0.0)
    config(kl_coef=0.0)


# -- estimators -------------------------------------------------------------------------------------------------------


def score_function_gradient(estimator, logits, reference):
    """E_p[k(x) grad log p(x)] by the definition, in float64."""
    probs = logits.softmax(-1)
    ratio = (probs / reference).log()
    k = {"k1": ratio, "k2": ratio**2 / 2, "k3": (-ratio).exp() - 1 + ratio}[estimator].detach()
    return torch.autograd.grad((probs.detach() * k * probs.log()).sum(), logits)[0]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_in_the_reward_are_refused_because_they_penalise_nothing(estimator):
    """Their gradient falls with the square of the distance from the reference, k1's linearly; farther away it turns round."""
    reference = torch.tensor([0.5, 0.5], dtype=torch.float64)
    norms = {}
    for distance in (0.02, 0.01):
        logits = torch.tensor([distance, 0.0], dtype=torch.float64, requires_grad=True)
        for each in ("k1", estimator):
            norms[each, distance] = float(score_function_gradient(each, logits, reference).norm())
    assert norms["k1", 0.02] / norms["k1", 0.01] == pytest.approx(2, rel=1e-2)
    assert norms[estimator, 0.02] / norms[estimator, 0.01] > 3.9
    far = torch.tensor([9.0, 1.0], dtype=torch.float64).log().requires_grad_()
    assert float(score_function_gradient("k1", far, reference)[0]) > 0, "less of the likely token"
    assert float(score_function_gradient(estimator, far, reference)[0]) < 0, "more of it"
    with pytest.raises(ValidationError, match=f"kl_estimator is {estimator} and kl_in is reward.*k1, or kl_in to loss"):
        config(kl_estimator=estimator)
    config(kl_estimator=estimator, kl_in="loss")

"""How often actors are made again, what is blamed, how long one may be silent; and the faults for tests themselves. No Ray."""

import json
from types import SimpleNamespace

import pytest
from tiny import tiny_recipe

from rlhf_ray.actors import faults
from rlhf_ray.actors.budgets import Budget
from rlhf_ray.actors.calls import Call, Handle, Member
from rlhf_ray.actors.recovery import Recovery
from rlhf_ray.actors.wait import ActorDied, Waiter
from rlhf_ray.errors import RunFailed
from rlhf_ray.messages import Chunk
from rlhf_ray.ppo.loop import LoopState
from rlhf_ray.runs.events import EventLog

DIED = ActorDied("reward actor 0 died (killed); see the logs")


def member(role="reward"):
    return Member(role, 0, lambda: None)


def test_a_storm_of_restarts_stops_with_its_table():
    budget = Budget(2)
    for _ in range(2):
        budget.charge(member(), DIED, "after step 0, scoring (step 0)")
    budget.begin_anew()
    for role in ("generation", "reward"):
        budget.charge(member(role), DIED, "after step 1, weight sync (version 1)")
    with pytest.raises(RunFailed, match="3 actors were lost .*more than resources.restarts = 2") as told:
        budget.charge(member("critic"), DIED, "after step 1, value update (step 1)")
    assert str(told.value).splitlines()[1:] == [
        "  after step 1, weight sync (version 1): generation actor 0: reward actor 0 died (killed)",
        "  after step 1, weight sync (version 1): reward actor 0: reward actor 0 died (killed)",
        "  after step 1, value update (step 1): critic actor 0: reward actor 0 died (killed)",
    ]
    assert budget.take_failures() == {"failures/reward": 3.0, "failures/generation": 1.0, "failures/critic": 1.0}
    assert budget.take_failures() == {}


def test_a_step_that_is_taken_again_is_no_progress(tmp_path):
    roles, recipe = SimpleNamespace(trained=[], members=[]), tiny_recipe(resources={"restarts": 1})
    events = EventLog(tmp_path / "events.jsonl")
    waiter, budget = Waiter(60, "wait"), Budget(recipe.resources.restarts)
    recovery = Recovery(recipe, roles, waiter, tmp_path, budget=budget, events=events, progress=lambda event: None)
    recovery.run(recovery.step_done, LoopState(step=1, kl_coef=0.1))
    for step in (2, 3):
        recovery.budget.charge(member(), DIED, "scoring")
        recovery.step_done(LoopState(step=step, kl_coef=0.1))
    recovery.budget.charge(member(), DIED, "scoring")
    recovery.step_done(LoopState(step=3, kl_coef=0.1))
    with pytest.raises(RunFailed, match="2 actors were lost"):
        recovery.budget.charge(member(), DIED, "scoring")


def test_a_call_that_ends_two_actors_is_named_with_its_samples():
    budget, generator, scorer = Budget(5), member("generation"), member()
    chunk = Chunk(step=3, index=1, prompt_indices=(7, 9), sample_indices=(0, 2))
    rollout = Call(generator, "generate", (chunk,), "generation actor 0 (step 3, chunk 1)")

    def score():
        return Call(scorer, "score", (Handle(rollout, 0),), "reward actor 0 (chunk 1)")

    budget.charge(scorer, DIED, "scoring", score())
    budget.charge(generator, DIED, "scoring", rollout)  # another call on the same samples
    with pytest.raises(RunFailed, match="reward actor 0 died 2 times at the same call, score of reward actor 0") as told:
        budget.charge(scorer, DIED, "scoring", score())
    assert "Its samples: step 3, prompt 7, sample 0; step 3, prompt 9, sample 2. " in str(told.value)


def test_with_no_restarts_the_first_death_stops_the_run():
    with pytest.raises(ActorDied, match="^reward actor 0 died"):
        Budget(0).charge(member(), DIED, "scoring")


@faults.with_points
class Role:
    def __init__(self, name):
        self.name = name
        faults.tell_process(name)

    def score(self, value):
        return value


def test_a_fault_comes_at_its_call_counted_over_restarts(tmp_path, monkeypatch):
    path = tmp_path / "faults.json"
    fault = {"role": "reward", "rank": 1, "method": "score", "call": 3, "when": "before", "kind": "exception"}
    path.write_text(json.dumps([fault]))
    assert Role("reward-1").score(5) == 5  # not asked for
    monkeypatch.setenv(faults.VARIABLE, str(path))
    assert [Role("reward-0").score(5) for _ in range(5)] == [5] * 5  # another rank
    first = Role("reward-1")
    assert (first.score(1), first.score(2)) == (1, 2)
    with pytest.raises(RuntimeError, match="a fault for tests"):
        Role("reward-1").score(3)  # the third, of an actor that was made again
    assert first.score(4) == 4

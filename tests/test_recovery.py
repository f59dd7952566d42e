"""Actors of the PPO stage die at named points, and the run ends in the undisturbed run's bits. Real actors, real SIGKILLs.

The whole matrix is `chaos` (`make chaos`, results/chaos/); here is a short form of it, and what ends a run.
"""

import re

import pytest
from chaos import Ended, prepare
from chaos_cells import VICTIMS, cells, fault
from tiny import tiny_recipe

from rlhf_ray.actors import stragglers
from rlhf_ray.errors import RunFailed
from rlhf_ray.runs.run_folder import RunFolder

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def run_with(faults_file, tmp_path_factory):
    """Run the tiny recipe with faults -> what there is to look at."""

    def run(listed, **sections):
        ended = Ended(prepare(faults_file, RunFolder(tmp_path_factory.mktemp("run")), listed))
        ended.run(tiny_recipe(**sections))
        return ended

    return run


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run):
    assert not undisturbed_run.events and undisturbed_run.each_once()
    return undisturbed_run.facts()


STATELESS = [
    fault("generation", "generate", 0, 3), fault("generation", "load_weights", 2, when="after"),
    fault("reward", "score", 1, 2, "after"), fault("reference", "logprobs", 0, 1), fault("experience", "assemble", 2, kind="stop"),
]  # fmt: skip
TRAINED = [fault("policy", "update", 1, when="role.engine.step"), fault("critic", "update", 2, when="after"),
           fault("policy", "save", 2, when="role.engine.state")]  # fmt: skip


@pytest.mark.parametrize(("faults", "wanted"), [
    pytest.param(STATELESS[::2], {("generation", 0, "generation (step 0)"), ("experience", 2, "assembling (step 2)")}, id="some"),
    pytest.param(STATELESS[1::2], set(), id="others", marks=pytest.mark.thorough),
])  # fmt: skip
def test_actors_of_stateless_roles_die(run_with, undisturbed, faults, wanted):
    ended = run_with(faults)
    assert ended.facts() == undisturbed
    roles = [event["role"] for event in ended.events]
    assert sorted(roles) == sorted(fault["role"] for fault in faults)
    for event in ended.events:
        assert event["what"] == f"{event['role']} actor 0 was lost" and event["done"].startswith("made again, ")
        assert event["steps_lost"] == 0 and event["cost_s"] > 0
        assert ("is stopped" if event["role"] == "experience" else "died") in event["seen"]
    where = {(event["role"], event["step"], event["phase"]) for event in ended.events}
    assert wanted <= where
    assert sum("actor 0 was lost after step" in line for line in ended.said) == len(faults)


def test_ranks_of_policy_and_critic_die(run_with, undisturbed):
    """In the middle of an update, after one, in a checkpoint: only what came after the newest snapshot is done again."""
    ended = run_with(TRAINED)
    assert ended.facts() == undisturbed
    # Step 2's checkpoint comes before its updates.
    assert [(event["what"], event["step"]) for event in ended.events] == [
        ("policy rank 0 was lost", 1), ("policy rank 0 was lost", 2), ("critic rank 0 was lost", 2),
    ]  # fmt: skip
    for event in ended.events:  # the newest snapshot, or the one before where that one was still being made
        assert event["steps_lost"] in (0, 1)
        assert event["done"].endswith(f"{event['step'] - event['steps_lost']} (snapshot)")


@pytest.mark.thorough
def test_a_call_that_ends_two_actors_stops_the_run_and_names_its_samples(run_with):
    with pytest.raises(RunFailed, match="reward actor 0 died 2 times at the same call, score .*no third try") as told:
        run_with([fault("reward", "score", 0, call) for call in (3, 4)])
    assert re.search(r"Its samples: step 0, prompt \d+, sample 0; step 0, prompt \d+, sample 0; ", str(told.value))


@pytest.mark.slow
def test_an_error_that_comes_twice_is_raised_with_its_samples(run_with):
    with pytest.raises(RuntimeError, match="a fault for tests") as told:
        run_with([fault("reference", "logprobs", 1, call, kind="exception") for call in (1, 2)])
    (note,) = told.value.__notes__
    assert "reference actor 0 (chunk 0) failed 2 times" in note and "Its samples: step 1" in note


@pytest.mark.slow
def test_a_late_scorers_chunk_is_scored_by_another_and_nothing_waits_for_the_late_one(run_with, undisturbed, monkeypatch):
    monkeypatch.setattr(stragglers, "SHORTEST_LIMIT_S", 5.0)
    late = fault("reward", "score", 1, kind="slow", rank=1, seconds=600)
    ended = run_with([late], resources={"reward": {"actors": 2}})
    assert ended.facts() == undisturbed
    first, *others = [(event["what"], event["seen"], event["done"]) for event in ended.events]
    done = "reward actor 1 (chunk 1) was given to reward actor 0 too, the first answer counts"
    assert first[0] == "reward actor 1 is late" and first[1].startswith("at work for ") and first[2] == done
    # Each chunk that it was asked for later: two steps and two evaluations.
    assert others == [("reward actor 1 is late", "still at reward actor 1 (chunk 1)", done)] * 4


@pytest.mark.slow
def test_without_snapshots_the_last_checkpoint_serves(run_with, undisturbed):
    ended = run_with([fault("critic", "update", 1), fault("critic", "update", 3)], resources={"snapshot_gb": 0})
    assert ended.facts() == undisturbed
    # Of the second step there is nothing yet; of the fourth there is the checkpoint of the second.
    assert [event["done"].partition("state of ")[2] for event in ended.events] == ["step 0 (the start)", "step 2 (step_000002)"]
    assert [event["steps_lost"] for event in ended.events] == [1, 1]


def test_the_matrix_names_every_role_in_every_phase_twice():
    matrix = {cell.name.removeprefix("all x "): cell.faults for cell in cells() if cell.name.startswith("all x ")}
    assert list(matrix) == ["generate", "score", "assemble", "update", "sync", "evaluate", "checkpoint"]
    for faults in matrix.values():
        victims = [each["victim"] for each in faults]
        assert len(victims) == 12 and all(victims.count(victim) == 2 for victim in victims)
        assert [each["step"] for each in faults] == list(range(1, 13))  # one per step, so that none hides another
        assert {each["when"] for each in faults} == {"before", "after"}


def test_every_role_dies_in_the_middle_of_its_own_work_in_each_phase():
    middles = {cell.name.removeprefix("middle of "): cell.faults for cell in cells() if cell.name.startswith("middle of ")}
    own = {"generate": {"generation"}, "score": {"reward", "reference", "policy", "critic"}, "assemble": {"experience"},
           "update": {"policy", "critic"}, "sync": {"policy", "generation"}, "checkpoint": {"policy", "critic"},
           "evaluate": {"generation", "reward", "reference", "experience"}}  # fmt: skip
    assert middles.keys() == own.keys()
    for phase, faults in middles.items():
        assert [each["victim"] for each in faults] == [f"{role}-0" for role in VICTIMS]
        assert [each["step"] for each in faults] == list(range(1, 7))
        assert {each["role"] for each in faults if each["victim"] == f"{each['role']}-0"} == own[phase]
        assert not {each["when"] for each in faults} & {"before", "after"}

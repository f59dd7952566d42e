"""Threads where the recipe leaves them open: arithmetic by hand."""

import pytest
from tiny import tiny_recipe

from rlhf_ray.config import Recipe
from rlhf_ray.config.threads import role_shares, settle_threads, stage_shares
from rlhf_ray.runs.resume import check_resume, recorded_recipe, write_recipe
from rlhf_ray.runs.run_folder import RunFolder

OPEN = {"name": "t", "sft": {"workers": 2, "microbatch_size": 16}}


def recipe(**sections) -> Recipe:
    return Recipe.model_validate(OPEN | sections)


@pytest.mark.parametrize(
    "cores, nodes, sections, shares",
    [
        (2, 1, {}, {"generation": 2, "reward": 1, "reference": 1, "policy": 1, "critic": 1}),
        (1, 1, {}, {"generation": 1, "reward": 1, "reference": 1, "policy": 1, "critic": 1}),
        (16, 1, {}, {"generation": 16, "reward": 8, "reference": 8, "policy": 8, "critic": 8}),
        (16, 4, {}, {"generation": 16, "policy": 16}),
        (16, 1, {"resources": {"generation": {"actors": 3}, "policy": {"actors": 2}}}, {"generation": 5, "policy": 4}),
        (16, 2, {"resources": {"generation": {"actors": 3}, "policy": {"actors": 4}}}, {"generation": 8, "policy": 4}),
        (8, 1, {"ppo": {"advantage": "grpo", "samples_per_prompt": 4}}, {"policy": 8}),
    ],
)
def test_processes_that_work_at_the_same_time_fill_a_node(cores, nodes, sections, shares):
    assert shares.items() <= role_shares(recipe(**sections), cores, nodes).items()


def test_workers_of_a_stage_fill_a_node():
    assert stage_shares(recipe(), 16) == {"sft": 8, "reward": 16}
    assert stage_shares(recipe(), 16, nodes=2) == {"sft": 16, "reward": 16}
    assert stage_shares(recipe(), 1) == {"sft": 1, "reward": 1}


def test_what_is_given_stays_and_what_is_recorded_comes_before_the_machine():
    given = recipe(resources={"critic": {"threads": 3}}, judge={"threads": 7, "base": "fluency"}, fluency={})
    first = settle_threads(given, None, cores=16)
    assert first.resources.critic.threads == 3 and first.judge.threads == 7
    assert (first.resources.policy.threads, first.resources.generation.threads, first.sft.threads) == (8, 16, 8)
    assert (first.reward.threads, first.fluency.threads) == (16, 16)
    moved = settle_threads(given, first, cores=2)
    assert moved == first, "a run that goes on elsewhere keeps its numbers"
    asked = {"critic": {"threads": 3}, "policy": {"threads": 2}}
    changed = recipe(resources=asked, judge={"threads": 7, "base": "fluency"}, fluency={})
    assert settle_threads(changed, first, cores=16).resources.policy.threads == 2, "but what is asked for wins"


def test_a_run_folder_goes_on_with_the_threads_it_has(tmp_path):
    """Numbers are recorded, the recipe still leaves them open; what is done stays done."""
    folder = RunFolder(tmp_path)
    write_recipe(settle_threads(recipe(), None, cores=16), folder.recipe)
    for stage in ("data", "sft"):
        folder.stage(stage).path.mkdir()
        folder.stage(stage).finish({})
    assert check_resume(recipe(), folder) == []
    assert settle_threads(recipe(), recorded_recipe(folder), cores=2).sft.threads == 8


def test_a_recipe_with_all_numbers_is_left_alone():
    full = tiny_recipe(sft={"threads": 1}, reward={"threads": 1})
    assert settle_threads(full, None, cores=64) == full

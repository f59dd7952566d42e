"""The order of stages, stopping between them, what may change on resume, and one run a folder."""

import pytest

from rlhf_ray.cli.running import held
from rlhf_ray.config import Recipe
from rlhf_ray.errors import StageStopped, UserError
from rlhf_ray.pipeline import prepare_folder, run_stages, stages_of
from rlhf_ray.recipe_file import check_resume
from rlhf_ray.roles.text import response_text
from rlhf_ray.run_folder import RunFolder


def stages(folder: RunFolder, log: list[str]) -> dict:
    """Stages that note their name and finish."""

    def stage(name: str):
        def work(recipe, folder, progress):
            log.append(name)
            folder.stage(name).finish({"steps": 3})

        return work

    return {name: stage(name) for name in ("data", "sft", "fluency", "reward", "judge", "ppo", "evaluation")}


def test_stages_run_in_order_once_and_only_those_of_the_recipe(tmp_path):
    folder, log, events = RunFolder(tmp_path), [], []
    recipe = Recipe(name="r")
    run_stages(recipe, folder, stages(folder, log), events.append)
    assert log == stages_of(recipe) == ["data", "sft", "reward", "ppo", "evaluation"]
    run_stages(recipe, folder, stages(folder, log), events.append)
    assert len(log) == 5
    assert [event["stage"] for event in events if event.get("skipped")] == stages_of(recipe)


def test_a_stop_that_no_stage_saw_ends_the_run_after_the_stage(tmp_path):
    folder, log = RunFolder(tmp_path), []
    with pytest.raises(StageStopped, match="sft is done"):
        run_stages(Recipe(name="r"), folder, stages(folder, log), lambda event: None, None, lambda: "sft" in log)
    assert log == ["data", "sft"]


def test_a_stage_says_what_it_needs(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match="stage 'ppo' needs 'data'"):
        run_stages(Recipe(name="r"), folder, stages(folder, []), lambda event: None, ["ppo"])
    with pytest.raises(UserError, match="has no stage 'judge'"):
        run_stages(Recipe(name="r"), folder, stages(folder, []), lambda event: None, ["judge"])


def test_anything_may_change_until_the_data_is_prepared_and_what_is_safe_after(tmp_path):
    folder = RunFolder(tmp_path)
    prepare_folder(Recipe(name="r", data={"max_prompt_tokens": 10}), folder)
    corrected = Recipe(name="r", data={"max_prompt_tokens": 12})
    assert check_resume(corrected, folder) == ["data.max_prompt_tokens"]
    prepare_folder(corrected, folder)
    folder.stage("data").finish({})
    with pytest.raises(UserError, match="data.max_prompt_tokens"):
        check_resume(Recipe(name="r", data={"max_prompt_tokens": 10}), folder)
    folder.stage("sft").path.mkdir()
    faster = corrected.model_copy(update={"sft": corrected.sft.model_copy(update={"learning_rate": 1e-3})})
    assert check_resume(faster, folder) == ["sft.learning_rate"]
    folder.stage("sft").finish({})
    with pytest.raises(UserError, match="sft.learning_rate"):
        check_resume(faster, folder)


def test_a_finished_ppo_keeps_its_recipe_unless_it_gets_more_steps(tmp_path):
    folder = RunFolder(tmp_path)
    prepare_folder(Recipe(name="r", ppo={"steps": 3}), folder)
    for name in ("data", "ppo"):
        folder.stage(name).finish({"steps": 3})
    with pytest.raises(UserError, match="ppo.kl_coef"):
        prepare_folder(Recipe(name="r", ppo={"steps": 3, "kl_coef": 0.5}), folder)
    with pytest.raises(UserError, match="has done 3 PPO steps"):
        prepare_folder(Recipe(name="r", ppo={"steps": 2}), folder)
    prepare_folder(Recipe(name="r", ppo={"steps": 5, "kl_coef": 0.5}), folder)
    assert not folder.stage("ppo").done


def test_a_run_folder_is_held_by_one_run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with held(folder), pytest.raises(UserError, match=r"in use by process \d+"), held(folder):
        pass
    with held(folder):
        pass


def test_a_stop_string_is_no_part_of_the_text():
    class Letters:
        def decode(self, ids, **options):
            return "".join(chr(i) for i in ids)

    ids = [ord(letter) for letter in "Fine.\n\nHuman: a"]
    assert response_text(Letters(), ids, ("\n\nHuman:",)) == "Fine."
    assert response_text(Letters(), ids, ()) == "Fine.\n\nHuman: a"
    assert response_text(Letters(), ids, ("n", "F")) == ""

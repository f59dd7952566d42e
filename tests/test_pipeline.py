"""The order of stages, stopping between them, what may change on resume, and one run a folder."""

import errno
import gc

import pytest
from crossed import crossed
from rich.console import Console
from tiny import TEXTS, tiny_recipe, write_start

import rlhf_ray
from rlhf_ray.actors.garbage_collection import collector_paused
from rlhf_ray.actors.ppo_stage import run_ppo
from rlhf_ray.actors.run_recipe import failures_recorded
from rlhf_ray.cli.running import closing_words
from rlhf_ray.config import Recipe
from rlhf_ray.config.ppo_section import PPOConfig
from rlhf_ray.errors import RunFailed, StageStopped, UserError
from rlhf_ray.models.tokenizer import train_tokenizer
from rlhf_ray.report.compare import seed_of
from rlhf_ray.report.page import render
from rlhf_ray.roles.rollout_text import response_text
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.pipeline import environment, prepare_folder, run_stages
from rlhf_ray.runs.resume import check_resume
from rlhf_ray.runs.run_folder import RunFolder, held, run_folder_of


def stages(folder: RunFolder, log: list[str]) -> dict:
    """Stages that note their name and finish."""

    def stage(name: str):
        def work(recipe, folder, progress):
            log.append(name)
            folder.stage(name).finish({"steps": 3})

        return work

    return {name: stage(name) for name in ("data", "sft", "fluency", "reward", "judge", "dpo", "ppo", "evaluation")}


def test_stages_run_in_order_once_and_only_those_of_the_recipe(tmp_path):
    folder, log, events = RunFolder(tmp_path), [], []
    recipe = Recipe(name="r")
    run_stages(recipe, folder, stages(folder, log), events.append)
    assert log == recipe.stages == ["data", "sft", "reward", "ppo", "evaluation"]
    run_stages(recipe, folder, stages(folder, log), events.append)
    assert len(log) == 5
    assert [event["stage"] for event in events if event.get("skipped")] == recipe.stages


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
    run_stages(Recipe(name="r"), folder, stages(folder, []), lambda event: None)
    folder.stage("evaluation").done_file.unlink()
    with pytest.raises(UserError, match="stage 'evaluation' needs 'judge'"):
        run_stages(Recipe(name="r", judge={}), folder, stages(folder, []), lambda event: None, ["evaluation"])


def test_a_stop_that_comes_as_a_stage_starts_is_not_lost(tmp_path):
    folder, seen = RunFolder(tmp_path), []

    def ctrl_c(event):
        if event.get("started"):
            folder.stage(event["stage"]).stop_file.touch()

    def work(recipe, folder, progress):
        seen.append(folder.stage("data").stop_file.exists())

    run_stages(Recipe(name="r"), folder, {"data": work}, ctrl_c, ["data"])
    assert seen == [True]


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


def test_a_limit_that_stopped_a_run_may_be_raised_when_it_goes_on(tmp_path):
    """What the message tells the user to do is possible."""
    folder = RunFolder(tmp_path)
    scored = {"reward_function": "rlhf_ray.data.world:utility", "reward_timeout_s": 1.0}
    prepare_folder(Recipe(name="r", ppo=scored), folder)
    folder.stage("data").finish({})
    limits = [name for name, field in PPOConfig.model_fields.items() if (field.description or "").startswith("stop if")]
    assert set(limits) >= {"max_mismatch_kl", "max_first_approx_kl"}
    raised = Recipe(name="r", ppo=scored | dict.fromkeys((*limits, "reward_timeout_s"), 77.0))
    assert check_resume(raised, folder) == sorted(f"ppo.{name}" for name in (*limits, "reward_timeout_s"))


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


@pytest.mark.parametrize(
    "added", [{"judge": {}}, {"fluency": {}}, {"dpo": {}}, {"evaluation": {"prompts": 8}}, {"ppo": {"steps": 4}}]
)
def test_what_changes_the_figures_reopens_the_evaluation_and_drops_its_figures(added, tmp_path):
    folder, log = RunFolder(tmp_path), []
    before = Recipe(name="r", ppo={"steps": 3})
    prepare_folder(before, folder)
    run_stages(before, folder, stages(folder, log), lambda event: None)
    summary = folder.stage("evaluation").path / "summary.json"
    summary.write_text("{}")
    prepare_folder(before, folder)
    assert folder.stage("evaluation").done and summary.exists()
    after = Recipe.model_validate({"name": "r", "ppo": {"steps": 3}} | added)
    prepare_folder(after, folder)
    assert not folder.stage("evaluation").done and not summary.exists()
    log.clear()
    run_stages(after, folder, stages(folder, log), lambda event: None)
    assert log == [name for name in added if name != "evaluation"] + ["evaluation"]


def test_a_finished_dpo_keeps_its_recipe(tmp_path):
    folder = RunFolder(tmp_path)
    prepare_folder(Recipe(name="r", dpo={}), folder)
    for name in ("data", "dpo"):
        folder.stage(name).finish({})
    for change in ({"beta": 0.3}, {"learning_rate": 1e-4}):
        with pytest.raises(UserError, match=f"dpo.{next(iter(change))}"):
            check_resume(Recipe(name="r", dpo=change), folder)
    folder.stage("dpo").done_file.unlink()
    assert check_resume(Recipe(name="r", dpo={"learning_rate": 1e-4}), folder) == ["dpo.learning_rate"]
    with pytest.raises(UserError, match="dpo.beta"):  # it has begun with another
        check_resume(Recipe(name="r", dpo={"beta": 0.3}), folder)


def test_a_machine_without_git_runs_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment()
    assert found["git_commit"] is None and found["gpus"] == []


def test_whatever_ends_a_run_is_an_event_and_a_full_disk_is_told_in_words(tmp_path):
    folder = RunFolder(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    ends = [
        (full, RunFailed, "^ppo failed: .*No space left on device; make room"),
        (UserError("that won't do"), UserError, "^that won't do$"),
        (ZeroDivisionError("ours"), ZeroDivisionError, "^ours$"),
        (StageStopped("asked to"), StageStopped, "asked to"),
    ]
    for error, kind, says in ends:
        with pytest.raises(kind, match=says), failures_recorded(folder, lambda: "ppo"):
            raise error
    events = EventLog(folder.events).read()
    assert [event["what"] for event in events[1:]] == ["that won't do", "ZeroDivisionError: ours"]
    assert "No space left" in events[0]["what"] and events[0]["stage"] == "ppo"


READERS = {
    "ppo/DONE": lambda folder: prepare_folder(tiny_recipe(ppo={"steps": 5}), folder),
    "stages.json": lambda folder: folder.stage_titles,
    "environment.json": lambda folder: prepare_folder(tiny_recipe(), folder),
    "timings.json": lambda folder: run_stages(tiny_recipe(), folder, stages(folder, []), lambda state: None),
    "evaluation/summary.json": lambda folder: closing_words(folder, Console(quiet=True)),
    "ppo/metrics.jsonl": lambda folder: render(folder),
}


@crossed(
    "text, name",
    {"empty": b"", "a list": b"[]", "cut": b'{"steps": 3', "no UTF-8": b'{"a": "\xff"}', "no entries": b"{}"}, list(READERS),
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_told_with_its_name_and_what_to_do(tmp_path, name, text):
    folder = RunFolder(tmp_path)
    prepare_folder(tiny_recipe(), folder)
    run_stages(tiny_recipe(), folder, stages(folder, []), lambda state: None)
    (folder.path / "sft" / "DONE").unlink()  # so that its seconds are counted again
    rest = b'\n{"step": 1}\n' if name == "ppo/metrics.jsonl" else b""  # a last line may be cut off
    (folder.path / name).write_bytes(text + rest)
    whole = {b"{}": ("stages.json", "environment.json", "timings.json"), b"": ("ppo/metrics.jsonl",)}
    if name in whole.get(text, ()):
        READERS[name](folder)
    else:
        with pytest.raises(UserError, match=rf"^{folder.path / name} .*delete"):
            READERS[name](folder)


@pytest.mark.parametrize("text", ["", "[]", "name: tiny\nppo: {steps: [", "name: 2024-13-45"])
def test_a_damaged_recipe_of_a_run_folder_is_told(tmp_path, text):
    folder = RunFolder(tmp_path)
    prepare_folder(tiny_recipe(), folder)
    folder.recipe.write_text(text)
    with pytest.raises(UserError, match=rf"^{folder.recipe} .*; delete it to go on"):
        prepare_folder(tiny_recipe(), folder)
    for read in (render, seed_of):
        with pytest.raises(UserError, match=rf"^{folder.recipe} "):
            read(folder)


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


def test_a_critic_from_a_reward_model_of_another_tokenizer_is_refused(tmp_path):
    recipe = tiny_recipe()
    folder = write_start(recipe, RunFolder(tmp_path))
    train_tokenizer([text.upper() for text in TEXTS], 300).save_pretrained(folder.stage("reward").model)
    with pytest.raises(UserError, match="has another tokenizer than the policy.*set ppo.critic_init: sft"):
        run_ppo(recipe, folder, lambda event: None)


def test_what_is_missing_is_named_with_a_command_that_there_is(tmp_path):
    folder, log = RunFolder(tmp_path), []
    for missing, command in (("data", "sft"), ("sft", "sft"), ("reward", "reward")):
        with pytest.raises(UserError, match=rf"needs '{missing}'.*rlhf-ray run \(or {command}\)"):
            run_stages(Recipe(name="r"), folder, stages(folder, log), lambda event: None, ["ppo"])
        folder.stage(missing).path.mkdir(parents=True, exist_ok=True)
        folder.stage(missing).finish({})


def test_the_collector_rests_inside_and_works_again_after():
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), collector_paused():
        raise KeyError
    assert gc.isenabled()


def test_a_stage_that_is_none_is_told_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match="has no stage 'evaluate': it has data, sft, reward, ppo, evaluation"):
        rlhf_ray.run(tiny_recipe(), tmp_path / "run", stages=["evaluate"])
    with pytest.raises(UserError, match="has no stage 'judge': its section is null"):
        rlhf_ray.run(tiny_recipe(), tmp_path / "run", stages=["judge"])
    assert not (tmp_path / "run").exists()


def test_run_folders_of_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_folder_of(tiny_recipe(), "~/runs/x").path == tmp_path / "runs" / "x"
    says = "the home folder of a user who is not known here"
    with pytest.raises(UserError, match=says):
        run_folder_of(tiny_recipe(), "~nobody-of-that-name/x")
    with pytest.raises(UserError, match=says):
        rlhf_ray.run(tiny_recipe(), tmp_path / "run", start_from="~nobody-of-that-name/x")

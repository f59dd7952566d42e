"""The table of stages: a stage of somebody else's works end to end, and the package's own are named in one place."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import rlhf_ray
from tiny import TEXTS, tiny_recipe, write_start

import rlhf_ray as package
from rlhf_ray import Recipe, Stage, UserError, load_recipe, register_stage
from rlhf_ray.actors.checks import recipe_problems
from rlhf_ray.actors.upload import stage as stage_upload
from rlhf_ray.config import Section
from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.config.reference import main as reference_main
from rlhf_ray.config.stage_table import BUILT_IN, STAGES, all_needs_of, needs_of, stages_of_command
from rlhf_ray.config.threads import settle_threads
from rlhf_ray.runs import remote_store as stores
from rlhf_ray.runs.resume import check_resume, write_recipe
from rlhf_ray.runs.run_folder import COPIES, RunFolder

PLUGIN = Path(__file__).with_name("toy_plugin.py")


@pytest.fixture
def table():
    """What a test registers is gone after it, and so is the plugin."""
    before = dict(STAGES)
    yield STAGES
    STAGES.clear()
    STAGES.update(before)
    sys.modules.pop("toy_plugin", None)


def toy_recipe(**sections) -> Recipe:
    return build_recipe({"name": "r", "plugins": ["toy_plugin"], **sections}, [], "r")


class Config(Section):
    pass


def new(**changes) -> Stage:
    return Stage(**{"name": "extra", "title": "Extra", "words": "extra", "section": Config, "run": "m:f"} | changes)


def refusal(build) -> str:
    with pytest.raises(UserError) as caught:
        build()
    return str(caught.value)


def test_a_stage_comes_into_the_table_in_its_place(table):
    register_stage(new())
    assert list(table) == ["data", "sft", "fluency", "reward", "judge", "dpo", "extra", "ppo", "evaluation"]
    register_stage(new())  # a module that is imported under two names
    register_stage(new(name="after", before="evaluation", needs=("ppo", "extra")))
    register_stage(new(name="last", before=None))
    assert list(table)[-5:] == ["extra", "ppo", "after", "evaluation", "last"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "Two words"}, "a name of small letters"),
        ({"name": "reward"}, "has a name that is taken"),
        ({"name": "resources"}, "has a name that is taken"),
        ({"name": "logs"}, "has a name that is taken"),
        ({"section": None}, "has no section"),
        ({"run": Stage(name="x", title="x", words="x").run}, "has no `run`"),
        ({"before": "pretraining"}, "comes before 'pretraining', which is not a stage"),
        ({"needs": ("ppo",)}, "needs 'ppo', which is not among the stages before it"),
    ],
)
def test_a_stage_that_can_not_be_is_refused(table, changes, says):
    assert says in refusal(lambda: register_stage(new(**changes)))
    assert list(table) == list(BUILT_IN)


def test_a_plugin_s_supervised_stage_gets_its_threads(table):
    assert settle_threads(toy_recipe(taught={}), None, cores=4).section("taught").threads == 4


def test_a_recipe_has_the_sections_of_its_plugins(table):
    recipe = toy_recipe(toy={"steps": 3}, taught={})
    assert recipe.stages == ["data", "sft", "reward", "toy", "taught", "ppo", "evaluation"]
    assert recipe.section("toy").model_dump() == {"steps": 3, "start": 8.0}
    assert list(recipe.trained) == ["sft", "reward", "taught"]
    assert needs_of(recipe, "taught") == ("data", "toy") == all_needs_of(recipe, "taught")
    assert toy_recipe(toy=None).stages == toy_recipe().stages == ["data", "sft", "reward", "ppo", "evaluation"]
    dumped = recipe.model_dump(mode="json")
    assert Recipe.model_validate(dumped) == recipe and dumped["taught"]["answer"] == 42
    assert build_recipe(dumped, ["toy.start=2"], "r").section("toy").start == 2.0


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"toy": {"stepz": 3}}, "unknown key 'toy.stepz'; did you mean 'steps'?"),
        ({"toy": {"steps": 0}}, "'toy.steps' is 0"),
        ({"taught": {"learning_rat": 1}}, "unknown key 'taught.learning_rat'; did you mean 'learning_rate'?"),
        ({"toyy": {}}, "unknown key 'toyy'; did you mean 'toy'?"),
        ({"taught": {"batch_size": 3, "microbatch_size": 2}}, "batch_size / workers must divide by microbatch_size"),
        ({"taught": {"max_length": 512}}, "taught.max_length = 512 is longer than model.from_scratch.positions = 256"),
        ({"plugins": ["no_such_plugin"]}, "plugins: the module 'no_such_plugin' could not be imported"),
        ({"toy": {}, "plugins": []}, "unknown key 'toy'"),
    ],
)
def test_a_plugin_s_keys_are_checked_as_any(table, sections, says):
    toy_recipe()  # the table knows them
    assert says in refusal(lambda: toy_recipe(**sections))


def test_all_mistakes_are_told_at_once(table):
    lines = refusal(lambda: toy_recipe(toy={"steps": 0}, ppo={"stepz": 3}, seeed=1)).splitlines()
    assert sorted(re.findall(r"'([\w.]+)'", line)[0] for line in lines) == ["ppo.stepz", "seeed", "toy.steps"]


def test_another_process_knows_the_stage_from_the_recipe_alone(table, tmp_path):
    for sections in ({"toy": {"steps": 3}}, {}):
        (tmp_path / "recipe.pickle").write_bytes(pickle.dumps(toy_recipe(**sections)))
        code = (
            "import pickle, sys; recipe = pickle.load(open('recipe.pickle', 'rb'))\n"
            "from rlhf_ray.config.stage_table import STAGES; print(STAGES['toy'].title, recipe.section('toy'))"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PLUGIN.parent), *sys.path])}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
                              check=True, timeout=60)  # fmt: skip
        assert done.stdout.strip() == f"Toy stage {'steps=3 start=8.0' if sections else None}"


def test_doctor_asks_for_the_functions_of_a_plugin_s_stage(table, monkeypatch):
    recipe = toy_recipe(toy={})
    assert not [problem for problem in recipe_problems(recipe, data=False, hardware=False) if "toy" in problem]
    monkeypatch.delattr(sys.modules["toy_plugin"], "halve")
    problems = recipe_problems(recipe, data=False, hardware=False)
    assert any("the module 'toy_plugin' has no function 'halve'" in problem for problem in problems)


def test_a_submitted_job_takes_the_plugin_along(table, tmp_path):
    items = stage_upload(toy_recipe(toy={}), tmp_path, run_dir="/shared/run", here=PLUGIN.parent)
    assert [item.path for item in items if item.what == "your module"] == [PLUGIN]
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["toy"] == {"steps": 4, "start": 8.0}


def test_what_may_change_on_resume(table, tmp_path):
    folder = RunFolder(tmp_path)
    write_recipe(toy_recipe(toy={}), folder.recipe)
    folder.stage("data").path.mkdir()
    folder.stage("data").finish({})
    assert check_resume(toy_recipe(toy={"steps": 9}), folder) == ["toy.steps"]
    folder.stage("toy").path.mkdir()
    folder.stage("toy").finish({})
    for changed in ({"toy": {"steps": 9}}, {}):
        assert "toy.steps" in refusal(lambda changed=changed: check_resume(toy_recipe(**changed), folder))
    folder_of_others = RunFolder(tmp_path / "others")
    folder_of_others.path.mkdir()
    folder_of_others.recipe.write_text("name: r\nplugins: [no_such_plugin]\n")
    assert "others/recipe.yaml: plugins: the module 'no_such" in refusal(lambda: check_resume(toy_recipe(), folder_of_others))
    added = check_resume(toy_recipe(toy={}, taught={"answer": 1}), folder)
    assert "taught.answer" in added and {key.partition(".")[0] for key in added} == {"taught"}


def test_commands_of_the_table():
    answer = rlhf_ray("--help")
    for command, stages in {
        "sft": ["sft"], "reward": ["fluency", "reward", "judge"], "dpo": ["dpo"], "ppo": ["ppo"], "evaluate": ["evaluation"],
    }.items():  # fmt: skip
        assert stages_of_command(command) == stages and f" {command} " in answer.stdout
    answer = rlhf_ray("stage", "toyy", "demo")
    assert answer.returncode == 2 and "has no stage 'toyy': it has data, sft" in answer.stderr


def test_the_names_of_the_stages_stand_in_the_table_and_where_they_are_made():
    """What is said of all stages is read from the table: no other file names one that nothing else depends on."""
    root = Path(package.__file__).parent
    sources = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*.py")}
    places = {"config/stage_table.py", "supervised/dpo.py", "ppo/single_process_keys.py"}  # the last: a reason for each section
    assert {name for name, text in sources.items() if '"dpo"' in text} <= places
    copies = re.compile(r'"sft", "fluency", "reward"|"reward", "judge", "dpo"|"judge", "dpo"|"ppo", "dpo"')
    assert [name for name, text in sources.items() if copies.search(text)] == ["config/stage_table.py"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the plugin, prompts, and a recipe whose own stages are few."""
    here = tmp_path_factory.mktemp("workplace")
    shutil.copy(PLUGIN, here)
    start = write_start(tiny_recipe(), RunFolder(here / "start"))
    (here / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    recipe = tiny_recipe(
        model={"name_or_path": str(start.stage("sft").model)}, sft=None, reward=None,
        data={"max_prompt_tokens": 16, "prompts": [{"path": "prompts.jsonl"}], "holdout": 0.3},
        ppo={"reward_function": "builtins:len", "critic_init": "sft"},
    )  # fmt: skip
    values = recipe.model_dump(mode="json")
    values |= {"plugins": ["toy_plugin"], "toy": {"start": 16.0}, "taught": {"max_length": 64}}
    (here / "toy.yaml").write_text(yaml.safe_dump(values))
    return here


def afresh(*arguments, cwd):
    """The command line in a process that knows of a plugin what the recipe says: nothing, before it reads one."""
    for name in [name for name in STAGES if name not in BUILT_IN]:
        del STAGES[name]
    sys.modules.pop("toy_plugin", None)
    return rlhf_ray(*arguments, cwd=cwd)


def test_a_plugin_s_stage_from_its_run_to_the_report(table, workplace, monkeypatch):
    """tests/test_demo.py has one beside the stages that need Ray."""
    monkeypatch.delitem(sys.modules, "toy_plugin", raising=False)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if Path(each) != PLUGIN.parent])
    run, command = RunFolder(workplace / "run"), ("stage", "toy", "toy.yaml", "--run-dir", "run")
    done = afresh(*command, "--set", "toy.steps=3", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "a toy's turn" in done.stdout
    assert run.stage("toy").summary() == {"steps": 3, "final_loss": 2.0}  # 16 halved three times
    recorded = yaml.safe_load(run.recipe.read_text())
    assert recorded["toy"] == {"steps": 3, "start": 16.0} and recorded["plugins"] == ["toy_plugin"]
    assert recorded["taught"]["threads"] >= 1
    assert json.loads((run.path / "timings.json").read_text()).keys() == {"data", "toy"}

    (workplace / "toy_plugin.py").rename(workplace / "away.py")  # a report runs nothing of a plugin
    told = afresh("report", "run", cwd=workplace)
    assert told.returncode == 0, told.stderr
    page = run.report.read_text()
    assert "Toy stage" in page and "Taught stage" in page and "final_loss" in page
    assert ": 2.000</title>" in page  # the last point of its curve
    gone = afresh(*command, cwd=workplace)
    assert gone.returncode == 2 and "plugins: the module 'toy_plugin' could not be imported" in gone.stderr
    (workplace / "away.py").rename(workplace / "toy_plugin.py")

    again = afresh(*command, "--set", "toy.steps=3", cwd=workplace)
    assert again.returncode == 0 and "a toy's turn: done before" in again.stdout
    other = afresh(*command, "--set", "toy.steps=5", cwd=workplace)
    assert other.returncode == 2 and "toy.steps (3 -> 5) can't change on resume" in other.stderr


def test_a_stage_by_its_name_and_one_taken_over(table, workplace):
    alone = rlhf_ray("stage", "toy", "toy.yaml", "--run-dir", "alone", cwd=workplace)
    assert alone.returncode == 0, alone.stderr
    first = RunFolder(workplace / "alone")
    assert alone.stdout.splitlines()[-1] == str(first.stage("toy").path)
    assert sorted(path.name for path in first.path.iterdir() if path.is_dir()) == ["data", "toy"]
    plan = rlhf_ray("doctor", "toy.yaml", cwd=workplace)
    assert plan.returncode == 0, plan.stderr
    assert "stages: data, a toy's turn, teaching, PPO, evaluation" in plan.stdout

    more = ("stage", "toy", "toy.yaml", "--run-dir", "second", "--start-from", "alone")
    taken = rlhf_ray(*more, cwd=workplace)
    assert taken.returncode == 0 and "a toy's turn: done before" in taken.stdout
    refused = rlhf_ray(*more[:-3], "third", "--start-from", "alone", "--set", "toy.start=1", cwd=workplace)
    assert refused.returncode == 2 and "toy.start (16.0 -> 1.0)" in refused.stderr


@pytest.mark.thorough
def test_a_run_in_a_store_by_the_command_line(table, workplace, monkeypatch):
    """Its copy on this host deleted in between. tests/test_run_in_store.py has what the store holds, and when."""
    monkeypatch.setenv(COPIES, str(workplace / "copies"))
    url = f"file://{workplace}/store/run"
    command = ("stage", "toy", "toy.yaml", "--run-dir", url)
    plan = rlhf_ray("doctor", "toy.yaml", "--run-dir", url, cwd=workplace)
    assert plan.returncode == 0, plan.stderr
    assert not list((workplace / "store").rglob("*.*")), "what was written to see whether it can be is gone"
    done = rlhf_ray(*command, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{url}/toy"
    shutil.rmtree(workplace / "copies")
    told = rlhf_ray("status", url)
    assert told.stdout.startswith("finished") and "done: data, toy" in told.stdout
    again = rlhf_ray(*command, cwd=workplace)
    assert again.returncode == 0 and "a toy's turn: done before" in again.stdout and "fetched the run from" in again.stdout
    other = rlhf_ray(*command, "--set", "toy.steps=5", cwd=workplace)
    assert other.returncode == 2 and "can't change on resume" in other.stderr
    taken = rlhf_ray("stage", "toy", "toy.yaml", "--run-dir", "of-the-store", "--start-from", url, cwd=workplace)
    assert taken.returncode == 0 and "a toy's turn: done before" in taken.stdout
    monkeypatch.setattr(stores, "CHECK_DEADLINE_S", 0.1)
    blocked = workplace / "store" / "file"
    blocked.write_text("")
    for command in ("doctor", "run"):
        refused = rlhf_ray(command, "toy.yaml", "--run-dir", f"file://{blocked}/run", cwd=workplace)
        assert refused.returncode == 2 and f"file://{blocked}/run can't be written" in refused.stderr


def test_the_library_s_own_door(table, workplace, monkeypatch):
    """`rlhf_ray.run` with the stages that need no Ray."""
    monkeypatch.chdir(workplace)
    recipe = load_recipe("toy.yaml", ["toy.steps=1"])
    folder = package.run(recipe, "library", stages=["data", "toy"])
    assert folder.stage("toy").summary() == {"steps": 1, "final_loss": 8.0}
    assert folder.stage_titles["toy"] == "Toy stage"


def test_the_reference_has_the_sections_of_plugins(table, capsys):
    assert reference_main(["--plugins", "toy_plugin"]) == 0
    text = capsys.readouterr().out
    assert "#### `toy`" in text and "| `start` | number > 0 | `8` | the loss at first |" in text
    assert "| `answer` | integer | `42` | what it leaves |" in text


POLICY_PLUGIN = """
from rlhf_ray import Stage, register_stage
from rlhf_ray.config import Section
from rlhf_ray.config.stage_table import StageModel

class Config(Section):
    pass

register_stage(Stage(name="polished", title="P", words="p", section=Config, run="m:f", before="evaluation",
                     model=StageModel(kind="policy", words="a polished policy")))
"""


def test_a_server_of_a_run_takes_the_policy_of_a_plugins_stage(table, tmp_path, monkeypatch):
    """The last stage with a policy is the plugin's; the process knows of it from the run's recipe only."""
    from rlhf_ray.serving.config import Limits
    from rlhf_ray.serving.server import Server

    run = RunFolder(tmp_path / "run")
    for stage in ("sft", "ppo", "polished"):
        run.stage(stage).model.mkdir(parents=True)
        (run.stage(stage).model / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
        (run.stage(stage).model / "model.safetensors").touch()
    run.recipe.write_text("name: r\nplugins: [polishing_plugin]\npolished: {}\n")
    options = {"more_models": {},
               "host": "127.0.0.1", "port": 0, "api_key": None, "name": None, "replicas": 1, "gpus": None, "threads": None,
               "precision": "auto", "engine": None, "trust_remote_code": False, "allow_special_tokens": False, "limits": Limits(),
               "allowed_hosts": (), "cors_origins": ()}  # fmt: skip
    without = Server(run.path, **options)
    (model,) = without.models
    assert model.folder == run.stage("ppo").model and "the module 'polishing_plugin' could not" in model.engine.note
    (tmp_path / "polishing_plugin.py").write_text(POLICY_PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    with_it = Server(run.path, **options)
    (model,) = with_it.models
    assert model.folder == run.stage("polished").model and model.engine.note is None
    sys.modules.pop("polishing_plugin", None)

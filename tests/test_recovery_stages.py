"""Evaluation and supervised stages whose processes die, stop or lose their controller. Real processes, real signals."""

import json
import os
import shutil
import signal

import pytest
from cats import STAGE, cats_folder, cats_tokenizer, recipe_of  # noqa: F401 - fixtures
from safetensors.torch import load_file
from test_evaluation import recipe as evaluation_recipe
from test_evaluation import run_folder  # noqa: F401 - a fixture

from rlhf_ray.actors.evaluation import evaluate_in_an_actor
from rlhf_ray.actors.supervised import run_supervised
from rlhf_ray.evaluation.evaluate import evaluate
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder

pytestmark = pytest.mark.ray


def named_actors(part):
    import ray

    return [each for each in ray.util.list_named_actors(all_namespaces=True) if part in each["name"].lower()]


@pytest.mark.thorough
def test_an_evaluation_that_dies_and_hangs_ends_in_the_same_figures(faults_file, run_folder, tmp_path):  # noqa: F811
    def copy(name):
        shutil.copytree(run_folder.path, tmp_path / name, ignore=shutil.ignore_patterns("evaluation"))
        return RunFolder(tmp_path / name)

    recipe = evaluation_recipe(resources={"generation": {"threads": 1}})
    wanted = evaluate(recipe, copy("undisturbed"))
    points = [(2, "kill"), (4, "stop"), (6, "exception")]  # a call per chunk, counted over restarts
    point = {"role": "evaluation", "rank": 0, "method": "told", "when": "before"}
    faults_file.write_text(json.dumps([point | {"call": call, "kind": kind} for call, kind in points]))
    folder, said = copy("disturbed"), []
    evaluate_in_an_actor(recipe, folder, lambda state: said.append(state.get("say")))
    found = folder.stage("evaluation").summary()
    assert {key for key in found if found[key] != wanted[key]} <= {"seconds"}
    samples = [RunFolder(tmp_path / name).path / "evaluation" / "samples.jsonl" for name in ("undisturbed", "disturbed")]
    assert samples[0].read_bytes() == samples[1].read_bytes()
    events = EventLog(folder.events).read()
    assert [(event["what"], event["role"], event["phase"]) for event in events] == [
        ("evaluation actor 0 was lost", "evaluation", "evaluation")
    ] * 3
    assert "died" in events[0]["seen"] and "is stopped" in events[1]["seen"] and "a fault for tests" in events[2]["seen"]
    assert [event["step"] for event in events] == sorted(event["step"] for event in events) and events[0]["step"] > 0
    assert sum(line is not None and "was lost after" in line for line in said) == 3


@pytest.mark.slow
def test_a_stopped_worker_and_a_dead_controller_cost_no_step(session, cats_folder, tmp_path):  # noqa: F811
    """The worker is stopped, then the controller of Ray Train killed: the stage ends in the undisturbed one's weights."""
    import ray

    def run(name, disturb=None):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        os.symlink(cats_folder.path / "data", folder.path / "data")
        recipe = recipe_of(sft=STAGE | {"max_steps": 150, "checkpoint_minutes": 0.02})
        run_supervised(recipe, folder, "sft", on_progress=None if disturb is None else lambda state: disturb(folder))
        return folder, load_file(folder.stage("sft").model / "model.safetensors")

    done = []

    def disturb(folder):
        if len(done) < 2 and list(folder.stage("sft").checkpoints.glob("checkpoint-*/MANIFEST.json")):
            step = len(folder.stage("sft").metrics.read_text().splitlines())
            if not done:
                note = next((folder.logs / "ray_train").glob("*.processes/0.json"))
                os.kill(json.loads(note.read_text())["pid"], signal.SIGSTOP)
                done.append(step)
            elif step > done[0] and EventLog(folder.events).read():
                (controller,) = named_actors("train")
                ray.kill(ray.get_actor(**controller))
                done.append(step)

    _, wanted = run("undisturbed")
    folder, found = run("disturbed", disturb)
    assert len(done) == 2
    assert all((found[name] == wanted[name]).all() for name in wanted)
    rows = [json.loads(line)["step"] for line in folder.stage("sft").metrics.read_text().splitlines()]
    assert rows == list(range(1, 151))
    told = [(event.get("role"), event["what"].partition(" worker")[0]) for event in EventLog(folder.events).read()]
    assert told[0] == (None, "sft") and ("controller", "the controller of sft was lost") in told

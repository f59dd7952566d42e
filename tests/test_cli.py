"""Mistakes are answered in one sentence with the value and the remedy, exit code 2, and no traceback."""

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from command import rlhf_ray

from rlhf_ray.actors.checks import recipe_problems
from rlhf_ray.actors.session import ray_session
from rlhf_ray.config import Recipe
from rlhf_ray.data.paths import absolute_paths
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder


def in_a_process(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "rlhf_ray.cli.main", *args], capture_output=True, text=True, timeout=120,
                          check=False)  # fmt: skip


def recipe_file(folder, **sections):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "own", **sections}))
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PAIRS = [{"prompt": f"Question {i}?", "chosen": f"A good answer {i}.", "rejected": f"bad {i}"} for i in range(40)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demp"], "did you mean 'demo'"),
        (["demo", "--set", "ppo.stepz=3"], "did you mean 'steps'"),
        (["demo", "--set", "ppo.steps=many"], "'ppo.steps' is 'many'"),
        (["demo", "--set", "ppo.minibatch_size=48"], "is not a multiple of 48"),
        (["demo", "--set", "generation.max_new_tokens=500"], "longer than"),
        (["demo", "--set", "ppo.steps"], "write key=value"),
        (["imdb", "--set", "data.root=/nowhere"], "'/nowhere' is not there"),
        # Starts a Ray; tests/test_ppo_ray.py asks one that runs.
        pytest.param(["demo", "--set", "resources.generation.cpus=1000"], "the cluster has", marks=pytest.mark.slow),
        (["demo", "--run-dir", "nosuch://bucket/run"], "is of no kind that is known"),
    ],
)
def test_run_refuses_in_words(arguments, says, tmp_path):
    if "--run-dir" not in arguments:
        arguments = [*arguments, "--run-dir", str(tmp_path / "run")]
    starts_ray = says == "the cluster has"
    answer = (in_a_process if starts_ray else rlhf_ray)("run", *arguments)
    assert answer.returncode == 2
    assert says in answer.stderr
    assert "Traceback" not in answer.stderr + answer.stdout


@pytest.mark.parametrize("command", ["run", "doctor", "report", "status", "serve"])
def test_a_path_that_no_system_takes_is_told_by_every_command(command):
    answer = rlhf_ray(command, "x/" * 3000)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1, answer.stderr
    assert "File name too long" in answer.stderr and len(answer.stderr) < 600


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (None, "does not exist"),
        ([], "has no rows"),
        ([{"question": "a", "answer": "b"}], "question"),
    ],
)
def test_doctor_names_what_is_wrong_with_the_data(rows, says, tmp_path):
    path = str(tmp_path / "pairs.jsonl") if rows is None else write_jsonl(tmp_path / "pairs.jsonl", rows)
    source = [{"path": path}]
    recipe = recipe_file(tmp_path, data={"sft": source, "preferences": source})
    answer = rlhf_ray("doctor", str(recipe), cwd=tmp_path)
    assert answer.returncode == 2
    assert says in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "127.0.0.1:99999", "no-address"])
def test_a_cluster_that_is_not_there_is_told_at_once(address):
    """Ray itself goes on trying for more than ten minutes where a port is closed."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        address = address.format(port=closed.getsockname()[1])
        started = time.monotonic()
        says = f"no Ray cluster answers at '{re.escape(address)}'.*leave out --address"
        with pytest.raises(UserError, match=says), ray_session(address):
            pass
    assert time.monotonic() - started < 15


def test_doctor_names_every_problem_at_once(tmp_path):
    recipe = recipe_file(
        tmp_path,
        data={"sft": [{"path": "missing.jsonl"}], "preferences": [{"path": write_jsonl(tmp_path / "p.jsonl", PAIRS)}]},
        ppo={"reward_function": "no_such_module:score"},
        resources={"policy": {"actors": 16, "cpus": 4}},
    )
    answer = rlhf_ray("doctor", str(recipe), cwd=tmp_path)
    assert answer.returncode == 2
    for part in ("missing.jsonl", "no_such_module", "the cluster has"):
        assert part in answer.stderr, answer.stderr


def test_doctor_prints_the_plan_of_a_good_recipe(tmp_path):
    answer = rlhf_ray("doctor", "demo", "--run-dir", str(tmp_path / "run"))
    assert answer.returncode == 0, answer.stderr
    for role in ("generation", "reward", "reference", "policy", "critic", "nothing stands in the way"):
        assert role in answer.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_the_installed_command_finds_a_builder_in_the_working_directory(tmp_path):
    """Its sys.path starts with the folder of the script, where `python -m` has the working directory."""
    (tmp_path / "own_data.py").write_text("def build(root, seed): ...\n")
    recipe = recipe_file(tmp_path, data={"builder": "own_data:build"})
    script = Path(sys.executable).parent / "rlhf-ray"
    answer = subprocess.run([script, "doctor", str(recipe)], capture_output=True, text=True, cwd=tmp_path, timeout=120,
                            check=False)  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert "nothing stands in the way" in answer.stdout


def test_a_packaged_recipe_is_found_beside_a_folder_of_its_name(tmp_path):
    (tmp_path / "demo").mkdir()
    answer = rlhf_ray("doctor", "demo", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr


def test_what_checks_a_ppo_run_imports_no_transformers():
    """It stands before every start: two seconds where it loads transformers, half a second for datasets."""
    code = (
        "import sys; from rlhf_ray.config.recipe_file import load_recipe\n"
        "from rlhf_ray.actors.run_recipe import object_store_bytes\nfrom rlhf_ray.data.paths import absolute_paths\n"
        "from rlhf_ray.actors.checks import check_memory, recipe_problems\nfrom rlhf_ray.actors.nodes import this_machine\n"
        "import rlhf_ray.actors.ppo_stage, rlhf_ray.actors.session, rlhf_ray.actors.ray_stages\n"
        "recipe = absolute_paths(load_recipe('demo', []))\n"
        "assert recipe_problems(recipe, data=False) == [] and object_store_bytes(recipe) > 0\n"
        "check_memory(recipe, [this_machine()], here=True, stages=recipe.stages)\n"
        "print(sorted({'transformers', 'datasets', 'deepspeed', 'trl', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_model_folders_become_absolute_and_the_runs_own_models_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "fluency", "from_scratch"):
        Path(name).mkdir()
    bases = {"reward": {"base": "mine"}, "judge": {"base": "fluency"}, "fluency": {}}
    recipe = absolute_paths(Recipe.model_validate({"name": "own", **bases}))
    assert (recipe.reward.base, recipe.judge.base) == (str(tmp_path / "mine"), "fluency")
    assert recipe.model.is_from_scratch
    own = Recipe.model_validate({"name": "own", "model": {"name_or_path": "mine"}, "reward": {"base": "org/name"}})
    own = absolute_paths(own)
    assert (own.model.name_or_path, own.reward.base) == (str(tmp_path / "mine"), "org/name")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_precision_is_asked_of_this_machine_only_where_the_run_computes_here():
    gpu = {"policy": {"gpus": 1}, "generation": {"gpus": 1}}
    sections = {"ppo": {"precision": "bfloat16"}, "generation": {"precision": "bfloat16"}, "resources": gpu}
    recipe = Recipe.model_validate({"name": "own", "sft": {"precision": "bfloat16", "gpus_per_worker": 1}, **sections})
    problems = recipe_problems(recipe, data=False)
    assert [problem.partition(",")[0] for problem in problems] == [
        f"{section}.precision is 'bfloat16'" for section in ("sft", "ppo", "generation")
    ]
    assert recipe_problems(recipe, data=False, hardware=False) == []


def test_reward_trains_what_the_recipe_has_of_the_models_that_score(tmp_path):
    ppo = {"reward_function": "builtins:len", "critic_init": "sft"}
    run = RunFolder(tmp_path / "run")
    for name in ("data", "sft", "judge"):
        run.stage(name).path.mkdir(parents=True)
        run.stage(name).finish({})
    with_judge = recipe_file(tmp_path, reward=None, judge={}, ppo=ppo)
    answer = rlhf_ray("reward", str(with_judge), "--run-dir", str(run.path))
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == str(run.stage("judge").path)
    without = recipe_file(tmp_path, reward=None, ppo=ppo)
    answer = rlhf_ray("reward", str(without), "--run-dir", str(tmp_path / "other"))
    assert answer.returncode == 2 and "has no stage 'reward'" in answer.stderr


def test_export_refuses_what_holds_no_model(tmp_path):
    answer = rlhf_ray("export", str(tmp_path), str(tmp_path / "out"))
    assert answer.returncode == 2 and "holds no model" in answer.stderr


def test_report_refuses_what_is_no_folder(tmp_path):
    answer = rlhf_ray("report", str(tmp_path / "none"))
    assert answer.returncode == 2 and "is not a folder" in answer.stderr


def test_serve_needs_a_key_beyond_loopback(tmp_path):
    answer = rlhf_ray("serve", str(tmp_path), "--host", "0.0.0.0")
    assert answer.returncode == 2 and "Traceback" not in answer.stderr


def test_dpo_is_a_stage_of_its_own(tmp_path):
    run, recipe = RunFolder(tmp_path / "run"), str(recipe_file(tmp_path))
    for name in ("data", "sft", "dpo"):
        run.stage(name).path.mkdir(parents=True)
        run.stage(name).finish({})
    answer = rlhf_ray("dpo", recipe, "--set", "dpo.beta=0.2", "--run-dir", str(run.path))
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == str(run.stage("dpo").path)
    assert yaml.safe_load(run.recipe.read_text())["dpo"]["beta"] == 0.2
    answer = rlhf_ray("dpo", recipe, "--run-dir", str(tmp_path / "other"))
    assert answer.returncode == 2 and "has no stage 'dpo': its section is null" in answer.stderr


def test_doctor_tells_a_trait_function_that_is_not_there():
    evaluation = {"trait_function": "rlhf_ray.data.world:trait"}
    recipe = Recipe.model_validate({"name": "own", "evaluation": evaluation})
    (problem,) = recipe_problems(recipe, data=False)
    assert "the module 'rlhf_ray.data.world' has no function 'trait'; did you mean 'traits'?" in problem

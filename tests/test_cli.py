"""Mistakes are answered in one sentence with the value and the remedy, exit code 2, and no traceback."""

import json
import subprocess
import sys

import pytest
import yaml


def rlhf_ray(*args, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "rlhf_ray.cli.main", *args], capture_output=True, text=True, cwd=cwd,
                          timeout=120, check=False)  # fmt: skip


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
        (["demo", "--set", "resources.generation.actors=64"], "the cluster has"),
        (["demo", "--run-dir", "s3://bucket/run"], "is a URI"),
    ],
)
def test_run_refuses_in_words(arguments, says, tmp_path):
    if "--run-dir" not in arguments:
        arguments = [*arguments, "--run-dir", str(tmp_path / "run")]
    answer = rlhf_ray("run", *arguments)
    assert answer.returncode == 2
    assert says in answer.stderr
    assert "Traceback" not in answer.stderr + answer.stdout


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


def test_export_refuses_what_holds_no_model(tmp_path):
    answer = rlhf_ray("export", str(tmp_path), str(tmp_path / "out"))
    assert answer.returncode == 2 and "holds no model" in answer.stderr


def test_report_refuses_what_is_no_folder(tmp_path):
    answer = rlhf_ray("report", str(tmp_path / "none"))
    assert answer.returncode == 2 and "is no folder" in answer.stderr


def test_serve_needs_a_key_beyond_loopback(tmp_path):
    answer = rlhf_ray("serve", str(tmp_path), "--host", "0.0.0.0")
    assert answer.returncode == 2 and "Traceback" not in answer.stderr

"""Runs side by side."""

import json

import numpy as np
import pytest
import yaml

from rlhf_ray.config import Recipe
from rlhf_ray.report.compare import band, compare, main, seed_of
from rlhf_ray.runs.resume import write_recipe
from rlhf_ray.runs.run_folder import RunFolder

INTERVAL = {"low": 0.0, "high": 9.0}


def finished(path, seed, scores, kl, ppo=None) -> RunFolder:
    folder = RunFolder(path)
    write_recipe(Recipe.model_validate({"name": "t", "seed": seed, "ppo": ppo or {}}), folder.recipe)
    (path / "environment.json").write_text(json.dumps({"cpus": 2, "cpu": "a CPU", "gpus": []}))
    folder.stage("ppo").path.mkdir()
    rows = [
        {"step": step, "episodes": 8 * step, "objective/score": score} for step, score in enumerate(scores, start=1)
    ]
    folder.stage("ppo").metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {
        "judge": {"mean": 5.0 + seed, **INTERVAL},
        "score": {"mean": 1.0, **INTERVAL},
        "length": {"mean": 20.0, **INTERVAL},
    }
    summary = {
        "sft": model, "ppo": model, "win_rate": {"judge": {"mean": 0.5 + 0.1 * seed, **INTERVAL}, "reward_model": None},
        "kl": kl, "kl_interval": {"mean": kl, **INTERVAL}, "difference": {}, "ratio": {}, "prompts": 4, "seeds": [0],
        "sampling": {"temperature": 1.0},
    }  # fmt: skip
    folder.stage("evaluation").path.mkdir()
    (folder.stage("evaluation").path / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_table_has_means_and_ranges_and_the_runs_are_recorded(tmp_path):
    runs = [finished(tmp_path / f"{seed}", seed, [1, 2], kl=2.0 + seed) for seed in (0, 1, 2)]
    page = compare(tmp_path / "out", {"ppo": runs, "alone": runs[:1]}).read_text()
    line = next(line for line in page.splitlines() if line.startswith("| ppo |"))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "ppo", "0, 1, 2", "0.6 (0.5 to 0.7)", "–", "6 (5 to 7)", "6 (5 to 7)", "1 (1 to 1)", "3 (2 to 4)", "–", "20 (20 to 20)",
    ]  # fmt: skip
    assert "| alone | 0 | 0.5 |" in page and "DPO" not in page
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((tmp_path / "out" / "ppo" / "seed_1" / "recipe.yaml").read_text())["seed"] == 1


def test_a_dpo_model_has_a_line_of_its_own(tmp_path):
    run = finished(tmp_path / "run", 0, [1], kl=1.0)
    path = run.stage("evaluation").path / "summary.json"
    summary = json.loads(path.read_text())
    rates = {"win_rate": {"judge": {"mean": 0.75, **INTERVAL}, "reward_model": None}}
    over = rates | {"kl": 4.5, "kl_interval": None, "difference": {}, "ratio": {}}
    dpo = {"dpo": summary["sft"] | {"judge": {"mean": 7.0, **INTERVAL}}, "dpo_over_sft": over, "ppo_over_dpo": rates}
    path.write_text(json.dumps(summary | dpo))
    page = compare(tmp_path / "out", {"ppo": [run]}).read_text()
    assert "| DPO | 0 | 0.75 | – | 7 | 5 | 1 | 4.5 | – | 20 |" in page


def test_runs_without_an_evaluation_have_no_table(tmp_path):
    run = finished(tmp_path / "run", 3, [1, 2], kl=1.0)
    (run.stage("evaluation").path / "summary.json").unlink()
    page = compare(tmp_path / "out", {"ppo": [run]}).read_text()
    assert "|" not in page and page.endswith("Runs of PPO without an evaluation of their models. ppo: seeds 3.\n")


def test_the_band_is_over_the_steps_that_all_runs_have():
    one = [{"step": 1, "x": 10, "y": 1.0}, {"step": 2, "x": 20, "y": 2.0}, {"step": 3, "x": 30}]
    other = [{"step": 1, "x": 10, "y": 4.0}, {"step": 2, "x": 40, "y": 0.0}]
    xs, low, mean, high = band([one, other], "x", "y")
    np.testing.assert_array_equal(xs, [10, 30])
    np.testing.assert_array_equal([low, mean, high], [[1, 0], [2.5, 1], [4, 2]])
    assert all(len(part) == 0 for part in band([one, []], "x", "y"))
    start = [{"step": 0, "y": 7.0}, *one]
    np.testing.assert_array_equal(band([start], "x", "y")[0], [0, 10, 20])


def test_ppo_runs_of_one_start_are_told_apart_by_their_own_seed(tmp_path):
    assert seed_of(finished(tmp_path / "run", 0, [1], kl=1.0, ppo={"seed": 4})) == 4


@pytest.mark.parametrize(("argument", "says"), [("runs/x", "write LABEL=RUN_DIR"), ("a=nowhere", "is not a run folder")])
def test_mistakes_in_words(tmp_path, capsys, argument, says):
    assert main([str(tmp_path), argument]) == 2
    assert says in capsys.readouterr().err

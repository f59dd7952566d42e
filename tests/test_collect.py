"""Recorded results: they load as recipes and say nothing of the machine that they were made on."""

import json

import pytest

from rlhf_ray.config import Recipe
from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.report.collect import collect
from rlhf_ray.report.page import write_report
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.resume import write_recipe
from rlhf_ray.runs.run_folder import RunFolder

FIGURE = {"mean": 1.0, "low": 0.5, "high": 1.5}
KEYS = ("score", "perplexity", "length", "eos_rate", "distinct_2", "repetition")
SUMMARY = {model: dict.fromkeys(KEYS, FIGURE) | {"judge": None, "relevance": None} for model in ("sft", "ppo")} | {
    "win_rate": {"reward_model": FIGURE, "judge": None}, "kl": 1.0, "kl_interval": FIGURE, "prompts": 4, "seeds": [0],
    "sampling": {"temperature": 1.0}, "difference": {}, "ratio": {"distinct_2": FIGURE}, "definitions": {}, "missing": {},
}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A finished run whose recipe, events and summary name folders of this machine, one of them with a space and a 'é'."""
    home = tmp_path / "höme of me" / "a long name so that YAML has to break the line that holds it"
    folder = RunFolder(home / "runs" / "mine")
    recipe = Recipe.model_validate({
        "name": "mine",
        "model": {"name_or_path": f"{home}/models/base"},
        "data": {"sft": [{"path": f"{home}/données/1234"}], "preferences": [{"path": "org/hub-name"}],
                 "builder_args": {"vocabulary": f"{home}/words.txt", "parts": [f"{folder.path}/data"]}},
        "reward": {"base": f"{home}/runs/other/sft/model"},
        "judge": {"base": "sft"},
    })  # fmt: skip
    write_recipe(recipe, folder.recipe)
    for name in ("environment.json", "timings.json"):
        (folder.path / name).write_text(json.dumps({"cpus": 2, "cpu": "x", "gpus": []} if name[0] == "e" else {}))
    (folder.path / "evaluation").mkdir()
    (folder.path / "evaluation" / "summary.json").write_text(json.dumps(SUMMARY | {"reward": f"{home}/models/base"}))
    row = {"response": f"see {home}/words.txt.", "score": 1.0, "tokens": 3, "ended": True}
    sample = {"prompt": "a/data b", "index": 0, "seed": 0, "sft": row, "ppo": row}
    (folder.path / "evaluation" / "samples.jsonl").write_text(json.dumps(sample, ensure_ascii=False) + "\n")
    folder.stage("ppo").finish({"steps": 1, "model": str(folder.stage("ppo").model)})
    EventLog(folder.events).add(f"{folder.path}/ppo is full\n{home}/données/1234 too", "stopped")
    write_report(folder)
    return folder


def test_no_path_of_the_machine_is_recorded(run, tmp_path):
    collect(tmp_path / "out", [run])
    target = tmp_path / "out" / "seed_0"
    files = {file.name: file.read_text() for file in target.iterdir()}
    assert {"recipe.yaml", "summary.json", "samples.jsonl", "events.jsonl", "report.html", "ppo.json"} <= files.keys()
    for name, text in files.items():
        for trace in (str(tmp_path), "höme", "h\\u00f6me", "a long name"):
            assert trace not in text, (name, text[max(text.find(trace) - 200, 0) :][:400])
    assert json.loads(files["events.jsonl"])["what"] == "mine/ppo is full\n1234 too"
    assert json.loads(files["ppo.json"])["model"] == "mine/ppo/model"
    assert json.loads(files["samples.jsonl"])["prompt"] == "a/data b"

    recipe = load_recipe(str(target / "recipe.yaml"))
    assert recipe.model.name_or_path == "base" and recipe.data.sft[0].path == "1234"
    assert recipe.data.preferences[0].path == "org/hub-name"
    assert recipe.data.builder_args == {"vocabulary": "words.txt", "parts": ["mine/data"]}
    assert recipe.reward.base == "./model" and recipe.judge.base == "sft"  # 'model' would be the recipe's own

"""Modules of one's own that change between two goes of a run."""

import hashlib
import json
import sys

from rlhf_ray.config import Recipe
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.pipeline import prepare_folder
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.tables.figures import FIGURES, Figure


def test_a_figure_that_is_gone_from_a_plugin_is_noted_once(tmp_path):
    recipe, folder = Recipe(name="r"), RunFolder(tmp_path / "run")

    def noted():
        prepare_folder(recipe, folder)
        return [event["what"] for event in EventLog(folder.events).read()] if folder.events.exists() else []

    FIGURES.add(Figure(name="commas", measure=lambda evidence: None, label="Commas", unit="per response"))
    try:
        assert noted() == noted() == []
    finally:
        FIGURES.remove("commas")
    says = ["no plugin has the figure 'commas' any more, which one had when this run folder was last used"]
    assert noted() == noted() == says
    assert EventLog(folder.events).read()[0]["done"] == "the evaluation does not measure it"


def test_a_module_that_has_changed_is_noted_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own_plugin", "own_scores", "own_judge"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # other tests have modules of these names
        (tmp_path / f"{name}.py").write_text("def score(prompts, responses): ...\n")
    recipe = Recipe(
        name="r", plugins=("own_plugin",), ppo={"reward_function": "own_scores:score", "critic_init": "sft"}, reward=None,
        evaluation={"judge_function": "own_judge:score", "trait_function": "rlhf_ray.data.world:traits"},
    )  # fmt: skip
    folder = RunFolder(tmp_path / "run")

    def noted():
        prepare_folder(recipe, folder)
        return [event["what"] for event in EventLog(folder.events).read()] if folder.events.exists() else []

    assert noted() == noted() == []
    modules = json.loads((folder.path / "environment.json").read_text())["modules"]
    assert modules == dict.fromkeys(
        ("own_judge", "own_plugin", "own_scores"), hashlib.sha256(b"def score(prompts, responses): ...\n").hexdigest()
    )
    for name in ("own_plugin", "own_scores"):
        (tmp_path / f"{name}.py").write_text("def score(prompts, responses): return 1\n")
    says = [f"the module {name} has changed since this run folder was last used" for name in ("own_plugin", "own_scores")]
    assert noted() == noted() == says

"""What the terminal says of dropped rows, of stages that go on and of a call that lacks something; cards without local paths."""

import io
import json
import os
import signal
import time

import pytest
import typer
from command import rlhf_ray
from processes import Fork
from rich.console import Console

from rlhf_ray.cli.display import Display
from rlhf_ray.cli.main import app
from rlhf_ray.config import Recipe
from rlhf_ray.data.dropped_rows import dropped_in_words, losses
from rlhf_ray.models.card import model_card
from rlhf_ray.runs import pipeline
from rlhf_ray.runs.pipeline import to_reopen
from rlhf_ray.runs.run_folder import RunFolder


def entry(read, dropped, source="dialogues.jsonl"):
    return {"source": source, "read": read, "kept": read - sum(dropped.values()), "dropped": dropped, "cut": {}}


def test_dropped_rows_are_one_line_and_more_than_a_tenth_a_warning():
    summary = {"sources": {
        "sft": [entry(50, {"empty_reply": 36})],
        "preferences": [entry(100, {"tie": 3, "over_long": 7}, "pairs.csv"), entry(100, {"tie": 11}, "more.csv")],
        "judge": [entry(10, {})],
        "prompts_train": [entry(100, {"duplicate": 90}, "the train rows of preferences")],
        "prompts_not_in_eval": [entry(100, {"in_eval_prompts": 50}, "the prompts that are left")],
        "prompts": [entry(40, {"surplus_of_mix": 39}, "mixed.jsonl")],
    }}  # fmt: skip
    (line,) = dropped_in_words(summary)
    assert "36 of 50 rows of data.sft 'dialogues.jsonl' (36 empty_reply)" in line
    assert "10 of 100 rows of data.preferences 'pairs.csv' (7 over_long, 3 tie)" in line
    assert "the train rows" not in line and "mixed.jsonl" not in line and "\n" not in line
    warnings = losses(summary)
    assert [warning.split("'")[1] for warning in warnings] == ["dialogues.jsonl", "more.csv"]
    assert "72 % of the rows" in warnings[0] and "a dialogue that ends with the user's turn: 36" in warnings[0]
    assert dropped_in_words({"sources": {"sft": [entry(5, {})]}}) == []


def shown(*events):
    screen = io.StringIO()
    display = Display(Console(file=screen, width=200))
    for event in events:
        display(event)
    return screen.getvalue()


def test_the_terminal_says_where_a_stage_goes_on_and_both_times():
    said = shown(
        {"stage": "sft", "started": True},
        {"stage": "sft", "goes_on_from": 40},
        {"stage": "data", "say": "warning: [red]72 %[/] of the rows", "warns": True},
        {"stage": "sft", "done": True, "seconds": 100.0, "seconds_before": 70.0},
        {"stage": "reward", "done": True, "seconds": 30.0, "seconds_before": 0.0},
    )
    assert "goes on from step 40" in said and "warning: [red]72 %[/] of the rows" in said
    assert "1 min 40 s (30 s of it now)" in said and "30 s\n" in said.splitlines(keepends=True)[-1]


def recipe(**values):
    return Recipe.model_validate({"name": "r", **values})


def test_a_stages_time_is_the_sum_of_its_parts_even_of_one_that_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "RECORD_S", 0.05)
    told = tmp_path / "told"

    def part(ends):
        def stage(recipe, folder, progress):
            for _ in range(10):
                time.sleep(0.05)
                progress({"stage": "data", "step": 1})
            if ends == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if ends == "fails":
                raise SystemExit(3)
            return {}

        def tell(event):
            if event.get("done"):
                told.write_text(f"{event['seconds_before']} {event['seconds']}")

        return Fork(lambda: pipeline.run_stages(recipe(), RunFolder(tmp_path), {"data": stage}, tell, ["data"])).wait()

    took = 0.0
    for ends, status in (("killed", -9), ("fails", 3), ("well", 0)):
        began = time.monotonic()
        assert part(ends) == status
        took += time.monotonic() - began
        time.sleep(0.3)  # between two parts, which does not count
    before, seconds = map(float, told.read_text().split())
    assert before >= 0.9 and before + 0.5 <= seconds <= took, "each part slept for half a second"
    assert json.loads((tmp_path / "timings.json").read_text())["data"] == pytest.approx(seconds, abs=0.06)


@pytest.mark.parametrize("base", ["/data/models/SmolLM2-135M", "~/models/SmolLM2-135M", "./models/SmolLM2-135M"])
def test_a_card_names_no_local_path(base):
    sections = {"judge": {"base": base}, "ppo": {"rewards": {"r": {"model": base}}}, "data": {"judge": [{"path": "x.jsonl"}]}}
    for stage in ("sft", "judge", "ppo"):
        card = model_card(recipe(model={"name_or_path": base}, **sections), stage, {"loss": 1.0})
        assert "base_model" not in card and "models/" not in card
        assert "the local model folder `SmolLM2-135M`" in card


def test_a_card_names_the_hubs_model():
    card = model_card(recipe(model={"name_or_path": "HuggingFaceTB/SmolLM2-135M"}), "sft", {})
    assert "base_model: HuggingFaceTB/SmolLM2-135M" in card and "from `HuggingFaceTB/SmolLM2-135M`" in card


def test_a_finished_run_with_more_steps_needs_ray_again(tmp_path):
    """Without a session of ours the stage's first call of Ray would join whatever cluster runs on this machine."""
    folder = RunFolder(tmp_path)
    for stage in ("data", "sft", "reward", "ppo", "evaluation"):
        folder.stage(stage).path.mkdir(parents=True)
        folder.stage(stage).finish({"steps": 3, "ended_by": "steps", "worse_since": 0})
    assert to_reopen(recipe(ppo={"steps": 3}), folder, []) == set()
    assert to_reopen(recipe(ppo={"steps": 4}), folder, ["ppo.steps"]) == {"ppo", "evaluation"}
    assert to_reopen(recipe(ppo={"steps": 3}), folder, ["evaluation.prompts"]) == {"evaluation"}


@pytest.mark.parametrize("called, says", [
    ("doctor", "give RECIPE, a recipe YAML, or the name of a packaged one (demo, smollm2-sentiment, imdb, ...); "
               "for example: rlhf-ray doctor demo"),
    ("stage", "give NAME, a stage of the recipe, e.g. one of a plugin, which has no command of its own; "
              "for example: rlhf-ray stage ppo demo"),
    ("submit demo", "give --run-dir, absolute path that every node of the cluster sees, or a URL such as s3://...; "
                    "for example: rlhf-ray submit demo --run-dir /shared/runs/demo"),
    ("serve", "serve needs a run folder or a model folder: rlhf-ray serve runs/demo"),  # --stop needs none
    ("publish", "publish needs a version: rlhf-ray publish RUN; or --rollback, or --history"),
])  # fmt: skip
def test_a_command_without_what_it_needs_says_what_to_give(called, says):
    answer = rlhf_ray(*called.split())
    assert (answer.returncode, answer.stderr, answer.stdout) == (2, f"rlhf-ray: {says}\n", "")


def test_every_command_has_an_example():
    """Of each argument and option that it needs, so no example has a placeholder in capitals."""
    group = typer.main.get_command(app)
    lacking = [name for name, command in group.commands.items() if any(param.required for param in command.params)]
    assert {"run", "doctor", "report", "submit", "export", "import"} <= set(lacking)
    for name in lacking:
        answer = rlhf_ray(name)
        example = answer.stderr.partition("for example: rlhf-ray ")[2].split()
        assert answer.returncode == 2 and example[0] == name and len(example) > 1
        assert not any(word.isupper() for word in example), answer.stderr

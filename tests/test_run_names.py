"""A run is told in the words of what it has: without SFT and reward model nothing speaks of them, and GRPO is called GRPO."""

import json
import re

import numpy as np
import pytest
import yaml
from rich.console import Console
from test_report import Page, interval, summary
from tiny import tiny_recipe

from rlhf_ray.cli.display import Display, summary_table
from rlhf_ray.cli.running import closing_words
from rlhf_ray.config.run_names import RunNames, names_of
from rlhf_ray.evaluation.verdict import verdict, warnings
from rlhf_ray.report import charts
from rlhf_ray.report import curves as report_curves
from rlhf_ray.report.formatting import figure
from rlhf_ray.report.page import render
from rlhf_ray.runs.metrics import MetricsWriter
from rlhf_ray.runs.run_folder import RunFolder

GRPO = RunNames(tuned="GRPO", has_sft=False, reward="reward function")
OTHERS = re.compile(r"\bSFT\b|\bPPO\b(?!\.)|reward[ -]model", re.IGNORECASE)  # ppo.kl_coef is a key


def grpo_recipe(**ppo):
    ppo = {"advantage": "grpo", "samples_per_prompt": 2, "reward_function": "user_scores:brevity", "critic_init": "sft"} | ppo
    return tiny_recipe(model={"name_or_path": "some/model"}, sft=None, reward=None, ppo=ppo)


def test_the_names_of_a_recipe():
    assert names_of(tiny_recipe().model_dump(mode="json")) == RunNames() == names_of({})
    assert names_of(grpo_recipe().model_dump(mode="json")) == GRPO
    titles = {"rloo": "RLOO", "dr_grpo": "Dr. GRPO", "reinforce_pp": "REINFORCE++", "of_a_plugin": "of_a_plugin"}
    assert {name: names_of({"ppo": {"advantage": name}}).tuned for name in titles} == titles


@pytest.mark.parametrize(
    "terms, words",
    [
        ({"a": {"model": "some/where"}}, "reward model"), ({"a": {"function": "m:f"}}, "reward function"),
        ({"a": {"kind": "own"}}, "reward"), ({"a": {"function": "m:f"}, "b": {"model": "reward"}}, "reward"), ({}, "reward model"),
    ],
)  # fmt: skip
def test_the_name_of_the_reward(terms, words):
    assert names_of({"ppo": {"rewards": terms}}).reward == words


@pytest.mark.parametrize(
    "text, told",
    [
        ("SFT", "Start"), ("PPO", "GRPO"), ("KL to SFT, nats per response", "KL to the start, nats per response"),
        ("PPO over SFT", "GRPO over the start"), ("Perplexity, SFT model", "Perplexity, start model"),
        ("0.50 of SFT's", "0.50 of the start's"), ("Reward-model score", "Reward function score"),
        ("what PPO was trained on", "what GRPO was trained on"), ("raise ppo.kl_coef", "raise ppo.kl_coef"),
        ("under the reward model it was trained on", "under the reward function it was trained on"),
    ],
)  # fmt: skip
def test_texts_are_told_in_those_names(text, told):
    assert GRPO.told(text) == told and RunNames().told(text) == text


@pytest.fixture
def folder(tmp_path):
    """A finished GRPO run of a function's score."""
    run = RunFolder(tmp_path)
    run.recipe.write_text(yaml.safe_dump(grpo_recipe().model_dump(mode="json")))
    run.record_stages()
    values = summary(judge=None, perplexity_independent=interval(1.8)) | {"max_kl": 3.0}
    values["sft"]["length"] = values["ppo"]["length"] = {"mean": 12.0, "low": 12.0, "high": 12.0}
    values["definitions"] = {}
    with MetricsWriter(run.stage("ppo").metrics) as writer:
        for step in (0, 1):
            writer.write(step, {"objective/score": 1.0 + step / 100, "objective/kl": 0.5, "eval/kl": 0.5, "time/update_s": 2.0})
    run.stage("ppo").finish({"steps": 4, "ended_by": "patience", "best_by": "score", "best_step": 2, "best_score": 1.0,
                             "worse_since": 2, "model_step": 2})  # fmt: skip
    row = {"response": "yes", "score": 1.0, "judge": None, "tokens": 7, "ended": True}
    samples = [{"prompt": "?", "index": i, "seed": 0, "sft": row, "ppo": row | {"score": 1.0 - i}} for i in range(30)]
    evaluation = run.stage("evaluation")
    evaluation.path.mkdir()
    (evaluation.path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    (evaluation.path / "summary.json").write_text(json.dumps(values))
    evaluation.finish(values)
    return run


def visible(page):
    """What a reader sees, without the recipe, whose keys are fixed names."""
    text = re.sub(r"<style>.*?</style>|<details><summary>Recipe.*?</details>", "", page, flags=re.DOTALL)
    return " ".join("".join(Page(text).text).split())


def test_the_report_names_what_there_is(folder):
    shown = visible(render(folder))
    assert OTHERS.findall(shown) == [], [shown[m.start() - 60 : m.end() + 40] for m in OTHERS.finditer(shown)]
    for part in ("GRPO", "KL to the start", "reward function", "Where GRPO lost most", "GRPO ended after step 4"):
        assert part in shown, part
    assert "12 " in shown and "12.00" not in shown and "12 (12" not in shown


def test_so_does_the_terminal(folder):
    console = Console(width=200)
    with console.capture() as capture:
        display = Display(console, GRPO)
        display({"stage": "ppo", "started": True})
        display({"stage": "ppo", "done": True, "seconds": 3.0})
        path = folder.stage("evaluation").path / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"names": GRPO.to_json()}))
        closing_words(folder, console)
    shown = capture.get()
    assert OTHERS.findall(shown.replace(str(folder.path), "")) == [], shown
    assert "> GRPO" in shown and "Start" in shown and "reward function" in shown


def test_verdict_and_warnings_without_names_are_those_of_the_full_set():
    assert verdict(summary(), []).startswith("PPO beats SFT")
    told = summary(judge=None) | {"names": GRPO.to_json()}
    assert verdict(told, []).startswith("GRPO beats the start in 90.0") and "the reward function" in verdict(told, [])
    assert warnings(told)[-1].endswith("the win rate is the reward function's own opinion.")


# -- a few points, and intervals of no width ---------------------------------------------------------------------------


def svg_of(*points):
    steps, values = np.array(points, dtype=float).T
    return str(charts.curves([charts.Series("x", steps, values)]))


def labels(svg, axis):
    return [float(text.replace("\u2212", "-")) for text in re.findall(rf'<text class="{axis}"[^>]*>([^<]*)<', svg)]


@pytest.mark.parametrize("points", [[(1, 0.6931)], [(1, 0.6931), (2, 0.6930)], [(0, 12.0), (1, 12.01), (2, 11.99)]])
def test_one_to_three_points_stand_alone_on_a_sensible_axis(points):
    svg = svg_of(*points)
    assert "polyline" not in svg and svg.count("<circle") == len(points)
    assert all(step == int(step) for step in labels(svg, "x")), "there is nothing between two steps"
    shown = labels(svg, "y")
    assert max(shown) - min(shown) >= 0.1 * points[0][1], "a hundredth does not fill the page"
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    assert charts.TOP < min(heights) <= max(heights) < charts.HEIGHT - charts.BOTTOM


def test_four_points_make_a_line():
    assert "polyline" in svg_of(*((step, step / 10) for step in range(4)))


def test_few_steps_of_times_are_bars():
    times = {"update": 2.0, "generate": 1.0}
    svg, names = charts.stacked([charts.Series(name, np.array([1.0]), np.array([time])) for name, time in times.items()])
    areas = re.findall(r'polygon class="area c\d" points="([^"]+)"', str(svg))
    corners = [[float(point.split(",")[0]) for point in each.split()] for each in areas]
    assert names == ["update", "generate"] and len(corners) == 2 and all(max(each) - min(each) > 100 for each in corners)


def test_over_optimisation_of_two_evaluations_is_points():
    rows = [{"step": i, "eval/kl": i, "eval/score": i, "eval/judge": -i} for i in (1, 2)]
    (plot,) = report_curves.over_optimisation(rows, GRPO)
    assert "polyline" not in str(plot.svg) and "the start" in plot.title


@pytest.mark.parametrize(
    "value, percent, shown",
    [(12.0, False, "12"), (1.0, True, "100 %"), (0.0, False, "0"), (0.25, False, "0.250"), (1234.0, False, "1,234")],
)
def test_an_interval_of_no_width_is_its_number(value, percent, shown):
    assert figure({"mean": value, "low": value, "high": value}, percent) == shown


def test_nor_in_the_closing_table_and_the_headline():
    values = summary()
    values["sft"]["length"] = values["ppo"]["length"] = {"mean": 12.0, "low": 12.0, "high": 12.0}
    values["win_rate"]["judge"] = {"mean": 1.0, "low": 1.0, "high": 1.0}
    console = Console(width=160)
    with console.capture() as capture:
        console.print(summary_table(values))
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert "tokens 12 12" in lines and "win rate, judge 1" in lines
    assert "100.0\u00a0% of comparisons" in verdict(values, [])

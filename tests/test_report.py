"""The HTML report: whole and partial run folders, hostile texts, and the numbers on its charts."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.verdict import verdict, warnings
from rlhf_ray.report import charts, key_figures
from rlhf_ray.report import curves as report_curves
from rlhf_ray.report.formatting import duration, figure
from rlhf_ray.report.page import render, write_report
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.metrics import MetricsWriter
from rlhf_ray.runs.run_folder import RunFolder

HOSTILE = """</p><script>alert("x")</script><img src=x onerror=alert(1)> & "quotes" 'too' ]]> <!-- """
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is not closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def interval(mean, half=0.1):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summary(judge=0.8, **ratio):
    keys = ("score", "perplexity", "length", "eos_rate", "distinct_2", "repetition")
    models = {
        name: {key: interval(1.0 + i) for key in keys} | {"judge": None, "relevance": None}
        for i, name in enumerate(("sft", "ppo"))
    }
    return models | {
        "win_rate": {"reward_model": interval(0.9, 0.05), "judge": None if judge is None else interval(judge, 0.05)},
        "kl": 5.25,
        "kl_interval": interval(5.25),
        "prompts": 40,
        "seeds": [0],
        "sampling": {"temperature": 0.7},
        "difference": {key: interval(1.0) for key in keys},
        "ratio": {"distinct_2": interval(0.9)} | ratio,
        "definitions": {"kl": "nats"},
        "missing": {"relevance": "no reason"},
    }


@pytest.fixture
def folder(tmp_path):
    """A finished run with hostile texts everywhere that a model or a stranger writes them."""
    run = RunFolder(tmp_path)
    run.recipe.write_text(yaml.safe_dump({"name": "demo", "note": HOSTILE, "reward": {}, "evaluation": {"samples": 2}}))
    (tmp_path / "environment.json").write_text(json.dumps({"packages": {"torch": "2.13"}, "host": HOSTILE}))
    run.stage("data").finish({"seconds": 4.0, "sources": {HOSTILE: {"rows": 12}}})
    with MetricsWriter(run.stage("ppo").metrics) as writer:
        for step in range(1, 101):
            writer.write(
                step,
                {
                    "objective/score": step / 100,
                    "objective/kl": 2.0,
                    "time/generate_s": 1.0,
                    "time/update_s": 2.0,
                    "time/step_s": 3.1,
                    HOSTILE: 0.5,
                    **({"eval/score": step / 90, "time/evaluate_s": 1.0} if step % 20 == 0 else {}),
                },
            )
    run.stage("ppo").finish({"seconds": 3725})
    run.stage("reward").path.mkdir()
    run.stage("reward").finish(
        {
            "accuracy": 0.8531,
            "pearson": 0.61,
            "seconds": 60,
            "calibration": [
                {"predicted": 0.2, "observed": 0.25, "count": 10},
                {"predicted": 0.9, "observed": 0.0, "count": 0},
            ],
        }
    )
    row = {"response": HOSTILE, "score": 1.0, "judge": 2.0, "tokens": 7, "ended": True}
    samples = [
        {
            "prompt": f"{HOSTILE} number {i}",
            "index": i,
            "seed": 0,
            "sft": row,
            "ppo": row | {"score": 1.0 + i, "judge": 1.0 if i == 25 else 3.0},
        }
        for i in range(30)
    ]
    evaluation = run.stage("evaluation")
    evaluation.path.mkdir()
    (evaluation.path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    (evaluation.path / "summary.json").write_text(json.dumps(summary()))
    evaluation.finish(summary())
    EventLog(run.events).add(HOSTILE, "restarted", 4.2)
    return run


def test_the_report_is_one_file_that_loads_nothing(folder):
    path = write_report(folder)
    assert path == folder.path / "report.html"
    page = Page(path.read_text())
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "srcset", "xlink:href", "action"} & names
    assert not [name for name in names if name.startswith("on")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert not re.search(r"url\(|@import|https?://", path.read_text())
    assert "default-src 'none'" in path.read_text()


def test_a_run_with_dpo_shows_it_beside_the_others(folder):
    with_dpo = summary() | {
        "max_kl": 9.0,
        "dpo": {key: interval(1.5) for key in summary()["sft"] if summary()["sft"][key]},
    }
    with_dpo["dpo_over_sft"] = {
        "win_rate": {"reward_model": interval(0.7, 0.05), "judge": interval(0.66, 0.05)},
        "kl": 9.87, "kl_interval": interval(9.87), "difference": {"score": interval(0.5)}, "ratio": {},
    }  # fmt: skip
    with_dpo["ppo_over_dpo"] = {"win_rate": {"reward_model": interval(0.61, 0.05), "judge": None}}
    folder.stage("dpo").path.mkdir()
    folder.stage("dpo").finish({"accuracy": 0.7125, "seconds": 30, "logratio_chosen": -3.25})
    with MetricsWriter(folder.stage("dpo").metrics) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 0.6, "accuracy": 0.7, "margin": 0.2, "logprob_chosen": -40.0,
                                "logprob_rejected": -45.0, "reward_chosen": 0.1, "reward_rejected": -0.1})  # fmt: skip
    evaluation = folder.stage("evaluation").path
    rows = [json.loads(line) for line in (evaluation / "samples.jsonl").read_text().splitlines()]
    rows = [row | {"dpo": row["ppo"] | {"response": f"DPO says {row['index']}.", "score": 99.0}} for row in rows]
    (evaluation / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (evaluation / "summary.json").write_text(json.dumps(with_dpo))
    text = render(folder)
    shown = " ".join("".join(Page(text).text).split())
    for part in (
        "SFT, PPO and DPO on held-out prompts", "− SFT: 0.50 (0.40 to 0.60)", "DPO says 0.", "9.87", "71.2 %",  # 0.7125 to even
        "DPO's implicit reward", "Log-prob of a reply, nats", "Implicit reward", "PPO over DPO, by what PPO was trained on",
        "DPO over SFT, by the independent judge", "DPO: closing figures", "raise dpo.beta",
    ):  # fmt: skip
        assert part in shown, part
    assert "PPO over DPO, by the independent judge" not in shown
    first = text.index("DPO says 0.")
    head = text[first - 300 : first]
    assert 'class="wins">score 99.0' in head and 'class="wins">judge' not in head
    assert text.count('class="m2"') >= 1 + 6  # its key, and a dot in each row of the table


def closing_lines(values):
    from rich.console import Console

    from rlhf_ray.cli.display import summary_table

    console = Console(width=160)
    with console.capture() as capture:
        console.print(summary_table(values))
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def test_the_closing_table_and_the_page_show_traits_before_and_after():
    values = summary()
    for model, mean in (("sft", 0.25), ("ppo", 0.75)):
        values[model]["trait/on_topic"] = interval(mean)
    values["difference"] = {"trait/on_topic": interval(0.5)}
    assert "on topic 0.25 [0.15, 0.35] 0.75 [0.65, 0.85]" in closing_lines(values)
    (row,) = [row for row in key_figures.table(values) if row["label"] == "Trait: on topic"]
    assert row["cells"] == [("0.25 (0.15 to 0.35)", "", ""), ("0.75 (0.65 to 0.85)", "0.50 (0.40 to 0.60)", "good")]


def test_the_closing_table_has_a_column_for_dpo():
    lines = closing_lines
    plain = lines(summary())
    assert plain[0] == "SFT PPO" and not [line for line in plain if "DPO" in line]
    over_sft = {"win_rate": {"reward_model": interval(0.7), "judge": None}, "kl": 3.5}
    found = lines(summary() | {"dpo": summary()["sft"], "dpo_over_sft": over_sft,
                               "ppo_over_dpo": {"win_rate": {"reward_model": interval(0.25), "judge": None}}})  # fmt: skip
    assert found[0] == "SFT PPO DPO"
    at = found.index("win rate, reward model 0.9 0.7")
    assert found[at + 1] == "[0.85, 0.95] [0.6, 0.8]"
    assert found[found.index("over DPO, reward model 0.25") + 1] == "[0.15, 0.35]"
    assert found[-1].endswith(" 5.25 3.50")


def test_hostile_texts_stay_texts(folder):
    text = render(folder)
    assert "<script" not in text and "onerror=alert(1)>" not in text
    assert "".join(Page(text).text).count(HOSTILE) >= 2 * 2  # samples, as written


def test_the_finished_report_shows_its_parts(folder):
    shown = " ".join("".join(Page(render(folder)).text).split())
    for part in (
        "PPO beats SFT in 80.0 % (75.0 to 85.0) of comparisons under the independent judge",
        "KL of 5.25 nats",
        "85.3 %",
        "Pearson",
        "1 h 02 min",
        "restarted",
        "temperature 0.7",
        "relevance is missing",
        "Where PPO lost most",
        "number 25",
        "packages.torch",
        "Data: closing figures",
        "held-out prompts",
    ):
        assert part in shown, part
    assert "Share that ended by itself" not in shown  # no such metric, no such plot
    assert shown.count("number ") == 3  # two first prompts and the one that PPO lost


@pytest.mark.parametrize("state", ["empty", "begun", "sft done"])
def test_partial_run_folders(tmp_path, state):
    run = RunFolder(tmp_path)
    if state != "empty":
        run.recipe.write_text(yaml.safe_dump({"name": "half", "sft": {}, "reward": {}}))
        with MetricsWriter(run.stage("sft").metrics) as writer:
            writer.write(1, {"loss": 5.0})
            writer.write(2, {"loss": None})
    if state == "sft done":
        run.stage("sft").finish({"seconds": 2, "eval_loss": 3.0})
    shown = "".join(Page(render(run)).text)
    said = {"empty": "No stage is done yet", "begun": "SFT has begun (step 2)", "sft done": "Done so far: SFT"}
    assert said[state] in shown
    assert ("Loss" in shown) == (state != "empty")


def test_a_spoilt_file_is_named(folder):
    folder.stage("ppo").metrics.write_text("spoilt\n{}\n")
    with pytest.raises(UserError, match="metrics.jsonl line 1"):
        render(folder)


def test_a_plugins_stage_keeps_its_column_where_the_plugin_is_not_here(folder):
    """The run has recorded its title; a run of an older version has recorded titles of stages only."""
    folder.stage("graded").path.mkdir()
    folder.stage("graded").finish({"accuracy": 0.625, "pairs": 80})
    recorded = {"reward": {"title": "Reward model", "pairs_title": "Reward model"}, "ppo": {"title": "PPO", "pairs_title": None},
                "graded": {"title": "Graded stage", "pairs_title": "Grader"}}  # fmt: skip
    (folder.path / "stages.json").write_text(json.dumps(recorded))
    shown = " ".join("".join(Page(render(folder)).text).split())
    assert "Grader" in shown and "62.5" in shown
    (folder.path / "stages.json").write_text(json.dumps({name: each["title"] for name, each in recorded.items()}))
    assert folder.stage_titles == {"reward": "Reward model", "ppo": "PPO", "graded": "Graded stage"}
    assert folder.pair_titles == {"reward": "Reward model"}
    assert "Grader" not in render(folder)


def test_verdicts():
    assert verdict(summary(), []).startswith("PPO beats SFT in 80.0")
    assert verdict(summary(judge=0.52), []).startswith("These prompts show no difference")
    assert verdict(summary(judge=0.3), []).startswith("PPO made the model worse")
    assert "under the reward model, at a KL" in verdict(summary(judge=None), [])
    beyond = summary() | {"kl": 40.0, "max_kl": 15.0}
    assert verdict(beyond, []).startswith("This run failed: its KL is above the recipe's cap of 15 nats; raise ppo.kl_coef.")
    assert warnings(beyond) == [], "that is said once"
    dpo = beyond | {"dpo_over_sft": {"kl": 15.1}}
    assert [line[:17] for line in warnings(dpo)] == ["DPO's KL of 15.1 "] and warnings(dpo | {"dpo_over_sft": {"kl": 15.0}}) == []
    assert verdict(beyond | {"kl": 15.0}, []).startswith("PPO beats SFT"), "at the cap is not above it"


def test_warnings_name_what_went_wrong():
    assert warnings(summary()) == []
    assert "exploiting" in warnings(summary(judge=0.5))[0]
    assert "no independent judge" in warnings(summary(judge=None))[0]
    assert "0.50 of SFT's" in warnings(summary(distinct_2=interval(0.5)))[0]
    assert "1.80 times" in warnings(summary(perplexity_independent=interval(1.8)))[0]


def test_growing_responses_are_told_where_the_score_goes_with_length():
    def told(ratio, sft, ppo):
        whole = summary(length=interval(ratio))
        for model, value in (("sft", sft), ("ppo", ppo)):
            whole[model]["score_length_corr"] = None if value is None else interval(value)
        return [line for line in warnings(whole) if "rewarded for length" in line]

    (line,) = told(1.4, 0.2, 0.63)
    assert "1.40 times as long" in line and "correlation 0.63" in line
    assert told(1.4, 0.7, None), "all of PPO's responses may have the same length"
    assert not told(1.2, 0.9, 0.9) and not told(1.4, 0.4, 0.5) and not told(1.4, None, -0.9)


def evaluations(*points):
    names = ("step", "eval/kl", "eval/score", "eval/judge")
    return [dict(zip(names, point, strict=True)) for point in points]


def test_score_and_judge_are_drawn_over_the_root_of_the_kl():
    """KL 0 (an estimate just below it), 1, 4 and 9: equal distances."""
    rows = evaluations((0, -0.01, 0.0, 5.0), (20, 1.0, 1.0, 6.0), (40, 4.0, 3.0, 4.0), (60, 9.0, 4.0, 3.0))
    (plot,) = report_curves.over_optimisation([*rows, {"step": 41, "objective/score": 3.0}])
    assert plot.legend == ["score", "independent judge"] and "√KL" in plot.title
    lines = re.findall(r'<polyline class="line c(\d)" points="([^"]+)"', str(plot.svg))
    assert [number for number, _ in lines] == ["0", "1"]
    score, judge = ([[float(x) for x in point.split(",")] for point in points.split()] for _, points in lines)
    assert score[1][0] == pytest.approx((score[0][0] + score[2][0]) / 2, abs=0.1) and score[0][0] == judge[0][0]
    assert score[0][1] > score[1][1] > score[2][1] and judge[1][1] < judge[0][1] < judge[2][1]
    assert "independent judge, step 20: 6.00 at √KL 1.00" in str(plot.svg)
    assert report_curves.over_optimisation(rows[:1]) == []
    assert report_curves.over_optimisation([row | {"eval/judge": None} for row in rows]) == []
    assert plot.title in [one.title for one in report_curves.of_stage("ppo", rows)[0]]


def test_the_report_says_which_steps_policy_is_the_model(folder):
    ended = {"steps": 80, "ended_by": "patience", "best_by": "judge", "best_step": 40, "best_score": 1.5}
    ended |= {"worse_since": 2, "model_step": 40}
    folder.stage("ppo").finish(ended)
    text = "".join(Page(render(folder)).text)
    assert "PPO ended after step 80, because 2 evaluations in a row found no better held-out judge's score." in text
    assert "Its model is that of step 40, rolled back to the best held-out judge's score: 1.50 at step 40." in text
    folder.stage("ppo").finish(ended | {"model_step": 80, "best_by": "score"})
    assert "that of the last step; the best score was 1.50 at step 40" in "".join(Page(render(folder)).text)
    folder.stage("ppo").finish(ended | {"model_step": 80, "ended_by": "steps"})
    assert "PPO ended after" not in "".join(Page(render(folder)).text)


def test_the_report_shows_an_ensemble_and_its_length_bias(folder):
    figures = {"accuracy": 0.8, "chosen_longer_accuracy": 0.91, "chosen_longer_pairs": 7, "length_pearson": 0.25}
    done = figures | {"member_1": {"accuracy": 0.7}, "ensemble": {"accuracy": 0.85, "disagreement": 0.3}}
    folder.stage("reward").finish(done)
    text = "".join(Page(render(folder)).text)
    for part in (
        "Accuracy where the longer was chosen", "91.0 %", "Pearson correlation with length",
        "Accuracy on held-out pairs (member_1)", "70.0 %", "Accuracy on held-out pairs (ensemble)", "85.0 %",
        "Disagreement of the members (ensemble)",
    ):  # fmt: skip
        assert part in text, part


def test_numbers_read_well():
    assert [charts.number(value) for value in (0, 1.0, 0.012345, 1234.5, -2.5, 1.5e-7, 2e6, float("nan"), None)] == [
        "0",
        "1.00",
        "0.0123",
        "1,234",
        "\u22122.50",
        "1.5e\u22127",
        "2e6",
        "–",
        "–",
    ]
    assert figure({"mean": 0.00712, "low": -0.11, "high": 0.13}) == "0.01 (\u22120.11 to 0.13)"
    assert figure({"mean": 0.5, "low": 0.45, "high": 0.55}, True) == "50 % (45 to 55)"
    assert [duration(value) for value in (None, 3.21, 59, 61, 3725)] == [
        "–",
        "3.2 s",
        "59 s",
        "1 min 01 s",
        "1 h 02 min",
    ]


def test_ticks_are_round_and_inside():
    assert charts.ticks(0.0, 1.0) == pytest.approx([0, 0.5, 1.0])
    assert charts.ticks(-3.2, 7.9) == pytest.approx([0, 5])
    assert charts.ticks(96.0, 104.0) == pytest.approx([96, 98, 100, 102, 104])


def test_a_curve_lies_where_its_numbers_say():
    svg = str(charts.curves([charts.Series("x", np.array([0.0, 2.0, 5.0, 10.0]), np.array([0.0, 0.2, 0.5, 1.0]))]))
    (x0, y0), *_, (x1, y1) = [map(float, point.split(",")) for point in re.search(r'points="([^"]+)"', svg)[1].split()]
    assert x0 == charts.LEFT and x1 == charts.WIDTH - charts.RIGHT and y1 < y0


def test_stacked_times_add_up_and_missing_steps_are_zero():
    steps = np.arange(1.0, 5.0)
    svg, names = charts.stacked(
        [charts.Series("evaluate", steps[3:], np.array([4.0])), charts.Series("update", steps, np.full(4, 2.0))]
    )
    assert names == ["update", "evaluate"]
    assert "evaluate: 1.00 s on average" in svg


def test_every_number_is_drawn_once():
    rows = [
        {
            "step": i,
            "objective/score": 1.0,
            "eval/score": 1.0,
            "time/a_s": 1.0,
            "time/step_s": 1.0,
            "new": i,
            "text": "x",
            "flag": True,
        }
        for i in range(3)
    ]
    named, others = report_curves.of_stage("ppo", rows)
    assert [plot.title for plot in named] == ["Score", "Seconds per step"]
    assert [plot.title for plot in others] == ["new"]

"""Seconds per step and time left: from finished steps, the same between two of them, never beyond a time limit."""

import io

import pytest
from rich.console import Console

from rlhf_ray.cli import display as display_module
from rlhf_ray.cli.display import Display
from rlhf_ray.runs.pace import Pace
from rlhf_ray.supervised.learning_rate import outlook


def paced(*steps):
    pace = Pace()
    for number, now in steps:
        pace.step(number, now)
    return pace


def test_three_steps_of_ten_seconds():
    pace = paced((1, 100.0), (2, 110.0), (3, 120.0))
    assert pace.seconds_per_step == 10
    # 97 steps are left when the third has ended, less the time that the fourth has run, and that at most one step.
    assert [pace.left(100, now) for now in (120.0, 124.0, 130.0, 190.0)] == [970, 966, 960, 960]
    assert pace.seconds_per_step == 10


def test_nothing_is_said_before_two_steps_have_ended():
    assert paced((5, 3.0)).seconds_per_step is None and paced((5, 3.0)).left(9, 50.0) is None
    assert Pace().left(9, 1.0) is None


def test_the_time_limit_comes_first():
    pace = paced((1, 0.0), (2, 10.0))
    assert pace.left(100, 13.0, limit_s=50.0) == 47 and pace.left(3, 13.0, limit_s=50.0) == 7
    assert pace.left(100, 90.0, limit_s=50.0) == 0


def test_a_stages_own_clock_counts_on_over_resumes():
    """Step 40 was made by an earlier process; this one takes a minute to start."""
    pace = Pace()
    pace.step(40, 1000.0, at=400.0)
    pace.step(41, 1060.0, at=410.0)
    assert pace.seconds_per_step == 10 and pace.left(51, 1060.0) == 100


def test_workers_that_went_back_to_a_checkpoint_start_anew():
    pace = paced((1, 0.0), (2, 10.0), (1, 100.0), (3, 110.0))
    assert pace.seconds_per_step == 5


def metrics(step, progress, elapsed_s, total_steps=100):
    return {"step": step, "progress": progress, "elapsed_s": elapsed_s, "total_steps": total_steps}


def test_what_is_to_come_of_a_stage_with_a_time_limit():
    assert outlook(metrics(10, 0.1, 20.0), None) == {"total": 100, "total_is_estimate": False}
    # A third of two minutes: 30 steps in all at this pace, and 80 seconds.
    assert outlook(metrics(10, 1 / 3, 40.0), 2.0) == {"total": 30, "total_is_estimate": True, "limit_s": 80.0}
    over = outlook(metrics(30, 1.0, 121.0), 2.0)
    assert over["total"] == 30 and "measures" in over["doing"]


@pytest.fixture
def shown(monkeypatch):
    """What the display says at a time of the test's choosing."""
    clock = [0.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: clock[0])
    display = Display(Console(force_terminal=False))
    display({"stage": "sft", "started": True})

    def at(now, event=None):
        clock[0] = now
        if event is not None:
            display({"stage": "sft", **event})
        return display._line()

    return at


def test_the_line_between_two_steps(shown):
    shown(10.0, {"step": 1, "total": 5})
    assert shown(30.0, {"step": 2, "total": 5}) == "step 2 of 5   20.0 s per step   1 min 00 s left"
    assert shown(40.0) == "step 2 of 5   20.0 s per step   50 s left"
    assert shown(90.0) == "step 2 of 5   20.0 s per step   40 s left"  # the third takes longer than the others


def test_the_line_after_the_last_step_says_what_goes_on(shown):
    shown(10.0, {"step": 4, "total": 5})
    shown(20.0, {"step": 5, "total": 5, "doing": "trained; saves and measures the model"})
    assert shown(80.0) == "trained; saves and measures the model, 1 min 00 s"


def test_a_total_that_the_clock_will_cut_is_an_estimate(shown):
    assert shown(10.0, {"step": 4, "total": 31, "total_is_estimate": True}).startswith("step 4 of about 31")


def test_without_a_terminal_a_line_that_says_nothing_new_comes_once_a_minute(monkeypatch):
    """A step of five minutes, heard of every second. A figure that changes is told at once, ten seconds after the last line."""
    clock, screen = [0.0], io.StringIO()
    monkeypatch.setattr(display_module.time, "monotonic", lambda: clock[0])
    display = Display(Console(file=screen, width=200, force_terminal=False))
    display({"stage": "ppo", "started": True})
    display({"stage": "ppo", "step": 0, "total": 2, "metrics": {"eval/score": 0.312}})
    for second in range(1, 301):
        clock[0] = float(second)
        waits = {"waiting_for": "policy actor 0 (step 0)", "waiting_s": second} if second > 100 else {}
        display({"stage": "ppo", **(waits or {"samples": []})})
    clock[0] = 301.0
    display({"stage": "ppo", "step": 1, "total": 2, "metrics": {"objective/score": 0.5}})
    for second in range(302, 320):
        clock[0] = float(second)
        display({"stage": "ppo", "samples": []})
    start = "  step 0 of 2   held-out score 0.312"
    assert screen.getvalue().splitlines()[1:] == [
        start, f"{start}   nothing new for 1 min 01 s",
        *(f"{start}   waiting {minutes} min {minutes:02d} s for policy actor 0 (step 0)" for minutes in (2, 3, 4)),
        "  step 1 of 2   301.0 s per step   5 min 01 s left   score 0.5",
    ]  # fmt: skip

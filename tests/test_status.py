"""What a run is doing, and how it ended, read from its folder by another process."""

import json
import os
import re
import signal
import time

import pytest
from command import rlhf_ray
from processes import Fork

from rlhf_ray.cli import status_command
from rlhf_ray.errors import NotFinite, StageStopped, UserError
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.status import SILENT_ELSEWHERE_S, SILENT_S, read_status
from rlhf_ray.runs.status_file import StatusFile

STAGES = ("data", "sft", "reward", "ppo", "evaluation")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def folder(tmp_path):
    """Of a run with four stages of the recipe, its PPO stage not done."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.recipe.write_text("name: own\nfluency: null\njudge: null\ndpo: null\nsft: {}\nreward: {}\n")
    for name in STAGES[:3]:
        run.stage(name).path.mkdir()
        run.stage(name).finish({})
    return run


def written(folder):
    return json.loads(folder.status.read_text())


def rewrite(folder, **values):
    folder.status.write_text(json.dumps(written(folder) | values))


def test_what_the_events_of_a_ppo_stage_come_to(folder):
    """Worked by hand: steps end at 1010 and 1016, so one takes 6 s and 8 are left; the wait began 3 s before it was told of."""
    clock = Clock()
    status = StatusFile(folder.status, clock=clock)
    status.hear({"stage": "ppo", "started": True})
    status.hear({"stage": "ppo", "goes_on_from": 1})
    assert (written(folder)["stage"], written(folder)["state"]) == ("ppo", "running")
    for number, clock.now in ((2, 1010.0), (3, 1016.0)):
        status.hear({"stage": "ppo", "step": number, "total": 11, "metrics": {"samples_per_s": 4.5}})
    clock.now = 1020.0
    status.hear({"stage": "ppo", "waiting_for": "reward actor 1 (chunk 3)", "waiting_s": 3.0, "phase": "scoring (step 3)"})
    clock.now = 1021.0
    status.write()
    found = written(folder)
    expected = {
        "step": 3, "total": 11, "samples_per_s": 4.5, "seconds_per_step": 6.0, "left_s": 8 * 6.0 - 5.0, "phase": "scoring (step 3)",
        "phase_since": 1020.0, "waiting_for": "reward actor 1 (chunk 3)", "waiting_since": 1017.0, "written": 1021.0,
        "exit_code": None, "host": os.uname().nodename, "process": os.getpid(),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    status.hear({"stage": "ppo", "step": 4, "total": 11, "metrics": {}})
    status.write()
    assert written(folder)["waiting_for"] is None, "the step is done, so nothing is waited for"


def test_a_supervised_stage_tells_of_tokens_and_of_its_time_limit(folder):
    clock = Clock()
    status = StatusFile(folder.status, clock=clock)
    status.hear({"stage": "sft", "started": True})
    status.hear({"stage": "sft", "waiting_for": "the worker to start and read its data", "waiting_s": 2.0})
    for step, elapsed_s in ((10, 20.0), (20, 40.0)):  # 2 s per step, 180 to go, but the time is up in 60 s
        status.hear({"stage": "sft", "step": step, "elapsed_s": elapsed_s, "total": 200, "total_is_estimate": True,
                     "limit_s": 60.0, "tokens_per_s": 900.0, "loss": 2.0})  # fmt: skip
    status.write()
    found = written(folder)
    assert (found["phase"], found["tokens_per_s"], found["left_s"], found["waiting_for"]) == ("training", 900.0, 60.0, None)
    status.hear({"stage": "sft", "step": 20, "elapsed_s": 40.0, "total": 20, "doing": "trained; saves and measures the model"})
    status.write()
    assert written(folder)["phase"] == "trained; saves and measures the model" and written(folder)["left_s"] is None


ENDS = [
    (None, "finished", 0, None),
    (StageStopped("ppo stopped after step 3 of 8; its checkpoint is written"), "stopped", 130, "ppo stopped after step 3"),
    (KeyboardInterrupt(), "stopped", 130, "at once"),
    (UserError("data.root='x' is not there; give another"), "failed", 2, "data.root='x' is not there"),
    (NotFinite("the loss is nan"), "failed", 1, "the loss is nan"),
    (RuntimeError("a bug"), "failed", 1, "a bug"),
]


@pytest.mark.parametrize(("error", "state", "code", "words"), ENDS, ids=[str(end[1:3]) for end in ENDS])
def test_an_end_has_its_words_and_its_exit_code(folder, error, state, code, words):
    try:
        with StatusFile(folder.status).told():
            assert read_status(folder).state == "running"
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    status = read_status(folder)
    assert (status.state, status.exit_code, status.ended) == (state, code, True)
    assert status.words is None if words is None else words in status.words
    answer = rlhf_ray("status", str(folder.path))
    assert answer.returncode == code and answer.stdout.startswith(state) and f"exit code {code}" in answer.stdout


@pytest.fixture
def other(folder):
    """Another process, whose run this is."""
    there, tell = os.pipe()

    def run():
        status = StatusFile(folder.status)
        with status.told():
            status.hear({"stage": "ppo", "started": True})
            status.hear({"stage": "ppo", "step": 5, "total": 8, "metrics": {"samples_per_s": 2.0}})
            status.write()
            os.write(tell, b".")
            time.sleep(100)

    process = Fork(run)
    assert os.read(there, 1) == b"."
    os.close(there), os.close(tell)
    yield process
    if not process.ended:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def test_a_run_in_another_process_is_seen_and_then_its_death(folder, other):
    running = rlhf_ray("status", str(folder.path))
    assert running.returncode == 0, running.stderr
    assert re.search(rf"running for \d+ s, process {other.pid} on {os.uname().nodename}", running.stdout)
    assert "step 5 of 8, 2 samples per second" in running.stdout
    assert "done: data, sft, reward; to do: ppo, evaluation" in running.stdout
    other.kill()
    other.wait()
    died = rlhf_ray("status", str(folder.path))
    assert died.returncode == 137 and died.stdout.startswith("died") and "the same command goes on" in died.stdout


def test_it_beats_while_nothing_happens(folder, other):
    before, deadline = written(folder)["written"], time.monotonic() + 60
    while written(folder)["written"] == before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert written(folder)["written"] > before


def test_a_process_that_is_stopped_is_silent_and_not_dead(folder, other):
    other.send_signal(signal.SIGSTOP)
    rewrite(folder, written=time.time() - SILENT_S - 5)
    status = read_status(folder)
    assert (status.state, status.exit_code, status.ended) == ("silent", None, False)
    assert "is it stopped?" in status.words


def test_another_process_of_the_same_number_is_not_the_run(folder, other):
    rewrite(folder, process_started=written(folder)["process_started"] - 1)
    assert read_status(folder).state == "died"


@pytest.mark.parametrize(
    ("age_s", "state", "code"), [(SILENT_ELSEWHERE_S / 2, "running", 0), (SILENT_ELSEWHERE_S + 9, "silent", 75)]
)
def test_a_run_on_another_host_goes_by_its_signs_of_life(folder, other, age_s, state, code):
    rewrite(folder, host="elsewhere", process=1, process_started=1, written=time.time() - age_s)
    other.kill()  # it would write its own again
    other.wait()
    rewrite(folder, host="elsewhere", process=1, process_started=1, written=time.time() - age_s)
    status = read_status(folder)
    assert status.state == state and (status.exit_code or 0) == code
    assert state == "running" or "on elsewhere: look there" in status.words


def test_restarts_checkpoint_and_last_event_come_from_the_folder(folder):
    events = EventLog(folder.events)
    for role in ("reward", "policy", "reward"):
        events.add(f"{role} actor 0 was lost", "made again", 2.0, stage="ppo", role=role)
    for step, mark in ((4, True), (6, True), (8, False)):
        path = folder.stage("ppo").checkpoints / f"step_{step:06d}"
        path.mkdir(parents=True)
        if mark:
            (path / "MANIFEST.json").write_text("{}")
            os.utime(path / "MANIFEST.json", (time.time() - 100 + step,) * 2)
    status = read_status(folder)
    assert status.restarts == {"reward": 2, "policy": 1}
    assert status.checkpoint == "ppo/checkpoints/step_000006" and 90 < status.checkpoint_age_s < 120
    out = rlhf_ray("status", str(folder.path)).stdout
    assert "policy 1, reward 2" in out and "step_000006, 1 min 3" in out and "reward actor 0 was lost: made again" in out


def test_a_folder_of_an_earlier_version_has_no_status_file(folder):
    assert (read_status(folder).state, read_status(folder).exit_code) == ("stopped", 130)
    for name in STAGES[3:]:
        folder.stage(name).path.mkdir()
        folder.stage(name).finish({})
    assert (read_status(folder).state, read_status(folder).exit_code) == ("finished", 0)


def test_watching_ends_with_the_run(folder, other, monkeypatch):
    looks = []

    def look(folder):
        """The run dies between the first two."""
        if len(looks) == 1:
            other.kill()
            other.wait()
        looks.append(read_status(folder))
        return looks[-1]

    monkeypatch.setattr(status_command, "read_status", look)
    answer = rlhf_ray("status", str(folder.path), "--watch")
    assert answer.returncode == 137 and answer.stdout.startswith("running") and "died" in answer.stdout


def test_for_scripts_it_is_json(folder, other):
    found = json.loads(rlhf_ray("status", str(folder.path), "--json").stdout)
    assert (found["state"], found["written"]["step"], found["to_do"]) == ("running", 5, ["ppo", "evaluation"])


def test_what_is_no_run_folder_is_refused(tmp_path):
    for path, says in ((tmp_path, "is no run folder"), (tmp_path / "nowhere", "is not a folder")):
        answer = rlhf_ray("status", str(path))
        assert answer.returncode == 2 and says in answer.stderr


def test_a_full_disk_does_not_end_the_run(tmp_path):
    status = StatusFile(tmp_path / "file" / "status.json")
    (tmp_path / "file").write_text("no folder")  # an OSError at every write
    with status.told():
        status.hear({"stage": "ppo", "started": True})

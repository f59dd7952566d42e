"""metrics.jsonl, its trackers, and events.jsonl."""

import errno
import json
import sys

import numpy as np
import pytest
import torch

from rlhf_ray.errors import UserError
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.metrics import MetricsWriter, Sample, read_metrics

SAMPLES = [Sample("How | are you?", "well,\nthank you: größer", 1.25), Sample("And you?", "", -0.5)]


class FullDisk:
    """A file on a disk that takes so many bytes, and then none."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self.room = min(self.room, len(content)), max(self.room - len(content), 0)
        return self.file.write(content[:taken])

    def close(self):
        self.file.close()


def test_a_full_disk_costs_no_line_and_does_not_end_the_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer._file = FullDisk(writer._file, 21)  # less than two lines
    for step in range(3):
        writer.write(step, {"x": 1})
    assert path.read_text() == '{"step": 0, "x": 1}\n' + "{", "as far as it went"
    writer._file.room = 10**6
    writer.write(3, {"x": 1})
    assert read_metrics(path) == [{"step": step, "x": 1} for step in range(4)]
    writer._file.room = 0
    writer.write(4, {"x": 1})
    with pytest.raises(OSError, match="lacks its last 1 lines: the disk is full"):
        writer.close()


def test_one_object_a_line_flushed_at_once(tmp_path):
    path = tmp_path / "ppo" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(0, {"objective/score": 1.5, "phase": "warm"})
        assert path.read_text() == '{"step": 0, "objective/score": 1.5, "phase": "warm"}\n'
        writer.write(1, {"objective/score": 2, "step": 99})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "objective/score": 1.5, "phase": "warm"},
        {"step": 1, "objective/score": 2},
    ]


def test_numpy_and_tensors_are_numbers_and_nan_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(3, {"a": np.float32(0.5), "b": torch.tensor(2), "c": float("nan"), "d": np.float64("inf")})
    assert json.loads(path.read_text()) == {"step": 3, "a": 0.5, "b": 2, "c": None, "d": None}


def test_resume_drops_later_steps_and_the_line_a_crash_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1}\n{"step": 2, "x": 2}\n{"step": 3, "x": 3}\n{"step": 4, "x')
    with MetricsWriter(path, resume_step=2) as writer:
        writer.write(3, {"x": 33})
    assert read_metrics(path) == [{"step": 1, "x": 1}, {"step": 2, "x": 2}, {"step": 3, "x": 33}]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]  # no temporary file is left


def test_reopening_without_a_step_appends_after_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    with MetricsWriter(path) as writer:
        writer.write(2, {})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_a_spoilt_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nspoilt\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)


def test_missing_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard_reads_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as writer:
        writer.write(1, {"policy/entropy": 3.5, "note": "text is not a curve"})
        writer.write(2, {"policy/entropy": 3.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["policy/entropy"]
    assert [(event.step, event.value) for event in events.Scalars("policy/entropy")] == [(1, 3.5), (2, 3.25)]


def test_samples_are_lines_beside_the_metrics(tmp_path):
    path = tmp_path / "ppo" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in (0, 4, 8):
            writer.write_samples(step, SAMPLES)
        writer.drop_after(4)
        writer.write_samples(8, [Sample("p", "r", float("nan"))])
    lines = (path.parent / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 0, 4, 4, 8]
    assert json.loads(lines[2]) == {"step": 4, "prompt": "How | are you?", "response": "well,\nthank you: größer", "score": 1.25}
    assert json.loads(lines[4])["score"] is None
    with MetricsWriter(path, resume_step=0):  # the run goes on from an earlier checkpoint
        assert len((path.parent / "samples.jsonl").read_text().splitlines()) == 2


def test_tensorboard_has_the_samples_as_a_table(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as writer:
        writer.write_samples(4, SAMPLES)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 4
    assert event.tensor_proto.string_val[0].decode().splitlines() == [
        "| prompt | response | score |",
        "|---|---|---|",
        "| How \\| are you? | well,<br>thank you: größer | 1.250 |",
        "| And you? |  | -0.500 |",
    ]


def test_trackers_are_imported_only_when_asked(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(1, {"x": 1})
    assert "wandb" not in sys.modules and "mlflow" not in sys.modules


def test_wandb_gets_numbers_and_a_table(tmp_path, monkeypatch):
    """Its own files of a run without a network."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with MetricsWriter(tmp_path / "metrics.jsonl", wandb="project", run_name="own") as writer:
        writer.write_samples(4, SAMPLES)
        writer.write(4, {"eval/score": 0.375})
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.table.json")
    assert json.loads(table.read_text()) == {
        "columns": ["step", "prompt", "response", "score"],
        "data": [[4, each.prompt, each.response, each.score] for each in SAMPLES],
    }
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"eval/score" in record.read_bytes()


def test_mlflow_gets_numbers_and_a_table(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    with MetricsWriter(tmp_path / "metrics.jsonl", mlflow="project", run_name="own") as writer:
        for step in (4, 8):
            writer.write_samples(step, SAMPLES)
        writer.write(8, {"eval/score": 0.375})
    (run,) = mlflow.search_runs(experiment_names=["project"], output_format="list")
    assert run.info.run_name == "own" and run.data.metrics == {"eval/score": 0.375}
    table = mlflow.load_table("samples.json", run_ids=[run.info.run_id])
    assert table["step"].tolist() == [4, 4, 8, 8]
    assert table[["prompt", "response", "score"]].values.tolist() == [
        [each.prompt, each.response, each.score] for each in 2 * SAMPLES
    ]


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_missing_extra_is_named(tmp_path, tracker):
    try:
        __import__(tracker)
    except ImportError:
        with pytest.raises(UserError, match=f"pip install {tracker}"):
            MetricsWriter(tmp_path / "metrics.jsonl", **{tracker: "project"})
    else:
        pytest.skip(f"{tracker} is installed")


def test_events_append_across_instances(tmp_path):
    path = tmp_path / "run" / "events.jsonl"
    EventLog(path).add("reward actor 1 died", "restarted; chunk 3 sent again", 2.34567, stage="ppo", step=17)
    EventLog(path).add("checkpoint 40 is damaged", "loaded 20")
    first, second = EventLog(path).read()
    assert (first["what"], first["done"], first["cost_s"], first["stage"], first["step"]) == (
        "reward actor 1 died",
        "restarted; chunk 3 sent again",
        2.346,
        "ppo",
        17,
    )
    assert second["cost_s"] is None and second["time"].endswith("+00:00")

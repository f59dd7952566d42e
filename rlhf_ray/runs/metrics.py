"""Where a stage's numbers go: metrics.jsonl always, TensorBoard, Weights & Biases and MLflow when asked."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast, runtime_checkable

from rlhf_ray.errors import UserError
from rlhf_ray.runs.storage import read_lines, write_atomically

FULL = (errno.ENOSPC, errno.EDQUOT)
NEWLINE = b"\n"
SAMPLE_COLUMNS = ("prompt", "response", "score")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, each of a step (`storage.read_lines`)."""
    rows = read_lines(path)
    for row in rows:
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            raise UserError(f"{path} has a line of no step ({json.dumps(row)[:60]} ...); delete that line")
    return rows


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of the policy in training."""

    prompt: str
    response: str
    score: float


class MetricsWriter:
    """Appends one JSON object per step to `path`; the trackers get the same numbers.

    path: the stage's metrics.jsonl; samples go to samples.jsonl beside it
    resume_step: drop lines of later steps first, so that a step run twice after a crash has one line
    tensorboard_dir: folder for event files; None: none
    wandb: Weights & Biases project; mlflow: MLflow experiment; None: not imported at all
    run_name: the run's name in W&B and MLflow
    """

    def __init__(
        self,
        path: Path,
        tensorboard_dir: Path | None = None,
        wandb: str | None = None,
        mlflow: str | None = None,
        *,
        resume_step: int | None = None,
        run_name: str | None = None,
    ):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.samples_path = self.path.with_name("samples.jsonl")
        for file in (self.path, self.samples_path):
            if resume_step is not None or _ends_mid_line(file):
                drop_after(file, math.inf if resume_step is None else resume_step)
        # Trackers before the file: a missing extra is refused before anything is open.
        self._trackers: list[_Tracker] = []
        if wandb is not None:
            self._trackers.append(_WandbTracker(wandb, run_name))
        if mlflow is not None:
            self._trackers.append(_MlflowTracker(mlflow, run_name))
        if tensorboard_dir is not None:
            self._trackers.append(_TensorBoardTracker(Path(tensorboard_dir), resume_step))
        self._file = self._opened()
        self._unwritten = b""  # what a full disk has not taken yet

    def write(self, step: int, values: dict[str, Any]) -> None:
        """values: name -> number or short text. NaN and infinity become null: they are not JSON."""
        row = {"step": step, **{name: _plain(value) for name, value in values.items() if name != "step"}}
        self._append((json.dumps(row, allow_nan=False) + "\n").encode())
        numbers = {
            name: float(value) for name, value in row.items() if name != "step" and isinstance(value, (int, float))
        }
        for tracker in self._trackers:
            tracker.write(step, numbers)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """What a few prompts are answered at this step: lines of samples.jsonl (but not on a full disk), and a table in each
        tracker."""
        rows = [{"step": step, **asdict(sample), "score": _plain(sample.score)} for sample in samples]
        lines = "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
        size = self.samples_path.stat().st_size if self.samples_path.exists() else 0
        try:
            with open(self.samples_path, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            if error.errno not in FULL:
                raise
            os.truncate(self.samples_path, size)
        for tracker in self._trackers:
            tracker.write_samples(step, samples)

    def drop_after(self, step: float) -> None:
        """Take the later steps out of the files: they are taken again. Trackers get them twice, with the same numbers."""
        self._append(b"")
        self._file.close()
        drop_after(self.path, step)
        drop_after(self.samples_path, step)
        self._file = self._opened()

    def _opened(self) -> BinaryIO:
        return cast(BinaryIO, open(self.path, "ab", buffering=0))

    def _append(self, lines: bytes) -> None:
        """What a full disk does not take is kept, and written with the next lines."""
        self._unwritten += lines
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if error.errno not in FULL:
                raise

    def close(self) -> None:
        self._append(b"")
        lost, self._unwritten = self._unwritten, b""
        self._file.close()
        if lost:
            raise OSError(errno.ENOSPC, f"{self.path} lacks its last {lost.count(NEWLINE)} lines: the disk is full")
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _ends_mid_line(path: Path) -> bool:
    """Whether a crash cut the last line off; appending to it would spoil the next line too."""
    return path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"


def drop_after(path: Path, step: float) -> int:
    """Rewrite a metrics.jsonl without later steps and without a cut-off last line. Returns how many steps went."""
    if not path.exists():
        return 0
    rows = read_metrics(path)
    kept = [row for row in rows if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
    return len(rows) - len(kept)


@runtime_checkable
class _Scalar(Protocol):
    """A numpy scalar or 0-d tensor."""

    def item(self) -> Any: ...


def _plain(value: Any) -> Any:
    """A JSON value of a number, numpy scalar, 0-d tensor or text."""
    if isinstance(value, _Scalar):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class _Tracker(Protocol):
    def write(self, step: int, numbers: dict[str, float]) -> None: ...

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None: ...

    def close(self) -> None: ...


class _TensorBoardTracker:
    def __init__(self, folder: Path, resume_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier, crashed writer recorded at this step and later.
        self._writer: Any = SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """A Markdown table under Text."""
        rows = [f"| {_cell(each.prompt)} | {_cell(each.response)} | {each.score:.3f} |" for each in samples]
        self._writer.add_text("samples", "\n".join(["| prompt | response | score |", "|---|---|---|", *rows]), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _cell(text: str) -> str:
    """In a Markdown table; the text as it is, but on one line and without a cell's border."""
    return text.replace("|", "\\|").replace("\n", "<br>")


class _WandbTracker:
    def __init__(self, project: str, run_name: str | None):
        try:
            wandb: Any = importlib.import_module("wandb")  # not in the environment in which types are checked
        except ImportError:
            raise UserError(
                f"tracking.wandb = {project!r} needs the package wandb; install it with: pip install wandb"
            ) from None
        self._wandb: Any = wandb
        self._run: Any = wandb.init(project=project, name=run_name)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """A table per step: one that grows would be sent whole each time."""
        rows = [[step, each.prompt, each.response, each.score] for each in samples]
        self._run.log({"samples": self._wandb.Table(columns=["step", *SAMPLE_COLUMNS], data=rows)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _MlflowTracker:
    def __init__(self, experiment: str, run_name: str | None):
        try:
            mlflow: Any = importlib.import_module("mlflow")
        except ImportError:
            raise UserError(
                f"tracking.mlflow = {experiment!r} needs the package mlflow; "
                "install it with: pip install mlflow"
            ) from None
        mlflow.set_experiment(experiment)
        self._mlflow: Any = mlflow
        self._run: Any = mlflow.start_run(run_name=run_name)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        # MLflow reads a slash in a name as a folder, which is what the names mean.
        self._mlflow.log_metrics(numbers, step=step)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Rows that are added to the run's artifact samples.json."""
        columns = {"step": [step] * len(samples)}
        columns |= {name: [row[name] for row in map(asdict, samples)] for name in SAMPLE_COLUMNS}
        self._mlflow.log_table(columns, artifact_file="samples.json")

    def close(self) -> None:
        self._mlflow.end_run()

"""Names inside a run folder. People script against them; README.md of this folder lists them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import stat
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config import Recipe
from rlhf_ray.config.recipe_file import flatten
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.config.user_paths import expanded
from rlhf_ray.errors import NotFinite, UserError
from rlhf_ray.runs.storage import read_object, write_atomically

COPIES = "RLHF_RAY_COPIES"  # the folder for working copies of run folders in a store; it needs room for checkpoints and models

@dataclass(frozen=True, slots=True)
class StageFolder:
    """One stage's folder: model/ metrics.jsonl checkpoints/ DONE. Or that of a member of the stage's ensemble."""

    path: Path
    stage: Path | None = None  # for a member: the folder of its stage
    run: RunFolder | None = None

    def member(self, number: int) -> StageFolder:
        """An ensemble's model: the first is where a stage's only model would be, the others are in member_1/ ..."""
        return self if number == 0 else StageFolder(self.path / f"member_{number}", self.path, self.run)

    def member_done(self, number: int) -> Path:
        """Marks that a member is trained, and holds its figures. The stage's DONE is written when all are."""
        return self.path / f"member_{number}" / "DONE"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def done_file(self) -> Path:
        return self.path / "DONE"

    @property
    def stop_file(self) -> Path:
        """Present while the stage is asked to checkpoint and stop; workers look for it after every step."""
        return (self.stage or self.path) / "STOP"

    @property
    def events(self) -> Path:
        """The run's, in the folder above the stage's."""
        return (self.stage or self.path).parent / "events.jsonl"

    @property
    def done(self) -> bool:
        return self.done_file.exists()

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the stage finished; `summary` (its closing figures) is the file's content."""
        write_figures(self.done_file, summary)

    def summary(self, *needed: str) -> dict[str, Any]:
        """The closing figures. UserError for a file that is damaged or lacks one of those needed."""
        return read_figures(self.done_file, needed)


def write_figures(done: Path, figures: dict[str, Any]) -> None:
    """A DONE file. NotFinite for NaN and infinity, which no JSON holds: unknown is None."""
    try:
        text = json.dumps(figures, indent=2, allow_nan=False)
    except ValueError:
        said = {name: json.dumps(value) for name, value in flatten(figures).items()}
        named = ", ".join(f"{name} is {value}" for name, value in said.items() if "NaN" in value or "Infinity" in value)
        raise NotFinite(
            f"closing figures for {done} are not finite ({named}); lower the stage's learning_rate, or set its precision to float32"
        ) from None
    write_atomically(done, text + "\n")


def read_figures(done: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """needed: names of numbers that must be there."""
    remedy = "delete it, and the next run does the stage again"
    figures = read_object(done, remedy)
    if missing := [name for name in needed if not _is_number(figures.get(name))]:
        raise UserError(f"{done} is damaged: it has no number {', '.join(missing)}; {remedy}")
    return figures


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def environment_of(folder: RunFolder) -> dict[str, Any]:
    """Where the run was done: versions and hardware."""
    path, remedy = folder.path / "environment.json", "run the same command again, which writes it"
    found = read_object(path, remedy)
    if not {"cpus", "cpu", "gpus"} <= found.keys() or not isinstance(found["gpus"], list):
        raise UserError(f"{path} is damaged: it does not say on which hardware the run was; {remedy}")
    return found


def timings_of(folder: RunFolder) -> dict[str, float]:
    """Stage -> its seconds, over all resumes; {} before the first stage."""
    path, remedy = folder.path / "timings.json", "delete it, and the seconds of the stages count from 0"
    found = read_object(path, remedy) if path.exists() else {}
    for stage, seconds in found.items():
        if not _is_number(seconds):
            raise UserError(f"{path} is damaged: the seconds of '{stage}' are no number; {remedy}")
    return found


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The run folder (absolute path).

    url: the store that it is a host's working copy of (`runs.remote`); None: it is the run folder itself.
    session: of the run that is under way there, by which a process on another host knows that it is elsewhere (`runs.elsewhere`).
    """

    path: Path
    url: str | None = None
    session: str | None = None

    @property
    def given(self) -> str:
        """As a user names it."""
        return self.url or str(self.path)

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.path / name, run=self)

    @property
    def stage_titles(self) -> dict[str, str]:
        """Stage -> its title, in order."""
        return {name: str(words["title"]) for name, words in self._stage_words().items()}

    @property
    def pair_titles(self) -> dict[str, str]:
        """Stage -> the title of its column, of those whose closing figures say how well they tell replies apart."""
        words = {name: each["pairs_title"] for name, each in self._stage_words().items()}
        return {name: title for name, title in words.items() if title is not None}

    def _stage_words(self) -> dict[str, dict[str, str | None]]:
        """As the run recorded them: a reader may not have imported its plugins."""
        here = {name: {"title": stage.title, "pairs_title": stage.pairs_title} for name, stage in STAGES.items()}
        path = self.path / "stages.json"
        if not path.exists():
            return here
        remedy = "delete it, and the next run writes it again"
        # An older run recorded titles only.
        recorded = {name: {**here.get(name, {"pairs_title": None}), "title": words} if isinstance(words, str) else words
                    for name, words in read_object(path, remedy).items()}  # fmt: skip
        if not all(isinstance(words, dict) and {"title", "pairs_title"} <= words.keys() for words in recorded.values()):
            raise UserError(f"{path} is damaged: a stage has no title; {remedy}")
        return recorded

    def record_stages(self) -> None:
        words = {name: {"title": stage.title, "pairs_title": stage.pairs_title} for name, stage in STAGES.items()}
        write_atomically(self.path / "stages.json", json.dumps(words, indent=2) + "\n")

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def tokenizer(self) -> Path:
        return self.path / "data" / "tokenizer"

    @property
    def logs(self) -> Path:
        """What the run's processes print: one file each."""
        return self.path / "logs"

    @property
    def ray_log(self) -> Path:
        """What Ray says of itself in the process that runs the recipe."""
        return self.logs / "ray.log"

    @property
    def best_model(self) -> Path:
        """The policy with the best held-out score so far, as of the newest checkpoint."""
        return self.path / "ppo" / "best"

    def candidate(self, step: int) -> Path:
        """A policy that was the best one at `step`; it becomes `best_model` with the next checkpoint."""
        return self.path / "ppo" / f".best_{step:06d}"

    @property
    def evaluation_parts(self) -> Path:
        """What an evaluation has done so far; gone when it is done."""
        return self.path / "evaluation" / "parts"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def status(self) -> Path:
        """What the run is doing, or how it ended (`runs.status`)."""
        return self.path / "status.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def data(self, role: str) -> Path:
        """Prepared rows of one role, e.g. data('reward_train'): a Parquet file."""
        return self.path / "data" / f"{role}.parquet"

    def heldout_parts(self, stage: str) -> list[str]:
        """'eval', and any further held-out set that a builder made, e.g. 'eval_openings'."""
        files = sorted((self.path / "data").glob(f"{stage}_eval*.parquet"))
        return [file.stem.removeprefix(f"{stage}_") for file in files]


def start_model(recipe: Recipe, folder: RunFolder) -> str:
    """What PPO and DPO start from and stay close to: the SFT model, or the recipe's model where there is no SFT stage."""
    return str(folder.stage("sft").model) if recipe.sft is not None else recipe.model.name_or_path


def reference_of(recipe: Recipe, folder: RunFolder) -> str:
    """The model that PPO's KL is measured to."""
    return recipe.ppo.reference or start_model(recipe, folder)


def run_folder_of(recipe: Recipe, run_dir: str | None) -> RunFolder:
    """RUN_DIR, absolute before any process starts: a worker has another working directory. Of a URL: this host's working copy."""
    if run_dir is not None and "://" in run_dir:
        url = run_dir.rstrip("/")
        return RunFolder(working_copy(url), url)
    return RunFolder(folder_path(run_dir or f"runs/{recipe.name}", "--run-dir"))


def working_copy(url: str, kind: str = "runs") -> Path:
    """Where this host keeps what it works on of a store: the same path on every host with the same user and environment."""
    top = os.environ.get(COPIES) or os.path.join(os.path.expanduser("~"), ".cache", "rlhf_ray")
    name = url.rstrip("/").rpartition("/")[2]
    return Path(top).absolute() / kind / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:10]}"


def folder_path(given: str | Path, option: str) -> Path:
    """The absolute path of a run folder. UserError for a URI, and for the home of somebody who is not known."""
    if "://" in str(given):
        raise UserError(
            f"{option} {str(given)!r} is a URL; here a folder of this machine is needed"
        )
    return expanded(given).absolute()


def make_private(path: Path) -> None:
    """The folder is there, and nobody but its owner can enter it: prompts and answers are in it, and weights."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_mode & 0o077 and found.st_uid == os.geteuid():
        path.chmod(stat.S_IMODE(found.st_mode) & ~0o077)


@contextmanager
def held(folder: RunFolder) -> Generator[None]:
    """Only this process works in the run folder. The lock ends with the process at the latest, however that ends."""
    make_private(folder.path)
    with open(folder.path / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{folder.given} is in use by {lock.read().strip() or 'another run'}; wait for it, or choose another --run-dir"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield

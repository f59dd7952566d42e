"""All stages of a run in order, each skipped when it is done. No Ray here: the caller brings the functions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_ray.config import Recipe
from rlhf_ray.config.stage_table import STAGES, needs_of
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.errors import StageStopped, UserError
from rlhf_ray.runs.closing import closing_words
from rlhf_ray.runs.own_modules import digests, own_figures, record_changes
from rlhf_ray.runs.resume import check_resume, ppo_goes_on, write_recipe
from rlhf_ray.runs.run_folder import RunFolder, StageFolder, make_private, timings_of
from rlhf_ray.runs.storage import write_atomically

Progress = Callable[[dict[str, Any]], None]
RECORD_S = 10.0  # between two notes of a running stage's time
#: Runs a stage. It writes DONE itself, or returns the closing figures that DONE will hold.
StageFunction = Callable[[Recipe, RunFolder, Progress], dict[str, Any] | None]


def prepare_folder(recipe: Recipe, folder: RunFolder) -> None:
    """Create the run folder, or check that this recipe may continue in it; write the recipe and the environment."""
    changed = check_resume(recipe, folder)
    make_private(folder.path)
    reopen_finished(recipe, folder, changed)
    write_recipe(recipe, folder.recipe)
    folder.record_stages()
    modules, figures = digests(recipe), own_figures()
    record_changes(folder, modules, figures)
    own = {"modules": modules} | ({"figures": figures} if figures else {})
    write_atomically(folder.path / "environment.json", json.dumps(environment() | own, indent=2) + "\n")


def to_reopen(recipe: Recipe, folder: RunFolder, changed: list[str]) -> set[str]:
    """The finished stages that `reopen_finished` would reopen: they need Ray too."""
    ppo = folder.stage("ppo")
    names = {"ppo", "evaluation"} if ppo.done and ppo_goes_on(recipe, ppo.summary("steps")) else set[str]()
    measured = {"evaluation", *needs_of(recipe, "evaluation")} - {"ppo"}
    return names | ({"evaluation"} if {key.partition(".")[0] for key in changed} & measured else set[str]())


def reopen_finished(recipe: Recipe, folder: RunFolder, changed: list[str]) -> None:
    """Reopen finished stages: PPO for more steps, the evaluation for a new policy or when what it measures changed."""
    ppo, evaluation = folder.stage("ppo"), folder.stage("evaluation")
    if ppo.done:
        done = ppo.summary("steps")["steps"]
        if recipe.ppo.steps < done:
            raise UserError(
                f"{folder.path} has done {done} PPO steps; ppo.steps = {recipe.ppo.steps} can't undo them, "
                f"set it to {done} or more"
            )
        if ppo_goes_on(recipe, ppo.summary("steps")):
            _reopen_evaluation(evaluation)
            ppo.done_file.unlink()
    measured = {"evaluation", *needs_of(recipe, "evaluation")} - {"ppo"}
    if {key.partition(".")[0] for key in changed} & measured:
        _reopen_evaluation(evaluation)


def _reopen_evaluation(evaluation: StageFolder) -> None:
    """Delete its figures too: until there are new ones, a report would show the old ones for the new models."""
    evaluation.done_file.unlink(missing_ok=True)
    (evaluation.path / "summary.json").unlink(missing_ok=True)


def known_stages(recipe: Recipe, names: Sequence[str] | None) -> None:
    """UserError for a name that is no stage of the recipe."""
    for name in names or ():
        if name not in recipe.stages:
            why = "its section is null" if name in STAGES else f"it has {', '.join(recipe.stages)}"
            raise UserError(f"the recipe '{recipe.name}' has no stage '{name}': {why}")


def run_stages(
    recipe: Recipe,
    folder: RunFolder,
    stages: Mapping[str, StageFunction],
    progress: Progress,
    names: list[str] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> None:
    """Run the named stages (default: all of the recipe's) in order. A finished one is skipped.

    Raises StageStopped when asked to stop: from inside a stage that looks for STOP, else after the stage.
    """
    known_stages(recipe, names)
    wanted = recipe.stages if names is None else names
    for name in wanted:
        stage = folder.stage(name)
        if stage.done:
            progress({"stage": name, "skipped": True})
            continue
        for needed in needs_of(recipe, name):
            if not folder.stage(needed).done:
                raise UserError(
                    f"stage '{name}' needs '{needed}', which is not done in {folder.path}; "
                    f"run it first: rlhf-ray run (or {STAGES[needed].started_by}) with the same recipe and --run-dir"
                )
        check_stage(recipe, folder, name)
        stage.path.mkdir(parents=True, exist_ok=True)
        stage.stop_file.unlink(missing_ok=True)
        progress({"stage": name, "started": True})  # from here on a Ctrl-C leaves a STOP file, which must stay
        clock = _StageClock(folder, name)

        def told(event: dict[str, Any], clock: _StageClock = clock) -> None:
            with suppress(OSError):  # a full disk is for the stage to tell of
                clock.record(every_s=RECORD_S)
            progress(event)

        try:
            figures = stages[name](recipe, folder, told)
            if not stage.done:
                stage.finish(figures or {})
        finally:
            with suppress(OSError):  # of a full disk the stage's own error tells
                clock.record()
        words = closing_words(stage.summary())
        progress({"stage": name, "done": True, "seconds": clock.total, "seconds_before": clock.before, "summary": words})
        for later in wanted[wanted.index(name) + 1 :]:  # not after the stages between
            if not folder.stage(later).done:
                check_stage(recipe, folder, later)
        if stop_requested() and name != wanted[-1]:
            raise StageStopped(f"{name} is done; stopped before the next stage")


def check_stage(recipe: Recipe, folder: RunFolder, name: str) -> None:
    """UserError where the stage's own check of what it builds on finds something against it, as far as that is there."""
    path = STAGES[name].check
    if path is not None:
        import_function(path)(recipe, folder)


class _StageClock:
    """Adds a stage's seconds to timings.json, which sums them over resumes: now and then, so that a killed run's count too."""

    def __init__(self, folder: RunFolder, name: str):
        self._folder, self._name, self._recorded = folder, name, time.time()
        self.before = self.total = timings_of(folder).get(name, 0.0)

    def record(self, every_s: float = 0.0) -> None:
        """Unless it is less than every_s since the last time."""
        now = time.time()
        if now - self._recorded < every_s:
            return
        self.total += now - self._recorded
        self._recorded = now
        timings = timings_of(self._folder) | {self._name: round(self.total, 1)}
        write_atomically(self._folder.path / "timings.json", json.dumps(timings, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions, the code's git commit, hardware."""
    packages = ("rlhf-ray", "torch", "transformers", "ray", "deepspeed", "trl", "peft", "datasets", "numpy")
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "git_commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD").strip() or None,
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines(),
    }


def _version(package: str) -> str | None:
    """None for our own package where a cluster has it as uploaded source only."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str:
    """What a tool prints; nothing where it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""

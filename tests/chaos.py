"""Every process of a tiny run dies in every phase, at named points: does the run end in the undisturbed run's bits?

    make chaos                                   all cells, and the table in results/chaos/
    python tests/chaos.py --only '*update*' [--write results/chaos]
    python tests/chaos.py --only 'policy x update'    one role in one phase (`chaos_cells.single_cells`)

A cell is a run of `tiny.tiny_recipe` with faults (`actors.faults`), each in another step. It is exact if its final
tensors (the model; policy and critic with their optimisers) have the SHA-256 of the undisturbed run's, its metrics and closing
figures are the same, and each prompt was trained on once per epoch. What is there already in --log is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import conftest  # noqa: F401 - sets the environment before Ray is imported
import pytest
from chaos_cells import Cell, cells, single_cells
from chaos_hosts import Network, hosts_with_faults, session_with_faults
from chaos_store import Storage, as_stored, kept_in_store, storage_with_faults, stored_folder
from chaos_store import refused as no_store
from chaos_table import write_table
from safetensors.torch import load_file
from tiny import tiny_recipe, write_start

from rlhf_ray.actors import faults
from rlhf_ray.actors.groups import PolicyGroup
from rlhf_ray.actors.ppo_stage import run_ppo
from rlhf_ray.actors.session import ray_session
from rlhf_ray.ppo.checkpoint import last_good, read_role
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.remote_store import is_url
from rlhf_ray.runs.run_folder import RunFolder

PROMPTS, BATCH = 16, 8  # of tiny_recipe


# -- one run ----------------------------------------------------------------------------------------------------------


class Ended:
    """A run's events, what it told of its progress, its tensors, and which samples each step trained on."""

    def __init__(self, folder: RunFolder):
        self.folder, self.progress = folder, []

    def run(self, recipe) -> None:
        update, audit = PolicyGroup.update, self.folder.path / "audit.jsonl"

        def audited(group, shards, *rates):
            chunks = shards[0].call.chunks()
            samples = [each for c in chunks for each in zip(c.prompt_indices, c.sample_indices, strict=True)]
            with open(audit, "a") as file:
                file.write(json.dumps([chunks[0].step, samples]) + "\n")
            return update(group, shards, *rates)

        with pytest.MonkeyPatch.context() as patch, kept_in_store(self.folder) as folder:
            patch.setattr(PolicyGroup, "update", audited)
            run_ppo(recipe, folder, self.progress.append)

    @property
    def said(self) -> list[str]:
        return [each.get("say", "") for each in self.progress]

    @property
    def steps(self) -> int:
        return self.folder.stage("ppo").summary()["steps"]

    @property
    def events(self) -> list[dict]:
        return EventLog(self.folder.events).read()

    @property
    def trained(self) -> dict[int, list[tuple[int, int]]]:
        """Step -> (prompt, sample) of its rollouts. A step that is given up is trained again: the last one counts."""
        rows = [json.loads(line) for line in (self.folder.path / "audit.jsonl").read_text().splitlines()]
        return {step: [(prompt, sample) for prompt, sample in samples] for step, samples in rows}

    def digest(self) -> str:
        """SHA-256 of the final model, and of policy and critic with their optimisers."""
        stage, found = self.folder.stage("ppo"), hashlib.sha256()
        tensors = load_file(stage.model / "model.safetensors")
        for role in ("policy", "critic"):
            state, _ = read_role(last_good(stage.checkpoints), role)
            tensors |= {f"{role}/{name}": tensor for name, tensor in state.items()}
        for name in sorted(tensors):
            found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
        return found.hexdigest()

    def metrics(self) -> list[dict]:
        """What does not depend on the machine's speed."""
        kinds = ("objective/", "policy/", "value/", "eval/", "step")
        rows = read_metrics(self.folder.stage("ppo").metrics)
        return [{name: value for name, value in row.items() if name.startswith(kinds)} for row in rows]

    def facts(self) -> dict:
        """All that an exact cell has in common with the undisturbed run."""
        return {"sha256": self.digest(), "metrics": self.metrics(), "figures": self.folder.stage("ppo").summary(),
                "trained": {str(step): sorted(map(list, samples)) for step, samples in self.trained.items()}}  # fmt: skip

    def each_once(self, samples: int = 1) -> bool:
        """Whether each prompt was trained on once per epoch, with all its samples."""
        trained, per_epoch = self.trained, PROMPTS // BATCH
        if sorted(trained) != list(range(self.steps)):
            return False
        every = Counter((prompt, sample) for prompt in range(PROMPTS) for sample in range(samples))
        epochs = [range(first, first + per_epoch) for first in range(0, self.steps, per_epoch)]
        return all(Counter(each for step in steps for each in trained[step]) == every for steps in epochs)


def prepare(path: Path, folder: RunFolder, listed: list[dict]) -> RunFolder:
    """The run folder at the start of PPO, and the faults of the run."""
    for kind in ("calls", "processes", "signs"):
        shutil.rmtree(path.with_name(f"{path.name}.{kind}"), ignore_errors=True)
    path.write_text(json.dumps(listed))
    return write_start(tiny_recipe(), folder)


def run_driver(cell: Cell, path: Path, folder: RunFolder) -> int:
    """The run in processes of its own, one after the other until one ends well -> how many there were. Of a run in a store each
    begins without the working copy of the one before."""
    where = folder.url or str(folder.path)
    for number in range(1, 12):
        command = [sys.executable, __file__, "--driver", where, "--sections", json.dumps(cell.sections)]
        ended = subprocess.run(command, env=os.environ | {faults.VARIABLE: str(path)}, capture_output=True, text=True)
        if ended.returncode == 0:
            return number
        assert ended.returncode == -signal.SIGKILL, ended.stderr[-3000:]
        if folder.url is not None:
            shutil.rmtree(folder.path)
    raise AssertionError("the driver never ended well")


def drive(where: str, sections: dict) -> None:
    """What such a process does."""
    folder = stored_folder(where) if is_url(where) else RunFolder(Path(where))
    with ray_session(None, start_timeout_s=600):
        faults.tell_process("driver-0")
        Ended(folder).run(tiny_recipe(**sections))


# -- the matrix -------------------------------------------------------------------------------------------------------


class Matrix:
    def __init__(self, log: Path, scratch: Path):
        self.log, self.scratch, self.faults = log, scratch, scratch / "faults.json"
        self.storage: Storage | None = None
        self.rows: dict[str, dict] = {}
        if log.exists():
            self.rows = {row["name"]: row for row in map(json.loads, log.read_text().splitlines())}

    def run(self, cell: Cell) -> dict:
        """The cell's row of the table, of an earlier run if there is one."""
        if cell.name in self.rows:
            return self.rows[cell.name]
        wanted = self._undisturbed(cell)
        folder = prepare(self.faults, self._folder(cell), cell.faults)
        ended, started, drivers = Ended(folder), time.monotonic(), 1
        row: dict = {"name": cell.name, "faults": len(cell.faults), "kind": cell.faults[0]["kind"], "error": None}
        try:
            with time_limit(cell.limit_s):
                ended, drivers = self._run(cell, ended)
            facts = ended.facts()
            differs = [name for name in facts if facts[name] != wanted["facts"][name]]
            once = ended.each_once(cell.sections.get("ppo", {}).get("samples_per_prompt", 1))
            dynamic = "dynamic_sampling_rounds" in cell.sections.get("ppo", {})  # draws other prompts too
            row |= {"exact": not differs, "differs": differs, "each_once": once or dynamic and "trained" not in differs}
            row["passed"] = row["each_once"] and (row["exact"] or not cell.exact)
        except BaseException as error:  # fault boundary: a cell that fails is a row of the table
            if isinstance(error, KeyboardInterrupt):
                raise
            row |= {
                "exact": False,
                "each_once": False,
                "passed": False,
                "error": f"{type(error).__name__}: {error}"[:600],
            }
            traceback.print_exc()
        events = ended.events
        row |= {
            "happened": faults.happened(self.faults), "seen": len(events) + drivers - 1, "restarts": drivers - 1,
            "seconds": round(time.monotonic() - started, 1),
            "undisturbed_s": wanted["seconds"], "lost_s": [event["cost_s"] for event in events],
            "steps_lost": [event.get("steps_lost") for event in events], "roles": [event.get("role") for event in events],
            "at": [event.get("step") for event in events], "wanted": cell.faults,
            "met": self.storage.take_met() if cell.store and self.storage else [],
            "what": [f"{event['what']}, {event.get('phase')}: {event.get('seen')}; {event['done']}" for event in events],
        }  # fmt: skip
        return self._keep(row)

    def _undisturbed(self, cell: Cell) -> dict:
        """The run of the same recipe without a fault."""
        name = f"undisturbed {json.dumps(without_placement(cell.sections), sort_keys=True)}"
        if name not in self.rows:
            plain = replace(cell, store=False)
            ended, started = Ended(prepare(self.faults, self._folder(plain), [])), time.monotonic()
            ended, _ = self._run(plain, ended)
            assert not ended.events, ended.events
            self._keep({"name": name, "facts": ended.facts(), "seconds": round(time.monotonic() - started, 1)})
        return self.rows[name]

    def _folder(self, cell: Cell) -> RunFolder:
        if cell.store:
            assert self.storage is not None
            return stored_folder(self.storage.bucket())
        return RunFolder(Path(tempfile.mkdtemp(dir=self.scratch)) / "run")

    def _run(self, cell: Cell, ended: Ended) -> tuple[Ended, int]:
        """(what is left of the run, how many drivers there were). Of a run in a store that is what the store has."""
        drivers = 1
        if cell.driver:
            drivers = run_driver(cell, self.faults, ended.folder)
        else:
            ended.run(tiny_recipe(**cell.sections))
        return (Ended(as_stored(ended.folder, self.scratch)) if cell.store else ended), drivers

    def _keep(self, row: dict) -> dict:
        self.rows[row["name"]] = row = json.loads(json.dumps(row))
        with open(self.log, "a") as file:
            file.write(json.dumps(row) + "\n")
        return row


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def late(*_):
        raise TimeoutError(f"the cell took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def without_placement(sections: dict) -> dict:
    """Where actors stand changes no result."""
    resources = {name: value for name, value in sections.get("resources", {}).items() if name != "placement"}
    return {name: value for name, value in (sections | {"resources": resources}).items() if value}


def possible(cells: list[Cell], why_not: str | None) -> list[Cell]:
    """Those cells, or none, which is told."""
    if cells and why_not is not None:
        print(f"not run: {', '.join(cell.name for cell in cells)}: {why_not}")
    return [] if why_not is not None else cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=["*"], nargs="+", help="cells whose name fits one of these patterns")
    parser.add_argument("--log", type=Path, help="file of the cells that are done (default: of a temporary folder)")
    parser.add_argument("--write", type=Path, help="folder for the table")
    parser.add_argument("--note", default="", help="a sentence on the machine and the commits, for the table")
    parser.add_argument("--driver", help=argparse.SUPPRESS)
    parser.add_argument("--sections", default="{}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.driver is not None:
        drive(args.driver, json.loads(args.sections))
        return
    by_name = {cell.name: cell for pattern in args.only for cell in cells() if fnmatch(cell.name, pattern)}
    by_name |= {cell.name: cell for cell in single_cells() if cell.name in args.only}
    chosen = list(by_name.values())
    with tempfile.TemporaryDirectory(prefix="chaos_") as scratch:
        matrix = Matrix(args.log or Path(scratch) / "cells.jsonl", Path(scratch))

        def left(cells: Iterable[Cell]) -> list[Cell]:
            return [cell for cell in cells if cell.name not in matrix.rows]

        if here := left(cell for cell in chosen if not (cell.driver or cell.hosts != "none" or cell.store)):
            with session_with_faults(matrix.faults):
                for cell in here:
                    matrix.run(cell)
        for cell in left(cell for cell in chosen if cell.driver and not cell.store):  # a process has one Ray at a time
            matrix.run(cell)
        if stored := possible(left(cell for cell in chosen if cell.store), no_store()):
            with storage_with_faults(Path(scratch), matrix.faults) as matrix.storage:
                for cell in (each for each in stored if each.driver):
                    matrix.run(cell)
                if here := [each for each in stored if not each.driver]:
                    with session_with_faults(matrix.faults):
                        for cell in here:
                            matrix.run(cell)
        nodes = left(cell for cell in chosen if cell.hosts == "nodes")
        networks = possible(left(cell for cell in chosen if cell.hosts == "network"), Network.refused())
        for here in (nodes, networks):
            if here:
                with hosts_with_faults(matrix.faults, network=here is networks) as both_there:
                    for cell in here:
                        both_there()
                        matrix.run(cell)
        rows = [row for row in matrix.rows.values() if "passed" in row]
        if args.write is not None:
            write_table(args.write, rows, [cell.name for cell in cells()], args.note)
        sys.exit(any(not row["passed"] for row in rows))


if __name__ == "__main__":
    main()

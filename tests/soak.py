"""PPO for an hour, while its processes are killed one by one: does anything grow, and are the weights the undisturbed run's?

    make soak                                        an hour, and the page in results/chaos/soak.md
    python tests/soak.py --minutes 30 --seed 1 [--write results/chaos]

Every 20 to 60 s a random process of a random role dies (SIGKILL; one time in eight it is stopped instead), but none before the run
has finished a step since the last one: where recovery takes longer than that, as on a busy machine, there would be no progress at
all. At the end the run is stopped after a step; an undisturbed one does as many in one process (`soak_alone`), and the bits are
compared. Then the driver of another run is killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import conftest  # noqa: F401 - sets the environment before Ray is imported
from chaos import BATCH, PROMPTS, Ended
from chaos_cells import VICTIMS
from processes import wait_for
from soak_page import write_page
from soak_samples import files_in, held_by_others, names_in_shared_memory, processes_of, usage
from tiny import tiny_recipe, write_start

from rlhf_ray.actors import faults
from rlhf_ray.errors import StageStopped
from rlhf_ray.ppo.checkpoint import last_good, read_role, read_state
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.storage import write_atomically

SAMPLE_S = 10.0
KILLS_S = (20.0, 60.0)  # from one to the next
STOPS = 8  # one in so many is stopped instead
START_S, END_S, KILLED_S = 900.0, 900.0, 120.0
RECIPE = {"ppo": {"steps": 10**6, "anneal": False, "learning_rate": 1e-4, "critic_learning_rate": 1e-4, "eval_every": 10,
                  "checkpoint_every": 5}}  # fmt: skip


# -- the run, in a process of its own -------------------------------------------------------------------------------------


def drive(folder: Path) -> None:
    """Until somebody writes the stage's STOP."""
    from rlhf_ray.actors.session import ray_session

    with ray_session(None, start_timeout_s=START_S):
        threading.Thread(target=tell_of_store, args=(folder / "store",), daemon=True).start()
        ended = Ended(RunFolder(folder))
        ended.progress = deque(maxlen=1)  # else all that an hour tells would be kept
        with suppress(StageStopped):
            ended.run(tiny_recipe(**RECIPE))


def tell_of_store(told: Path) -> None:
    """Write again and again how many bytes lie in the object store."""
    import ray

    from rlhf_ray.actors.ray_private import store_stats

    while True:
        with suppress(Exception):  # Ray ends with the run
            write_atomically(told, str(store_stats(ray.nodes()[0]).object_store_bytes_used), durable=False)
        time.sleep(SAMPLE_S / 2)


@dataclass
class Run:
    """A driver, its processes, and what they may write to."""

    scratch: Path  # its temporary folder, too: a short path, for Ray's sockets are in it
    name: str
    driver: subprocess.Popen = field(init=False)

    def __post_init__(self):
        place = self.scratch / self.name
        self.faults, self.temporary = place / "faults.json", place / "t"
        self.temporary.mkdir(parents=True)
        self.faults.write_text("[]")
        self.folder = write_start(tiny_recipe(), RunFolder(place / "run"))
        self.environment = {faults.VARIABLE: str(self.faults), "TMPDIR": str(self.temporary)}
        self.shared_before = names_in_shared_memory()

    def start(self) -> None:
        command = [sys.executable, __file__, "--driver", str(self.folder.path)]
        with open(self.scratch / f"{self.name}.log", "ab") as log:
            self.driver = subprocess.Popen(command, env=os.environ | self.environment, stdout=log, stderr=log)
        try:
            wait_for(lambda: self.step() > 0 or self.driver.poll() is not None, seconds=START_S)
            assert self.driver.poll() is None, f"the run ended: see {self.scratch / self.name}.log"
        except BaseException:  # fault boundary: the start; the run does not outlive it
            self.driver.kill()
            raise

    def processes(self) -> list[int]:
        return processes_of(faults.VARIABLE, str(self.faults))

    def pid_of(self, actor: str) -> int | None:
        told = self.faults.with_name("faults.json.processes") / actor
        pid = int(told.read_text() or 0) if told.exists() else 0
        return pid if pid in self.processes() else None

    def step(self) -> int:
        """Finished ones; after a step was given up, fewer than before."""
        told = self.faults.with_name("faults.json.processes") / "step"
        with suppress(OSError, ValueError):
            return int(told.read_text())
        return 0

    def sample(self) -> dict:
        used, ray_files, files = usage(self.processes()), files_in(self.temporary / "ray"), files_in(self.temporary)
        store = self.folder.path / "store"
        return asdict(used) | {
            "step": self.step(), "store": int(store.read_text()) if store.exists() else 0,
            "ray_files": ray_files[0], "ray_file_bytes": ray_files[1], "other_files": files[0] - ray_files[0],
        }  # fmt: skip

    def stop(self) -> None:
        self.folder.stage("ppo").stop_file.touch()
        self.driver.wait(END_S)

    def left_behind(self) -> dict:
        """What is there although it has ended."""
        pids = self.processes()
        names = names_in_shared_memory() - self.shared_before
        kept = sorted(str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*") if path.is_file())
        return {
            "processes": len(pids), "shared memory": sorted(names - held_by_others(names, pids)),
            "temporary files": [name for name in kept if not name.startswith("ray/")],
            "of Ray": sum(name.startswith("ray/") for name in kept),
        }  # fmt: skip

    def last_step(self) -> int:
        folder = last_good(self.folder.stage("ppo").checkpoints)
        assert folder is not None
        return read_state(folder)["step"]

    def each_once(self, steps: int) -> bool:
        """Whether each of the steps trained on the prompts of its turn, and each epoch on every prompt once."""
        trained = {step: samples for step, samples in Ended(self.folder).trained.items() if step < steps}
        per_epoch = PROMPTS // BATCH
        epochs = [range(first, first + per_epoch) for first in range(0, steps - per_epoch + 1, per_epoch)]
        every = Counter((prompt, 0) for prompt in range(PROMPTS))
        return sorted(trained) == list(range(steps)) and all(
            Counter(each for step in steps for each in trained[step]) == every for steps in epochs
        )


def digest_of_checkpoint(folder: Path) -> str:
    return digest_of({role: read_role(folder, role) for role in ("policy", "critic")})


def digest_of(states: dict[str, tuple[dict, int]]) -> str:
    """SHA-256 of each role's tensors by name, weights and optimiser, and its optimiser steps."""
    found = hashlib.sha256()
    for role, (state, taken) in states.items():
        found.update(f"{role} {taken}".encode())
        for name in sorted(state):
            found.update(name.encode() + state[name].detach().float().contiguous().numpy().tobytes())
    return found.hexdigest()


# -- what is done to it ---------------------------------------------------------------------------------------------------


class Killer:
    """Ends random processes of a run, and says which."""

    def __init__(self, run: Run, seed: int):
        self.run, self.random = run, random.Random(seed)
        self.kills, self.furthest = list[dict](), 0
        self.started = time.monotonic()
        self._next(self.started)

    def _next(self, now: float) -> None:
        self.due, self.at_step = now + self.random.uniform(*KILLS_S), self.furthest

    def look(self) -> None:
        now = time.monotonic()
        self.furthest = max(self.furthest, self.run.step())
        if now < self.due or self.furthest <= self.at_step:
            return
        role = self.random.choice(VICTIMS)
        kind = "stop" if self.random.randrange(STOPS) == 0 else "kill"
        pid = self.run.pid_of(f"{role}-0")
        if pid is None:  # it is being made again
            return
        with suppress(ProcessLookupError):
            os.kill(pid, faults.SIGNALS[kind])
            self.kills.append({"seconds": round(now - self.started, 1), "role": role, "kind": kind, "step": self.furthest})
            self._next(now)


def soak(run: Run, minutes: float, seed: int, log: Path) -> tuple[list[dict], list[dict]]:
    """(samples, kills)."""
    killer, samples, began = Killer(run, seed), [], time.monotonic()
    while (passed := time.monotonic() - began) < 60 * minutes:
        assert run.driver.poll() is None, f"the run ended: see {run.scratch / run.name}.log"
        killer.look()
        if passed >= SAMPLE_S * len(samples):
            samples.append({"seconds": round(passed, 1), "kills": len(killer.kills)} | run.sample())
            with open(log, "a") as file:
                file.write(json.dumps(samples[-1]) + "\n")
        time.sleep(0.5)
    return samples, killer.kills


def ended_by_sigkill(run: Run) -> dict:
    """The driver dies in the midst of it."""
    run.start()
    try:
        wait_for(lambda: run.step() > 1, seconds=START_S)
    finally:
        run.driver.send_signal(signal.SIGKILL)
        run.driver.wait()
    died = time.monotonic()
    with suppress(AssertionError):
        wait_for(lambda: not run.processes(), seconds=KILLED_S)
    return run.left_behind() | {"seconds": round(time.monotonic() - died, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="folder for the page and its samples")
    parser.add_argument("--keep", type=Path, help="folder for all that the runs write (default: a temporary one)")
    parser.add_argument("--note", default="", help="a sentence on the machine, for the page")
    parser.add_argument("--driver", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.driver is not None:
        drive(args.driver)
        return
    scratch = args.keep or Path(tempfile.mkdtemp(prefix="soak_"))
    scratch.mkdir(parents=True, exist_ok=True)
    load = [os.getloadavg()[1]]
    run = Run(scratch, "soaked")
    run.start()
    try:
        samples, kills = soak(run, args.minutes, args.seed, scratch / "samples.jsonl")
        load.append(os.getloadavg()[2])
        run.stop()
    except BaseException:  # fault boundary: the soak; its run does not outlive it
        run.driver.kill()
        raise
    steps = run.last_step()
    events = Ended(run.folder).events
    found = {
        "minutes": args.minutes, "seed": args.seed, "steps": steps, "kills": kills, "load": load,
        "lost_s": [event["cost_s"] for event in events], "again": sum(event.get("steps_lost") or 0 for event in events),
        "each_once": run.each_once(steps), "after_end": run.left_behind(),
    }  # fmt: skip
    write_atomically(scratch / "found.json", json.dumps(found))
    alone = [sys.executable, str(Path(__file__).with_name("soak_alone.py")), str(run.folder.path)]
    found["exact"] = subprocess.run(alone, stdout=sys.stderr, check=False).returncode == 0
    found["after_sigkill"] = ended_by_sigkill(Run(scratch, "killed"))
    write_atomically(scratch / "found.json", json.dumps(found))
    print(json.dumps(found))
    if args.write is not None:
        write_page(args.write, found, samples, args.note)
    if args.keep is None:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()

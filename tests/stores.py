"""Run folders in stores, for tests: what a run leaves in its folder, step by step, and stores that fail."""

import hashlib
import json
import os
import re
import shutil
import uuid

from rlhf_ray.runs.contents import Contents
from rlhf_ray.runs.fetching import read_contents
from rlhf_ray.runs.mirror import Mirror
from rlhf_ray.runs.remote_store import Store
from rlhf_ray.runs.sealed import new_folder, seal


class Toy:
    """A run's folder that changes as a run changes it. The content of every file says of which step it is."""

    def __init__(self, path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        (path / "recipe.yaml").write_text("name: toy\nfluency: null\njudge: null\ndpo: null\nsft: {}\nreward: null\nppo: {}\n")

    def model(self, folder, step, more=b""):
        """As `save_model` does: written beside, what was there goes, renamed. more: bytes at the end of the weights."""
        target = self.path / folder
        temporary = target.with_name(f".{target.name}.1.tmp")
        new_folder(temporary)
        for name in ("config.json", "model.safetensors"):
            (temporary / name).write_text(f"{name} of step {step}")
        with open(temporary / "model.safetensors", "ab") as file:
            file.write(more)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)

    def done(self, stage):
        (self.path / stage / "DONE").write_text("{}")

    def step(self, step, keep=1):
        with open(self.path / "ppo" / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step}) + "\n")
        checkpoints = self.path / "ppo" / "checkpoints"
        new_folder(checkpoints / ".step.tmp")
        for name in ("state.json", "policy.safetensors"):
            (checkpoints / ".step.tmp" / name).write_text(f"{name} of step {step}")
        seal(checkpoints / ".step.tmp", checkpoints / f"step_{step:06d}", {})
        for old in sorted(checkpoints.glob("step_*"))[:-keep]:
            shutil.rmtree(old)


def tree(folder):
    """Name -> SHA-256 of all files but those of this machine alone."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not re.search(r"\.lineage\.json|\.lock|\.outgoing", str(path))
    }


def mirror_of(path, store, **options):
    """A mirror without its thread: the test calls `look`."""
    return Mirror(path, store, read_contents(store) or Contents(), uuid.uuid4().hex, **options)


def look_until_level(mirror, looks=200):
    for _ in range(looks):
        mirror.look()
        if mirror._level_at == mirror._looks:
            return
        for upload in mirror._round.uploads.values() if mirror._round else ():
            upload.exception()  # waits for it
    raise AssertionError(f"not level after {looks} looks: {mirror._left}")


class Crash(BaseException):
    """The process is gone."""


class Crashing(Store):
    """Every change of the store after the first `changes` does not happen, nor anything else of its process."""

    changes = 10**9

    def _change(self):
        self.changes -= 1
        if self.changes < 0:
            raise Crash

    def write(self, name, content, deadline_s):
        self._change()
        super().write(name, content, deadline_s)

    def put(self, file, name, deadline_s):
        self._change()
        super().put(file, name, deadline_s)

    def remove(self, name, deadline_s):
        self._change()
        super().remove(name, deadline_s)

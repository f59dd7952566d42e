"""Checkpoints written beside training, with ranks that are plain objects: what the step does not wait for, and a full disk."""

import errno
import os
import shutil
import subprocess
import threading
from collections import namedtuple

import pytest
import torch
from loops import Diary, ScriptedRoles, scripted_loop
from tiny import tiny_recipe

from rlhf_ray.actors.checkpointing import Checkpoints
from rlhf_ray.ppo import checkpoint
from rlhf_ray.ppo.loop import LoopState
from rlhf_ray.runs import disk
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.writing import Writing

Usage = namedtuple("Usage", "total used free")


class Group:
    """One rank of a group, and a disk that may be slow or full."""

    def __init__(self, role, weights):
        self.role, self.weights = role, weights
        self.weight_bytes = weights.numel() * 4
        self.writing, self.disk = Writing(), threading.Event()
        self.disk.set()
        self.error = None
        self.calls = []

    def call(self, method, *args):
        self.calls.append(method)
        return [getattr(self, method)(*args)]

    def state(self):
        yield "weight/a", self.weights
        yield "exp_avg/a", self.weights * 2
        yield "exp_avg_sq/a", self.weights * 3

    def save(self, folder):
        share = checkpoint.share_of_rank(self.role, 0, 1, self.state())

        def write():
            assert self.disk.wait(60)
            if self.error is not None:
                raise self.error
            return checkpoint.write_share(folder, self.role, 0, 1, share, 7)

        self.writing.begin(write)
        return 0

    def saved(self, wait):
        return self.writing.result(wait=wait)


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.stage("ppo").checkpoints.mkdir(parents=True)
    return run


@pytest.fixture
def groups():
    return [Group("policy", torch.arange(6.0)), Group("critic", torch.ones(3))]


@pytest.fixture
def told():
    return []


def get(handles, what):
    return handles


@pytest.fixture
def checkpoints(folder, groups, told):
    return Checkpoints(tiny_recipe(), folder, groups, get, lambda event: told.append(event["say"]))


def steps(folder):
    return [int(path.name[-6:]) for path in checkpoint.complete(folder.stage("ppo").checkpoints)]


def at(step):
    return LoopState(step=step, kl_coef=0.1)


def test_the_step_does_not_wait_for_the_disk_and_the_copy_is_that_of_its_step(checkpoints, folder, groups):
    policy, critic = groups
    policy.disk.clear()  # it takes as long as it likes
    assert checkpoints.save(at(4))
    policy.weights += 100  # training goes on, in place
    checkpoints.look()
    checkpoints.look()
    assert steps(folder) == [] and checkpoint.last_good(checkpoints.path) is None, "it is not whole"
    policy.disk.set()
    policy.writing.result(wait=True)
    critic.writing.result(wait=True)
    checkpoints.look()
    assert steps(folder) == [4]
    state, steps_taken = checkpoint.read_role(checkpoint.last_good(checkpoints.path, pytest.fail), "policy")
    assert state["weight/a"].tolist() == [0, 1, 2, 3, 4, 5] and steps_taken == 7
    assert not list(checkpoints.path.glob(".*"))
    before = list(policy.calls)
    checkpoints.look()
    assert policy.calls == before, "nobody is asked where nothing is being written"


def test_at_most_one_is_being_written(checkpoints, folder, groups):
    groups[1].disk.clear()
    checkpoints.save(at(2))
    threading.Timer(0.2, groups[1].disk.set).start()
    checkpoints.save(at(4))
    assert steps(folder) == [2], "the one before is whole first"
    checkpoints.finish()
    assert steps(folder) == [2, 4]


def test_what_a_lost_group_was_writing_is_given_up(checkpoints, folder, groups):
    checkpoints.save(at(2))
    checkpoints.finish()
    groups[0].disk.clear()
    checkpoints.save(at(4))
    checkpoints.abandon()  # one group is made again; the other still writes
    checkpoints.look()
    assert steps(folder) == [2]
    groups[0].disk.set()
    groups[0].weights += 1
    checkpoints.save(at(4))
    checkpoints.finish()
    state, _ = checkpoint.read_role(checkpoint.last_good(checkpoints.path, pytest.fail), "policy")
    assert steps(folder) == [2, 4] and state["weight/a"].tolist() == [1, 2, 3, 4, 5, 6]


class Disk:
    """In place of `shutil` in `runs.disk`."""

    def __init__(self, free):
        self.free = free

    def disk_usage(self, folder):
        return Usage(10**12, 10**12 - self.free, self.free)


@pytest.fixture
def small_disk(monkeypatch):
    found = Disk(10**12)
    monkeypatch.setattr(disk, "shutil", found)
    return found


def test_without_room_the_last_good_one_stays_until_there_is_some(checkpoints, folder, groups, told, small_disk):
    """3 x 4 bytes for each of 9 weights are 108; the disk has one byte less beside what stays free."""
    checkpoints.save(at(2))
    checkpoints.finish()
    small_disk.free = disk.SPARE_BYTES + 107
    assert not checkpoints.save(at(4)) and not checkpoints.save(at(5))
    assert groups[0].calls.count("save") == 1, "no rank is asked for a copy that can't be written"
    assert steps(folder) == [2] and not list(checkpoints.path.glob(".*"))
    (event,) = EventLog(folder.events).read()
    assert event["what"].startswith("no checkpoint of step 4 is written: the file system of ")
    assert "67.1 MB free, and this takes 108 bytes beside 67.1 MB that stay free" in event["what"]
    assert event["done"] == "ppo goes on; step_000002 is the last good one; tried again after each step"
    assert len(told) == 1, "it is told once"
    assert str(checkpoints.stopped(at(5), 8)) == (
        "ppo stopped after step 5 of 8; no checkpoint could be written since step 2, see events.jsonl"
    )
    small_disk.free += 1
    assert checkpoints.save(at(6))
    checkpoints.finish()
    assert steps(folder) == [2, 6] and "there is room again: the checkpoint of step 6" in told[-1]
    assert str(checkpoints.stopped(at(6), 8)) == "ppo stopped after step 6 of 8; its checkpoint is written"


def test_a_disk_that_fills_up_while_it_is_written_costs_that_checkpoint_alone(checkpoints, folder, groups, told):
    checkpoints.save(at(2))
    checkpoints.finish()
    groups[1].error = OSError(errno.ENOSPC, "No space left on device")
    checkpoints.save(at(4))
    checkpoints.finish()
    assert steps(folder) == [2] and not list(checkpoints.path.glob(".*"))
    assert "no checkpoint of step 4 is written: [Errno 28] No space left on device" in told[0]
    groups[1].error = None
    checkpoints.save(at(6))
    checkpoints.finish()
    assert steps(folder) == [2, 6] and checkpoint.last_good(checkpoints.path, pytest.fail).name == "step_000006"


def test_a_real_file_system_that_is_full(tmp_path, groups, told, monkeypatch):
    """A tmpfs of one megabyte, and a checkpoint of two."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("no right to mount")
    monkeypatch.setattr(disk, "SPARE_BYTES", -(10**9))  # as if it had not been foreseen
    try:
        run = RunFolder(place / "run")
        groups[0].weights = torch.zeros(170_000)
        checkpoints = Checkpoints(tiny_recipe(), run, groups, get, lambda event: told.append(event["say"]))
        assert checkpoints.save(at(2))
        checkpoints.finish()
        assert steps(run) == [] and "No space left on device" in told[0] and len(told) == 1
        assert shutil.disk_usage(place).free > 900_000, "what was written of it is gone"
        groups[0].weights = torch.zeros(10_000)
        assert checkpoints.save(at(3))
        checkpoints.finish()
        assert steps(run) == [3] and "there is room again" in told[-1]
    finally:
        subprocess.run(["umount", place], check=True)


def test_the_loop_comes_again_after_each_step_until_it_may_save():
    """Checkpoints are due after 2, 4 and 6 steps; there is no room until 5 are done."""
    diary = Diary()
    loop = scripted_loop(ScriptedRoles(), diary)
    asked = []

    def save(state):
        asked.append(state.step)
        return state.step >= 5

    loop.hooks.save = save
    assert loop.run()
    assert asked == [2, 3, 4, 5, 6, 7]


def test_a_rank_that_is_killed_leaves_the_last_good_one(folder):
    """A process that dies while it writes: what it had is under a temporary name."""
    path = folder.stage("ppo").checkpoints
    child = os.fork()
    if child == 0:
        temporary = checkpoint.temporary_folder(path, 4)
        temporary.mkdir()
        checkpoint.write_share(temporary, "policy", 0, 1, {"weight/a": torch.ones(3)}, 1)
        os._exit(9)
    os.waitpid(child, 0)
    assert checkpoint.last_good(path) is None and [each.name for each in path.iterdir()] == [".step_000004.tmp"]

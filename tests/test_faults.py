"""Faults at named points (`actors.faults`): where in a call they happen. What a run does then is the recovery tests' subject."""

import json
import os
import subprocess

import pytest

from rlhf_ray.actors import faults
from rlhf_ray.models import wire


class Engine:
    def step(self, number):
        return number

    def items(self):
        yield from "abc"


class Role:
    def __init__(self):
        self.engine = Engine()


@faults.with_points
class Actor:
    def __init__(self, name):
        self.name, self.role, self.done = name, Role(), []

    def update(self):
        for number in range(4):
            self.done.append(self.role.engine.step(number))

    def save(self):
        for item in self.role.engine.items():
            self.done.append(item)

    def load(self):
        for number in range(3):
            wire.as_tensor(None if number else NotImplemented)
            self.done.append(number)


@pytest.fixture
def at(tmp_path, monkeypatch):
    """An actor with one fault."""
    monkeypatch.setenv(faults.VARIABLE, str(tmp_path / "faults.json"))

    def actor(method, when, kind="exception", **more):
        fault = {"role": "policy", "rank": 0, "method": method, "call": 1, "when": when, "kind": kind} | more
        (tmp_path / "faults.json").write_text(json.dumps([fault]))
        return Actor("policy-0")

    return actor


@pytest.mark.parametrize(("method", "when", "more", "done"), [
    ("update", "before", {}, []),
    ("update", "role.engine.step", {}, []),  # the first has worked, and its caller does not hear of it
    ("update", "role.engine.step", {"times": 3}, [0, 1]),
    ("update", "after", {}, [0, 1, 2, 3]),
    ("save", "role.engine.items", {}, ["a"]),
    ("save", "role.engine.items", {"times": 2}, ["a", "b"]),
])  # fmt: skip
def test_where_in_a_call_a_fault_happens(at, tmp_path, method, when, more, done):
    actor = at(method, when, **more)
    with pytest.raises(RuntimeError, match="a fault for tests"):
        getattr(actor, method)()
    assert actor.done == done
    assert "step" not in vars(actor.role.engine) and "items" not in vars(actor.role.engine)
    getattr(actor, method)()  # another call of it: nothing is left in place
    assert len(actor.done) == len(done) + (4 if method == "update" else 3)
    assert faults.happened(tmp_path / "faults.json") == 1


def test_a_function_of_the_package_is_followed_and_left_as_it_was(at, monkeypatch):
    monkeypatch.setattr(wire, "as_tensor", lambda weight: weight)
    before = wire.as_tensor
    actor = at("load", "rlhf_ray.models.wire.as_tensor", times=2)
    with pytest.raises(RuntimeError, match="a fault for tests"):
        actor.load()
    assert actor.done == [0] and wire.as_tensor is before


def test_a_sign_is_for_whoever_makes_the_fault(at, tmp_path):
    at("update", "role.engine.step", kind="sign", name="storage", do="die").update()
    told = json.loads((tmp_path / "faults.json.signs" / "storage.json").read_text())
    assert told["when"] == "role.engine.step" and told["do"] == "die"
    assert faults.happened(tmp_path / "faults.json") == 1  # after the first of four steps, and no more


def test_a_link_goes_down_and_comes_up_again(at, tmp_path, monkeypatch):
    """What is run, not what it does: that takes a network of its own (`chaos`)."""
    told = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: told.append(command))
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: told.append(command))
    at("update", "before", kind="link", interface="eth0").update()
    at("save", "before", kind="link", interface="eth0", seconds=3).save()
    network = ["nsenter", f"--net=/proc/{os.getpid()}/ns/net"]
    down = [*network, "ip", "link", "set", "dev", "eth0", "down"]
    assert told == [down, [*network, "sh", "-c", "sleep 3; ip link set dev eth0 up"], down]


@faults.with_points
class Scorer:
    def __init__(self, name):
        self.name = name
        faults.tell_process(name)

    def score(self, value):
        return value


def test_a_fault_comes_at_its_call_counted_over_restarts(tmp_path, monkeypatch):
    path = tmp_path / "faults.json"
    fault = {"role": "reward", "rank": 1, "method": "score", "call": 3, "when": "before", "kind": "exception"}
    path.write_text(json.dumps([fault]))
    assert Scorer("reward-1").score(5) == 5  # not asked for
    monkeypatch.setenv(faults.VARIABLE, str(path))
    assert [Scorer("reward-0").score(5) for _ in range(5)] == [5] * 5  # another rank
    first = Scorer("reward-1")
    assert (first.score(1), first.score(2)) == (1, 2)
    with pytest.raises(RuntimeError, match="a fault for tests"):
        Scorer("reward-1").score(3)  # the third, of an actor that was made again
    assert first.score(4) == 4


def test_a_fault_of_a_step_counts_the_calls_of_that_step(tmp_path, monkeypatch):
    path = tmp_path / "faults.json"
    fault = {"role": "reward", "rank": 0, "method": "score", "step": 1, "call": 2, "when": "after", "kind": "exception"}
    path.write_text(json.dumps([fault]))
    monkeypatch.setenv(faults.VARIABLE, str(path))
    role = Scorer("reward-0")
    for step, calls in ((0, 3), (1, 1), (2, 3)):
        faults.tell_step(step)
        assert [role.score(5) for _ in range(calls)] == [5] * calls
    faults.tell_step(1)  # the step is taken again
    with pytest.raises(RuntimeError, match="a fault for tests"):
        role.score(5)
    assert role.score(5) == 5

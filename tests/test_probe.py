"""Whether products in blocks are used: measured on the machine, once, and kept."""

import json
import subprocess
import sys

import pytest
import torch
from processors import WITH_BLOCKS, functions_of

from rlhf_ray.cpu import kernels
from rlhf_ray.cpu.kernels import probe
from rlhf_ray.cpu.kernels.probe import LEAST, ROUNDING, Finding, finding

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler, or RLHF_RAY_KERNELS=off")


@pytest.fixture(autouse=True)
def forget():
    yield
    finding.cache_clear()


@pytest.mark.usefixtures("processor_with_blocks")
def test_products_that_are_right():
    """Half a unit of bfloat16's last place is 2**-9 of a number."""
    found = probe.probe()
    assert 2**-12 < found.error < 2**-8 and found.times_as_fast > 0


@pytest.mark.usefixtures("processor_with_blocks")
@pytest.mark.parametrize("wrong", ["linear", "linear_by_input", "linear_by_weight"])
def test_products_that_are_wrong(wrong, monkeypatch):
    """One of the three does not do its work: what it should have written are ones."""
    right, place = kernels.kernel, {"linear": 4, "linear_by_input": 3, "linear_by_weight": 2}[wrong]
    monkeypatch.setattr(
        kernels, "kernel", lambda name: (lambda *given: given[place].fill_(1.0)) if name == wrong else right(name)
    )
    found = probe.probe()
    assert found.error > 0.5 and not found.good


def test_what_is_good():
    assert Finding(ROUNDING / 2, 1.0).good and Finding(ROUNDING / 2, LEAST).good
    assert not Finding(ROUNDING / 2, LEAST - 0.01).good and not Finding(ROUNDING, 1.0).good
    assert not Finding(float("nan"), 9.0).good and not Finding(float("inf"), 9.0).good


@pytest.fixture
def answers(monkeypatch):
    """What the next probes find."""
    answers = [Finding(0.001, 0.5), Finding(0.001, 2.0), Finding(0.001, 3.0)]
    monkeypatch.setattr(probe, "probe", lambda: answers.pop(0))
    return answers


def test_it_is_asked_once_and_the_first_answer_stays(tmp_path, answers, caplog, monkeypatch):
    library = tmp_path / "kernels-1.so"
    assert finding(library) == Finding(0.001, 0.5)
    assert "0.50 times as fast as torch's" in caplog.text
    finding.cache_clear()  # another process
    assert finding(library) == Finding(0.001, 0.5) and len(answers) == 2
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".lock"]
    monkeypatch.setattr(torch, "__version__", "9.9")  # whose products may be faster
    finding.cache_clear()
    assert finding(library) == Finding(0.001, 2.0)


def test_whoever_asks_meanwhile_waits_for_the_answer(tmp_path, answers):
    """A process of its own holds the lock, and writes the answer before it lets go."""
    library = tmp_path / "kernels-1.so"
    code = f"""
import fcntl, time, torch
from pathlib import Path
with open({str(library.with_suffix(".lock"))!r}, "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(1)
    record = Path({str(library)!r}).with_suffix(f".torch-{{torch.__version__}}.json")
    record.write_text('{{"error": 0.002, "times_as_fast": 4.0}}')
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert finding(library) == Finding(0.002, 4.0) and len(answers) == 3


@pytest.mark.parametrize("left", ["", "{", '{"error": 1}', "[]"])
def test_a_part_of_an_answer_is_none(tmp_path, answers, left):
    finding(tmp_path / "kernels-1.so")
    (record,) = tmp_path.glob("*.json")
    record.write_text(left)
    finding.cache_clear()
    assert finding(tmp_path / "kernels-1.so") == Finding(0.001, 2.0)
    assert json.loads(record.read_text()) == {"error": 0.001, "times_as_fast": 2.0}


def test_a_file_system_without_locks_keeps_the_answer_too(tmp_path, answers, monkeypatch):
    def no_locks(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(probe.fcntl, "flock", no_locks)
    finding(tmp_path / "kernels-1.so")
    finding.cache_clear()
    assert finding(tmp_path / "kernels-1.so") == Finding(0.001, 0.5) and len(answers) == 2


def test_where_nothing_can_be_kept_every_process_finds_out(tmp_path, answers, caplog):
    """As in a folder that belongs to somebody else; here there is none."""
    assert finding(tmp_path / "nowhere" / "kernels-1.so") == Finding(0.001, 0.5)
    assert "can't be kept" in caplog.text and len(answers) == 2


@pytest.mark.parametrize(("times", "used"), [(1.5, True), (0.5, False)])
@pytest.mark.parametrize("processor", [each for each in WITH_BLOCKS if each != "this one"])
def test_blocks_are_used_where_they_pay(processor, times, used, tmp_path, monkeypatch):
    functions = functions_of(processor)
    monkeypatch.setattr(kernels, "library", lambda: functions)
    monkeypatch.setattr(kernels, "_path", lambda: tmp_path / "kernels-1.so")
    monkeypatch.setattr(probe, "probe", lambda: Finding(0.001, times))
    assert kernels.has_blocks.__wrapped__() is used
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert kernels.has_blocks.__wrapped__() is False

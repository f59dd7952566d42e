"""Whether products in blocks are used: measured on the machine, once, and kept."""

import json

import pytest
from processors import WITH_BLOCKS, functions_of

from rlhf_ray import kernels
from rlhf_ray.kernels import probe
from rlhf_ray.kernels.probe import LEAST, ROUNDING, Finding, finding

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


def test_it_is_asked_once_and_the_first_answer_stays(tmp_path, monkeypatch, caplog):
    library, answers = tmp_path / "kernels-1.so", [Finding(0.001, 0.5), Finding(0.001, 2.0)]
    monkeypatch.setattr(probe, "probe", lambda: answers.pop(0))
    assert finding(library) == Finding(0.001, 0.5)
    assert "0.50 times as fast as torch's" in caplog.text
    finding.cache_clear()  # another process
    assert finding(library) == Finding(0.001, 0.5) and len(answers) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kernels-1.blocks.json"]


def test_of_two_that_ask_at_once_both_hear_the_first(tmp_path, monkeypatch):
    library = tmp_path / "kernels-1.so"

    def slow_probe():
        library.with_suffix(".blocks.json").write_text(json.dumps({"error": 0.001, "times_as_fast": 3.0}))
        return Finding(0.001, 0.5)

    monkeypatch.setattr(probe, "probe", slow_probe)
    assert finding(library) == Finding(0.001, 3.0)
    assert len([*tmp_path.iterdir()]) == 1


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

"""When decode steps are accelerated, and what happens without a compiler or where that is switched off."""

import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ray.cpu import compiled
from rlhf_ray.cpu.cpu_door import accelerate, hindrance
from rlhf_ray.cpu.operations import OperationsInC
from rlhf_ray.cpu.packed_linear import PackedForward
from rlhf_ray.cpu.recorded_step import RecordedStep
from rlhf_ray.generation.decode_step import DecodeStep, gpt2_step


def step(dtype=torch.float32) -> DecodeStep:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=7, n_embd=8, n_layer=1, n_head=2, n_positions=8)).to(dtype)
    return DecodeStep(model, gpt2_step)


def parts(found) -> tuple[bool, bool, bool]:
    """packed, operations, recorded"""
    plain = found.step if isinstance(found, RecordedStep) else found
    packed = isinstance(plain.model.lm_head.forward, PackedForward)
    return packed, isinstance(plain.operations, OperationsInC), isinstance(found, RecordedStep)


@pytest.mark.skipif(compiled.library() is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("left_out", "expected"),
    [("", (True, True, True)), ("on", (True, True, True)), ("off", (False, False, False)), ("packed", (False, True, True)),
     ("operations", (True, False, False)), ("recorded", (True, True, False)), ("packed,recorded", (False, True, False))],
)  # fmt: skip
def test_parts_are_left_out_by_name(left_out, expected, monkeypatch):
    monkeypatch.setenv("RLHF_RAY_CPU", left_out)
    assert parts(accelerate(step())) == expected


def test_what_is_no_part_is_refused(monkeypatch):
    monkeypatch.setenv("RLHF_RAY_CPU", "packed,fast")
    with pytest.raises(ValueError, match="RLHF_RAY_CPU=fast,packed is none of on, off, or some of packed,operations,recorded"):
        accelerate(step())


def test_other_dtypes_are_not_recorded_and_other_devices_are_left_alone(monkeypatch):
    monkeypatch.setenv("RLHF_RAY_CPU", "on")
    assert not isinstance(accelerate(step(torch.bfloat16)), RecordedStep)
    elsewhere = step()
    elsewhere.model.to("meta")
    assert accelerate(elsewhere) is elsewhere and parts(elsewhere) == (False, False, False)


def test_a_user_is_told_what_hinders(monkeypatch):
    monkeypatch.setenv("RLHF_RAY_CPU", "off")
    assert sys.platform != "linux" or "apt-get install gcc" in hindrance()
    monkeypatch.setenv("RLHF_RAY_CPU", "on")
    assert sys.platform != "linux" or (hindrance() is None) == (compiled.library() is not None)


@pytest.fixture
def made_anew(tmp_path, monkeypatch):
    """`library` as the next process calls it, for a user whose cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return compiled.library.__wrapped__


def test_without_a_compiler_torch_does_the_work(made_anew, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert made_anew() is None and not caplog.records


def test_a_compiler_that_fails_is_told_of_and_torch_does_the_work(made_anew, tmp_path, monkeypatch, caplog):
    (tmp_path / "cc").write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert made_anew() is None
    (told,) = caplog.records
    assert told.levelname == "WARNING"
    assert "no such header" in told.getMessage() and "torch's operations do their work" in told.getMessage()
    assert not [*tmp_path.rglob("*.so")]


@pytest.mark.skipif(compiled.library() is None, reason="no C compiler")
def test_they_are_compiled_once(made_anew, tmp_path):
    assert made_anew() is not None
    (made,) = (tmp_path / "rlhf_ray").iterdir()
    when = made.stat().st_mtime_ns
    assert made_anew() is not None
    assert made.stat().st_mtime_ns == when

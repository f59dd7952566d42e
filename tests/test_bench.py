"""Benchmark commands that need no Ray, once each."""

import ast

import pytest
import torch
from benches import LENGTHS, MODEL, answered
from command import rlhf_ray

from rlhf_ray.bench import trl
from rlhf_ray.errors import UserError


def test_the_trl_script_needs_nothing_of_ours():
    """It runs in an environment without rlhf_ray, so an import anywhere in it would fail there."""
    tree = ast.parse(trl.SCRIPT.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "trl.experimental.ppo" in names
    assert not [name for name in names if name.startswith("rlhf_ray")]


def test_an_environment_that_is_there_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = trl.environment_folder()
    assert folder.is_relative_to(tmp_path)
    folder.mkdir(parents=True)
    (folder / ".installed").write_text("\n".join(trl.PACKAGES))
    assert trl.trl_python(folder, say=pytest.fail) == folder / "bin" / "python"


@pytest.mark.slow
def test_without_a_package_index_the_refusal_is_one_sentence(tmp_path, monkeypatch):
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="could not be made in .*leave out --against-trl"):
        trl.trl_python(tmp_path / "trl")


def test_bench_scale_knows_its_gpus():
    refused = rlhf_ray("bench", "scale", "--gpu", "k80")
    assert refused.returncode == 2 and "'k80' is none of h100, h200" in refused.stderr


@pytest.mark.thorough
def test_bench_scale_prints_a_row_a_size_and_way():
    answer = rlhf_ray("bench", "scale")
    assert "7B on 512 ahead" in answer.stdout and "70B on 8 apart does not fit: PPO needs about 151.3 GB there" in answer.stdout
    assert "7B, apart bends: " in answer.stdout and "70B, evaluation, one process however many GPUs" in answer.stdout
    assert "OpenRLHF, 70B on 32 A800" in answer.stdout


@pytest.mark.thorough
def test_bench_generate_compares_ways_on_the_same_work():
    found = answered("generate", *MODEL, *LENGTHS, "--batch", "40", "--repeats", "1", "--precision", "float32")
    ways = {way["way"]: way for way in found["ways"]}
    engine, plain = ways["engine"]["tokens_per_s"]["median"], ways["model.generate, float32"]
    assert plain["ratio"]["median"] == pytest.approx(engine / plain["tokens_per_s"]["median"])
    assert found["work"]["response_tokens"] == 5
    shown = rlhf_ray("bench", "generate", *MODEL, *LENGTHS, "--batch", "2", "--repeats", "1")
    assert "model.generate" in shown.stdout
    assert ("vLLM is not installed here" in shown.stdout) == (not found["vllm_installed"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told():
    answer = rlhf_ray("bench", "ppo", "--gpu")
    assert answer.returncode == 2 and "--gpu needs a GPU, and torch finds none here" in answer.stderr

"""Each benchmark command that starts Ray, once at a tiny size."""

import contextlib
import inspect

import pytest
from benches import LENGTHS, MODEL, answered
from command import rlhf_ray

from rlhf_ray.actors.session import ray_session
from rlhf_ray.bench import flops, trl
from rlhf_ray.bench.flops import Shape, Work

pytestmark = pytest.mark.ray


@pytest.mark.thorough
def test_bench_controller_counts_what_passes():
    found = answered("controller", "--generators", "3", "--processes", "1", "--ranks", "1", "--rows", "2",
                     "--weight-mb", "1", "--steps", "6", *LENGTHS)  # fmt: skip
    assert found["work"]["chunks"] == 3 and found["work"]["calls"] == 5 * 3 + 1 + 2 + 1 + 3
    assert found["put_bytes_per_step"] >= 1 << 20  # the weights of each sync
    assert found["put_bytes_per_step"] <= max(found["store_bytes"]["first"], found["store_bytes"]["last"])
    assert found["cpu_s_per_step"]["median"] > 0 and found["ratio"]["median"] > 0
    trend = found["cpu_s_trend"]
    assert trend["low"] <= trend["mean"] <= trend["high"] and abs(trend["mean"]) < found["cpu_s_per_step"]["high"]
    refused = rlhf_ray("bench", "controller", "--steps", "2")
    assert refused.returncode == 2 and "give at least 5" in refused.stderr


@pytest.mark.slow
def test_bench_sync_moves_the_models_bytes():
    found = answered("sync", "--megabytes", "9", "--repeats", "1", "--precision", "float32")
    (size,) = found["sizes"]
    assert size["megabytes"] * 1e6 == pytest.approx(4 * size["weights"])
    assert size["gb_per_s"]["median"] == pytest.approx(size["megabytes"] / 1e3 / size["seconds"]["median"])
    assert 0 < size["ratio"]["median"] < 1


@pytest.mark.slow
def test_bench_serve_has_a_row_for_each_number_of_clients():
    found = answered("serve", *MODEL, *LENGTHS, "--requests", "6", "--clients", "1", "--clients", "3", "--repeats", "1",
                     "--precision", "float32")  # fmt: skip
    assert [row["clients"] for row in found["clients"]] == [1, 3]
    for row in found["clients"]:
        assert 0 < row["latency_p50_s"] <= row["latency_p95_s"]
        assert 0 < row["ratio"]["median"] < 1


@pytest.mark.slow
@pytest.mark.skipif(
    not (trl.environment_folder() / ".installed").exists(),
    reason="`rlhf-ray bench ppo --against-trl` makes TRL's environment",
)
def test_bench_ppo_against_trl():
    found = answered("ppo", *MODEL, *LENGTHS, "--batch", "4", "--epochs", "1", "--iterations", "1", "--against-trl")[
        "trl"
    ]
    best = max(run["samples_per_s"] for run in found["runs"])
    assert found["best"]["samples_per_s"] == best and found["ratio"] > 0
    assert all(0.2 < run["pss_gb"] < 3.0 for run in found["runs"])


@pytest.mark.gpu
def test_bench_ppo_on_a_gpu():
    found = answered("ppo", *MODEL, *LENGTHS, "--batch", "4", "--epochs", "1", "--iterations", "1", "--gpu")
    assert found["matmul"]["device"] == "cuda" and found["response_tokens"] == 5.0


@pytest.fixture
def on_the_shared_ray(session, monkeypatch):
    """Where a command would start its own."""
    start = inspect.signature(ray_session)

    def instead(*arguments, **options):
        start.bind(*arguments, **options)
        return contextlib.nullcontext()

    monkeypatch.setattr("rlhf_ray.actors.session.ray_session", instead)


@pytest.mark.thorough
def test_bench_ppo_holds_its_phases_against_their_arithmetic(on_the_shared_ray):
    found = answered("ppo", *MODEL, *LENGTHS, "--batch", "4", "--epochs", "1", "--iterations", "1", "--precision",
                     "float32", "--threads", "1")  # fmt: skip
    assert found["response_tokens"] == 5.0 and found["mismatch_max"] < 1e-4
    work = Work(rows=4, prompt=6, response=5, epochs=1)
    counted = flops.phases(Shape(layers=1, width=32, heads=2, vocabulary=260), work)
    rows = {row["phase"]: row for row in found["floor"]}
    assert {name: rows[name]["flop"] for name in counted} == counted
    assert rows["iteration"]["flop"] == sum(counted.values())
    assert 0 < rows["update"]["peak_share"] < 1 and found["matmul"]["threads"] == 1
    assert 1.0 < found["pss_gb"] < 6.0  # nine processes, most of them with torch

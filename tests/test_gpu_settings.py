"""What is set otherwise for GPUs, and what workers are told, as far as it shows without one."""

import os
from types import SimpleNamespace

import pytest
import torch
from loops import Diary, ScriptedRoles

from rlhf_ray.actors.receipt import with_receipt
from rlhf_ray.actors.session import worker_environment
from rlhf_ray.config import PPOConfig
from rlhf_ray.ppo.gates import MismatchError, check_mismatch
from rlhf_ray.ppo.loop import LoopState, PPOLoop
from rlhf_ray.serving.loading import available_memory
from rlhf_ray.training.deepspeed_config import deepspeed_config
from rlhf_ray.training.deepspeed_engine import DeepSpeedEngine, OptimiserConfig


@pytest.mark.parametrize(
    "stage, kind, overlaps", [(0, "cuda", None), (1, "cpu", False), (3, "cpu", False), (2, "cuda", True), (3, "cuda", True)]
)
def test_communication_overlaps_on_gpus_only(stage, kind, overlaps):
    settings = OptimiserConfig(adam_eps=1e-5, max_grad_norm=1.0, zero_stage=stage)
    ours = DeepSpeedEngine._deepspeed_options(SimpleNamespace(config=settings, device=torch.device(kind)))
    theirs = deepspeed_config(
        zero_stage=stage, compute_dtype=torch.float32, microbatch_size=1, accumulation_steps=1, workers=2, on_gpu=kind == "cuda"
    )
    assert [each["zero_optimization"].get("overlap_comm") for each in (ours, theirs)] == [overlaps, overlaps]


def test_nccls_variables_reach_the_workers_but_for_the_nodes_own(monkeypatch):
    for name, value in {"NCCL_DEBUG": "INFO", "NCCL_P2P_DISABLE": "1", "NCCL_SOCKET_IFNAME": "eth7", "NOT_NCCL_X": "1"}.items():
        monkeypatch.setenv(name, value)
    told = worker_environment()
    assert {name: value for name, value in told.items() if "NCCL" in name} == {"NCCL_DEBUG": "INFO", "NCCL_P2P_DISABLE": "1"}


@pytest.mark.parametrize("shares, times", [(True, 1), (False, 0)])
def test_an_actor_that_shares_its_gpu_gives_memory_back_after_each_call(shares, times, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))

    class Actor:
        shares_gpu = shares

        @with_receipt
        def score(self, rollout):
            assert not calls
            return rollout

    result, receipt = Actor().score("scores")
    assert result == "scores" and receipt.seconds >= 0 and len(calls) == times


def test_deepspeed_tries_no_compiler(monkeypatch):
    """Whether its operators could be built here, it finds out with g++ and nvcc, at the first question."""
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    import deepspeed

    from rlhf_ray.training.distributed import prepare_deepspeed

    def probe():
        raise AssertionError("it tries to compile")

    vars(deepspeed.ops).pop("__compatible_ops__", None)
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", probe)
    prepare_deepspeed("cpu")
    assert not deepspeed.ops.__compatible_ops__.get("deepspeed_shm_comm", False)


def test_how_far_a_policy_may_be_from_itself():
    """In bfloat16 as far as two passes of one model that batch their rows otherwise; a number in the recipe counts always."""
    assert PPOConfig().first_approx_kl_limit(bfloat16=False) == 1e-3
    assert PPOConfig(max_mismatch_kl=0.02).first_approx_kl_limit(bfloat16=True) == 0.02
    assert PPOConfig().first_approx_kl_limit(bfloat16=True, temperature=0.5) == pytest.approx(0.024)
    assert PPOConfig(max_first_approx_kl=0.5).first_approx_kl_limit(bfloat16=True) == 0.5


@pytest.mark.parametrize("temperature, gap, kl", [(1.0, 0.35, 0.006), (0.7, 0.5, 0.0122449), (2.0, 0.175, 0.0015)])
def test_a_gate_s_default_goes_with_the_temperature(temperature, gap, kl):
    """The same rounded logits, divided: log-probs apart by 1/T, and a KL of small differences by 1/T squared. A number in the
    recipe counts as it is."""
    assert PPOConfig().mismatch_limits(temperature) == pytest.approx((gap, kl), rel=1e-5)
    assert PPOConfig(max_mismatch=0.1, max_mismatch_kl=0.2).mismatch_limits(temperature) == (0.1, 0.2)
    logits = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4 + 16
    found = [
        (logits.bfloat16().double() / t).log_softmax(-1)[:, 0] - (logits / t).log_softmax(-1)[:, 0] for t in (1.0, temperature)
    ]
    ratio = [float(each.abs().quantile(0.99)) for each in found]
    assert ratio[1] / ratio[0] == pytest.approx(1 / temperature, rel=0.2)


@pytest.mark.parametrize("temperature, stops", [(1.0, True), (0.7, False)])
def test_the_loop_s_gate_has_the_temperature(temperature, stops):
    loop = PPOLoop(
        ScriptedRoles(), PPOConfig(), Diary().hooks(), LoopState(kl_coef=0.1), prompts=8, eval_prompts=3, chunk_size=2, seed=0,
        temperature=temperature,
    )  # fmt: skip
    gap = {"policy/mismatch_p99": 0.4, "policy/mismatch_kl": 0.01}
    if stops:
        with pytest.raises(MismatchError, match=r"above ppo.max_mismatch = 0.35;"):
            check_mismatch(gap, loop.limits)
    else:
        check_mismatch(gap, loop.limits)


def test_memory_that_is_available(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       8000000 kB\nMemFree:  1000 kB\nMemAvailable:    3000000 kB\n")
    assert available_memory(meminfo) == 3_000_000 * 1024
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_memory(tmp_path / "none") == everything and 0 < available_memory() <= everything

"""What the soak (`soak`, `make soak`) computes and looks at, without a run."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import wait_for
from slopes import slope
from soak_samples import held_by_others, names_in_shared_memory, processes_of, usage

HOURS = np.arange(60) / 360  # a sample every ten seconds


def test_a_slope_has_the_interval_of_newey_and_west():
    """statsmodels 0.15: OLS(values, add_constant(HOURS)).fit(cov_type="HAC", use_t=True, cov_kwds={"maxlags": 6,
    "use_correction": True})."""
    values = np.array([100 + (i * i * 7 % 13) + 3 * ((i // 6) % 3) + 0.05 * i for i in range(60)])
    found = slope(HOURS, values, lag=6)
    assert found.per_hour == pytest.approx(22.621283689913717, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((-3.9706667882233155, 49.21323416805075), rel=1e-9)
    assert slope(HOURS, values + 40 * HOURS, lag=6).low == pytest.approx(40 - 3.9706667882233155, rel=1e-9)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs /proc/PID/smaps_rollup (Linux 4.14)")
def test_the_processes_of_a_run_are_found_by_their_environment_and_summed(tmp_path):
    """Of two processes that share 8 MiB of memory each counts half."""
    work = (
        "import mmap, os, sys, time\n"
        "shared = mmap.mmap(-1, 8 << 20); shared[:] = bytes(8 << 20)\n"
        "child = os.fork()\n"
        "touched = sum(shared[::4096])\n"
        "os.open(sys.argv[1], os.O_CREAT | os.O_RDWR) if child else None\n"
        "print(flush=True)\n"
        "time.sleep(600)"
    )
    mark = str(tmp_path / "faults.json")
    command = [sys.executable, "-c", work, str(tmp_path / "held")]
    process = subprocess.Popen(command, env=os.environ | {"SOAK_TEST": mark}, stdout=subprocess.PIPE, text=True)
    try:
        assert [process.stdout.readline(), process.stdout.readline()] == ["\n", "\n"]
        pids = processes_of("SOAK_TEST", mark)
        assert len(pids) == 2 and process.pid in pids
        both, one = usage(pids), usage([process.pid])
        assert both.processes == both.threads == 2
        assert both.descriptors == 2 * one.descriptors - 1 == sum(both.descriptors_of.values())
        assert sum(both.pss_of.values()) == both.pss
        assert both.shared == pytest.approx(8 << 20, rel=0.05) and one.shared == pytest.approx(4 << 20, rel=0.05)
        assert both.rss > both.pss + (7 << 20)
    finally:
        for pid in processes_of("SOAK_TEST", mark):
            os.kill(pid, 9)
        process.wait()
    wait_for(lambda: not processes_of("SOAK_TEST", mark))


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs /dev/shm")
def test_what_another_process_holds_in_shared_memory_is_not_the_runs():
    before, name = names_in_shared_memory(), f"soak_test_{os.getpid()}_{time.monotonic_ns()}"
    with open(f"/dev/shm/{name}", "w"):
        try:
            assert name in names_in_shared_memory() - before
            assert held_by_others([name], []) == {name}  # this one
            assert held_by_others([name], [os.getpid()]) == set()
        finally:
            os.unlink(f"/dev/shm/{name}")

"""What every test needs before torch, Ray or Hugging Face are imported."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reads from the hub
os.environ.setdefault("RAY_AUTH_MODE", "token")  # as the command line does; Ray reads it once, when it is imported
os.environ.pop("RAY_ADDRESS", None)  # a cluster that happens to run here is not ours

import pytest
import torch
from differences import table

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch.set_num_threads(1)  # the models are so small that a second thread only costs


def pytest_addoption(parser):
    parser.addoption("--differences", action="store_true", help="print the largest difference of each invariance")


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--differences"):
        terminalreporter.section("largest difference of each invariance")
        for line in table():
            terminalreporter.write_line(line)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """`make test` shares the tests out over two processes, a group at a time; those of Ray wait more than they compute."""
    for item in items:
        group = "in process"
        if item.get_closest_marker("ray"):
            group = "supervised stages" if item.path.name in ("test_supervised.py", "test_dpo.py") else "ray"
        item.add_marker(pytest.mark.xdist_group(group))

"""What every test needs before torch, Ray or Hugging Face are imported."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reads from the hub
os.environ.setdefault("RAY_AUTH_MODE", "token")  # as the command line does; Ray reads it once, when it is imported
os.environ.pop("RAY_ADDRESS", None)  # a cluster that happens to run here is not ours

from importlib.util import find_spec

import pytest
import torch
from differences import table
from postgres import cluster  # noqa: F401 - a fixture
from voters import voters  # noqa: F401 - a fixture
from xdist.scheduler import LoadScopeScheduling

pytest_plugins = ["processors"] if find_spec("rlhf_ray.cpu") else []  # fixtures of tests that go with that package

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that a second thread only costs; and what one module changed is not the next one's."""
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--differences", action="store_true", help="print the largest difference of each invariance")


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--differences"):
        terminalreporter.section("largest difference of each invariance")
        for line in table():
            terminalreporter.write_line(line)


RAY = ("test_addresses.py", "test_bench_commands.py", "test_cluster.py", "test_demo.py", "test_forked_workers.py",
       "test_not_finite_ray.py",
       "test_ppo_ray.py", "test_ray_output.py", "test_ray_start.py", "test_recovery.py", "test_serving.py",
       "test_serving_faults.py",
       "test_supervised.py", "test_weight_transport.py")  # fmt: skip


def group_of(nodeid: str) -> str:
    file = nodeid.partition("::")[0].rpartition("/")[2]
    return "ray" if file in RAY else file


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: group_of(item.nodeid) != "ray")  # the longest group first


class Groups(LoadScopeScheduling):
    """`make test` has two processes, which take file after file, but for one that takes all with Ray: two Rays at once would slow
    each other down."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False
    return Groups(config, log)

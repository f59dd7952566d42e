"""What every test needs before torch, Ray or Hugging Face are imported."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reads from the hub
os.environ.setdefault("RAY_AUTH_MODE", "token")  # as the command line does; Ray reads it once, when it is imported
os.environ.pop("RAY_ADDRESS", None)  # a cluster that happens to run here is not ours

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch.set_num_threads(1)  # the models are so small that a second thread only costs


def pytest_collection_modifyitems(items):
    """`make test` shares the tests out over two processes: one for those that start Ray, which waits more than it computes."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.get_closest_marker("ray") else "in process"))

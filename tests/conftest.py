"""What every test needs before torch, Ray or Hugging Face are imported."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reads from the hub
os.environ.setdefault("RAY_AUTH_MODE", "token")  # as the command line does; Ray reads it once, when it is imported
os.environ.pop("RAY_ADDRESS", None)  # a cluster that happens to run here is not ours

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch.set_num_threads(1)  # the models are so small that a second thread only costs

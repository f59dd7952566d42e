"""A safetensors file that is hashed while it is written: nobody has to read it again to know its digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

#: the format's names (https://github.com/huggingface/safetensors, "Format")
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
          torch.int32: "I32", torch.uint8: "U8"}  # fmt: skip
PART_BYTES = 16 * 1024**2


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Write them, on the CPU and contiguous, and flush them to disk -> the file's SHA-256. OSError where there is no room."""
    # The format wants no gap between tensors; larger elements first keep all of them aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        for part in (len(text).to_bytes(8, "little"), text, *(_bytes_of(tensor) for _, tensor in ordered)):
            view = memoryview(part)
            for start in range(0, len(view), PART_BYTES):
                piece = view[start : start + PART_BYTES]
                digest.update(piece)
                while len(piece) > 0:
                    piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview | bytes:
    """Those of its memory, without a copy."""
    if tensor.numel() == 0:
        return b""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data

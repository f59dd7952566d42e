"""The functions in C: compiled on each machine once, by its own C compiler, and called with tensors.

Without a compiler, and on other systems than Linux, there are none, and torch's operations do their work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rlhf_ray.cpu.recording import Recording

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.c")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
# Not -ffast-math: it treats NaN as impossible, and linked with it a library flushes small numbers to zero for the whole process.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
WIDE = "-mprefer-vector-width=512"  # compilers choose half of it by themselves
COMPILE_TIMEOUT_S = 120

log = logging.getLogger(__name__)


class OfThread(threading.local):
    """recording: what calls of functions on this thread go into, if there is one (`cpu.recording`)."""

    recording: Recording | None = None


of_thread = OfThread()


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where they can't be compiled."""
    if sys.platform != "linux":
        return None
    try:
        path = compiled()
        return None if path is None else ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        words = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        log.warning("the C functions could not be compiled, so torch's operations do their work: %s", words)
        return None


def call(name: str, *arguments) -> None:
    """Call it with tensors (contiguous, on a CPU) as addresses, None as a null pointer, whole numbers as int64, others as float;
    last, the number of threads."""
    if of_thread.recording is not None:
        of_thread.recording.take(name, arguments)
        return
    function = getattr(library(), name)  # ctypes makes a library's functions as attributes, and keeps each
    if function.argtypes is None:  # with them ctypes converts, in a fraction of the time that it takes here
        function.argtypes = [*map(_c_type, arguments), ctypes.c_int]
    places = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
    function(*places, torch.get_num_threads())


def _c_type(argument):
    if argument is None or isinstance(argument, torch.Tensor):
        return ctypes.c_void_p
    return ctypes.c_float if isinstance(argument, float) else ctypes.c_int64


def compiled(more_flags: Sequence[str] = ()) -> Path | None:
    """The library for this machine and these sources, made if it is not there; None: there is no compiler.

    Raises OSError or subprocess.SubprocessError where it can't be made.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    wide = [WIDE] if platform.machine() in ("x86_64", "AMD64") else []
    flags = [*FLAGS, *wide, *os.environ.get("CFLAGS", "").split(), *more_flags]
    made_of = hashlib.sha256(repr((compiler, flags, platform.machine(), _cpu())).encode())
    for file in (*SOURCES, *HEADERS):
        made_of.update(file.read_bytes())
    path = _folder() / f"cpu-{made_of.hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")  # several processes may start at once
        command = [compiler, *flags, "-o", str(part), *map(str, SOURCES), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
        os.replace(part, path)
    return path


def _folder() -> Path:
    """For files that can be made again; of this user, since code is loaded from it."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.access(home if os.path.isdir(home) else os.path.dirname(home), os.W_OK):
        return Path(home) / "rlhf_ray"
    return Path(tempfile.mkdtemp(prefix="rlhf_ray_"))


def _cpu() -> str:
    """What -march=native looks at: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model", "Features", "CPU part"))}))

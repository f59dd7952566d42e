"""A process that has imported what workers import, and forks itself into each worker that Ray asks for (`forking.server_process`).

    python -P -m rlhf_ray.forking.fork_server LISTENER PATH [STAGE ...]

LISTENER: the number of a listening socket that it inherits, which is bound to PATH, in a folder of its own that ends with the
server. STAGE: whose workers it is for (`imports.LIBRARIES`). It imports all but Ray, which reads its variables (which job and whose
workers these are) when it is imported: for each set of them it forks a branch (`forking.fork_branch`), which imports Ray and forks
workers. A client (`forking.fork_client`) sends its worker's variables and surroundings as a line of JSON and gets a line: the
branch's path, or why there is none.

Server and branches end with their standard input, which whoever started them holds open. Nothing here may start a thread that
matters or touch a GPU: neither survives a fork.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import socket
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress

from rlhf_ray.forking import fork_branch
from rlhf_ray.forking.fork_client import surroundings
from rlhf_ray.forking.imports import REQUEST_S, import_libraries

#: prefixes of variables that libraries read when they are loaded
LOADED = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_", "LD_", "MALLOC_", "HF_", "PYTHON")
#: of those: one that `fork_branch` sees to, and ones that say what is printed
UNHEEDED = {"OMP_NUM_THREADS", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_VERBOSITY"}
UNREAD = ("RAY_TRAIN_", "RAY_WARN_")  # of Ray, that it reads only when it needs them
BRANCHES = 8  # at most


def main() -> None:
    listener, path, *stages = sys.argv[1:]
    started_with = dict(os.environ)  # before the libraries, some of which set variables (scikit-learn OpenMP's)
    import_libraries(stages)
    # Python 3.12 warns of threads at a fork. Those of numpy's products handle forks, and pyarrow's only frees memory.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    branch = serve(socket.socket(fileno=int(listener)), path, started_with)
    if branch is not None:
        fork_branch.main(*branch, stages)
        return
    shutil.rmtree(os.path.dirname(path), ignore_errors=True)
    sys.stderr.flush()
    os._exit(0)  # nothing that libraries do at an exit may hold it up


def serve(
    listener: socket.socket, path: str, started_with: Mapping[str, str]
) -> tuple[socket.socket, dict[str, str]] | None:
    """Serve until standard input ends, then return None. In each branch it returns the branch's listener and Ray's variables.

    started_with: this process's own variables, as they were then
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a branch ended
    branches: dict[str, str] = {}  # Ray's variables -> path
    with selectors.DefaultSelector() as selector:
        for source in (sys.stdin, listener):
            selector.register(source, selectors.EVENT_READ)
        while True:
            if any(key.fileobj is sys.stdin for key, _ in selector.select()):
                return None
            client, _ = listener.accept()
            # OSError: it is gone, or there is no room for another process; the others: it says something else
            with client, suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
                client.settimeout(REQUEST_S)
                asked = json.loads(client.makefile().readline())
                refusal = why_not(asked["variables"], asked["surroundings"], started_with)
                if refusal is None:
                    variables = of_ray(asked["variables"])
                    name = json.dumps(sorted(variables.items()))
                    if name not in branches and len(branches) == BRANCHES:
                        refusal = f"there are {BRANCHES} branches already"
                    elif name not in branches:
                        own, place = _bound(f"{path}.{len(branches)}")
                        if os.fork() == 0:
                            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                            listener.close()
                            return own, variables
                        own.close()
                        branches[name] = place
                client.sendall((branches[name] if refusal is None else refusal).encode() + b"\n")


def of_ray(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith("RAY_") and not name.startswith(UNREAD)}


def why_not(variables: Mapping[str, str], around: list[str], started_with: Mapping[str, str]) -> str | None:
    """Why a process with these variables and surroundings can't be a fork of this one, which was started with others."""
    if around != surroundings():
        return "it is in another container or control group"
    mine, its = ({name: value.lower() for name, value in each.items() if value and name.startswith(LOADED)}
                 for each in (started_with, variables))  # fmt: skip
    differing = sorted({name for name, _ in mine.items() ^ its.items()} - UNHEEDED)
    return f"it has other values of {', '.join(differing)}" if differing else None


def _bound(path: str) -> tuple[socket.socket, str]:
    with suppress(FileNotFoundError):  # of a branch that could not be forked
        os.unlink(path)
    own = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)  # its owner's from the first moment on
    try:
        own.bind(path)
    finally:
        os.umask(before)
    own.listen(socket.SOMAXCONN)
    return own, path


if __name__ == "__main__":
    main()

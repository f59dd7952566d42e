"""The Ray cluster of a server: on this machine, for it alone, its ports on loopback."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf_ray.actors.worker_start import fork_server
from rlhf_ray.errors import UserError

RAY_LOG = "of_the_server.log"  # in the folder of Ray's logs: what Ray says in the server's own process
OBJECT_STORE_BYTES = 100 << 20  # no tensors pass through it; Ray's default is 30 % of the memory

# Settings of Serve that would start HTTP servers of its own or open further ports on every interface.
_FOREIGN_SETTINGS = (
    "RAY_SERVE_ENABLE_HA_PROXY",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
)

# Read by Ray when it is imported: its processes then talk by 127.0.0.1, and their ports listen there (all but one, which Serve's
# replicas have on every interface, behind the token). Nobody reads the metrics.
_LOOPBACK_SETTINGS = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_enable_metrics_collection": "0"}

# Ray makes its workers give way to all other processes (nice 15); a server's replicas are its work.
_NICENESS = {"RAY_worker_niceness": "0"}


def check_ray() -> None:
    """Import Ray with the settings that it reads then. UserError if this process uses a cluster already."""
    for variable in _FOREIGN_SETTINGS:
        os.environ.pop(variable, None)
    os.environ |= _LOOPBACK_SETTINGS | _NICENESS
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():
        raise UserError("this process is connected to a Ray cluster already; run the server in a process of its own")


def start_ray(cpus: int, stack: contextlib.ExitStack, environment: Mapping[str, str]) -> str:
    """After `check_ray`. It ends with the stack. -> the folder of its logs. RunFailed where it does not start.

    Ray's own lines in this process go to a file there and not to the terminal (`actors.ray_output`).
    """
    import ray

    from rlhf_ray.actors.ray_output import ray_output_in
    from rlhf_ray.actors.ray_start import prepare_home, start_own_ray

    prepare_home()  # before the fork server, which inherits the environment
    places: list[Path] = []  # where the log is to stand
    log = stack.enter_context(_log_to_be(places))
    stack.enter_context(ray_output_in(log))
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    python = stack.enter_context(fork_server(("serving",), environment))
    shut_down = start_own_ray({
        "address": "local",
        "_node_ip_address": "127.0.0.1",
        "runtime_env": None if python is None else {"py_executable": python, "env_vars": dict(environment)},
        "num_cpus": cpus,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "object_store_memory": OBJECT_STORE_BYTES,
    })  # fmt: skip
    stack.callback(shut_down)
    from ray import serve  # noqa: F401 - its import sets the level of its log

    serve_logger = logging.getLogger("ray.serve")
    serve_logger.setLevel(logging.ERROR)
    serve_logger.handlers[:], serve_logger.propagate = [], True  # to the file, as all of Ray's
    # RayletSocketName: SESSION/sockets/raylet
    logs = Path(ray.nodes()[0]["RayletSocketName"]).parent.parent / "logs"
    places.append(logs / RAY_LOG)
    with contextlib.suppress(OSError):  # another file system, on which it stands at the end
        os.link(log, places[0])
    return str(logs)


@contextlib.contextmanager
def _log_to_be(places: list[Path]) -> Iterator[Path]:
    """A file for what Ray says before it has a folder of logs. places: where it is to stand in the end, once that is known."""
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_serve_", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / RAY_LOG
        yield log
        for place in places:
            if not place.exists():
                with contextlib.suppress(OSError):
                    shutil.copyfile(log, place)

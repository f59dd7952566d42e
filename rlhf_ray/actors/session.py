"""The Ray session of a run: its own local one, or the cluster that the user names. Never a stray one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from ray.exceptions import AuthenticationError

from rlhf_ray.actors import faults
from rlhf_ray.actors.ray_folder import session_cleared
from rlhf_ray.actors.ray_output import ray_output_in
from rlhf_ray.actors.ray_private import on_loopback
from rlhf_ray.actors.ray_start import START_S, prepare_home, refuse_second_ray, start_own_ray, start_ray
from rlhf_ray.actors.worker_start import fork_server
from rlhf_ray.config.threads import ALONE_ENVIRONMENT
from rlhf_ray.errors import RunFailed, UserError

# Read by libgomp and Ray when a worker starts, so here and not in the worker's code. Two torch processes with two
# spinning threads each run five times slower on two cores than with sleeping ones.
WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL's trainers report their use to the hub otherwise
    # A worker's working directory is Ray's; nothing may depend on it.
    "RAY_TRAIN_V2_ENABLED": "1",
}
# No secrets: Ray writes a worker's variables into its command line. A local Ray's workers inherit HF_TOKEN; a cluster's nodes
# have their own.
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", faults.VARIABLE)
OF_THE_NODE = ("NCCL_SOCKET_IFNAME",)  # the cluster's scripts set it on each; all other NCCL_* are passed on
OBJECT_STORE_BYTES = 512 * 1024**2
ANSWER_S = 10  # in which a cluster's port must take a connection


def worker_environment(*, spins: bool = False) -> dict[str, str]:
    """spins: generators' threads spin-wait (`ALONE_ENVIRONMENT`), and with them those of all forks, which share a libgomp."""
    passed_on = {
        name: value for name, value in os.environ.items()
        if name in PASSED_ON or (name.startswith("NCCL_") and name not in OF_THE_NODE)
    }  # fmt: skip
    return WORKER_ENVIRONMENT | passed_on | (ALONE_ENVIRONMENT if spins else {})


@contextmanager
def ray_session(
    address: str | None,
    *,
    object_store_bytes: int = OBJECT_STORE_BYTES,
    stages: Sequence[str] = ("ppo",),
    spins: bool = True,
    start_timeout_s: float = START_S,
    log: Path | None = None,
) -> Iterator[None]:
    """Ray for the body of the `with`. address None: a local Ray that ends with it, with an object store of this size.

    Raises UserError where this process has a Ray already, or for an address where none answers; RunFailed where one does not start.
    stages: a local Ray forks the workers of these (`actors.worker_start`). spins: the threads of all forks spin-wait
    (`worker_environment`), each role's on its own share of the cores. log: where Ray's own lines go; None: to the terminal.
    """
    refuse_second_ray()
    prepare_home(makes_token=address is None)  # before the fork server, which inherits the environment
    # On this machine alone: gloo would listen on the interface that the host's name leads to.
    interface = {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")} if address is None else {}
    environment = worker_environment() | interface
    options: dict = {"runtime_env": {"env_vars": environment}, "log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # RAY_ADDRESS would turn address="local" into a connection to somebody's cluster on some versions.
        os.environ.pop("RAY_ADDRESS", None)
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": object_store_bytes,
            "num_cpus": int(os.environ.get("RLHF_RAY_NUM_CPUS", len(os.sched_getaffinity(0)))),
        }
    else:
        _check_answers(address)
        options["address"] = address
        # Environment variables that a submitted job has of its own are merged with ours, not refused.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    # Ray would print the traceback of every call that fails because of another; Waiter reports the first in a sentence.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    forked = worker_environment(spins=spins) | interface
    where = on_loopback() if address is None else nullcontext()
    with ray_output_in(log), where, fork_server(stages if address is None else (), forked) as python:
        if python is not None:
            options["runtime_env"] = {"env_vars": forked, "py_executable": python}
        start = start_own_ray if address is None else partial(_connect, address)
        shut_down = start(options, start_timeout_s, " (resources.start_timeout_s)")
        with ExitStack() as ends:
            if address is None:
                ends.enter_context(session_cleared(shut_down))
            else:
                ends.callback(shut_down)
            yield


def _connect(address: str, options: dict, deadline_s: float, remedy: str) -> Callable[[], None]:
    try:
        return start_ray(options, deadline_s, remedy)
    except AuthenticationError as error:
        raise UserError(
            f"the cluster at {address!r} wants a token that this machine lacks; copy the head's (`ray get-auth-token` there) into "
            "~/.ray/auth_token, mode 600, or set RAY_AUTH_TOKEN"
        ) from error
    except UserError:
        raise
    except (ConnectionError, ValueError, RuntimeError) as error:
        if isinstance(error, RunFailed):
            raise
        raise _no_cluster(address, error) from error


def _check_answers(address: str) -> None:
    """UserError where host:port takes no connection: Ray would try again for more than ten minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():  # e.g. "auto", which Ray looks up at once
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UserError:
    return UserError(
        f"no Ray cluster answers at {address!r} ({error}); start one (cluster/README.md) or leave out --address"
    )

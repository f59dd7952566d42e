"""All that the package uses of Ray beyond its public interface, in one place. What forks use is in `forking.ray_internals`: it goes
where they go. tests/test_ray_private.py fails where Ray changes any of it.

Each function imports what it needs when it is called: Ray Train takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: `actors.ray_trainer` overrides this method of Ray Train's trainers
DEFAULT_CALLBACKS = "_create_default_callbacks"
#: the name of the error of a worker group that finds no room in time, which Ray Train wraps in others
NO_ROOM = "WorkerGroupStartupTimeoutError"


@contextmanager
def reports_given_to(record: Callable[..., None]) -> Iterator[None]:
    """The thread that prints what the cluster reports of itself (`listen_error_messages`) calls this function with each message."""
    import ray._private.worker as worker

    printed = worker.print_to_stdstream
    worker.print_to_stdstream = record
    try:
        yield
    finally:
        worker.print_to_stdstream = printed


@contextmanager
def node_looked_up_by(wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """ray.init looks for its first process by what `wrapped` makes of Ray's own function."""
    from ray._private import services

    look = services.get_node
    services.get_node = wrapped(look)
    try:
        yield
    finally:
        services.get_node = look


def store_stats(node: dict[str, Any]) -> Any:
    """Of the object store of a node of `ray.nodes()`; Ray has no public call for it."""
    from ray._private.internal_api import node_stats

    return node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False).store_stats


def unused_callbacks() -> tuple[type, type]:
    """The callbacks of Ray Train that `actors.ray_trainer` leaves out: of Ray Data sets, of placement groups left behind."""
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    return DatasetsCallback, PlacementGroupCleanerCallback

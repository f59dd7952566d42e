"""How workers of a Ray on this machine start: as Ray starts them. `forking`, which the last line imports, makes forks of them.

Nothing here imports Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def forks_here(stages: Sequence[str]) -> bool:
    """Whether workers of these stages are to be forked on this machine."""
    return False


@contextmanager
def fork_server(stages: Sequence[str], environment: Mapping[str, str]) -> Iterator[str | None]:
    """For the body of the `with` -> the program that a Ray started in it runs in place of Python, if any.

    stages: those whose workers there will be. environment: variables that the workers get.
    """
    yield None


@contextmanager
def forked_actors(environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The runtime environment of PPO's actors on the running Ray, for the body of the `with`."""
    yield {}


from rlhf_ray.forking.fork_door import fork_server, forked_actors, forks_here  # noqa: E402, F401, F811 - without it all above holds

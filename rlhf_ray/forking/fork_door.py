"""All that the rest of the package uses of `forking`; `actors.worker_start` alone imports it."""

from rlhf_ray.forking.forked_actors import forked_actors
from rlhf_ray.forking.server_process import fork_server, forks_here

__all__ = ["fork_server", "forked_actors", "forks_here"]

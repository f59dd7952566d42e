"""`rlhf-ray submit --retries N`: a run whose driver or head dies is submitted again, and goes on from its last checkpoint.

Actors that die are made again inside the run (`actors.recovery`). This is for what the run can't survive: its own process, or the
node that it is on. It needs a terminal that stays; on Kubernetes a RayJob's `backoffLimit` does the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_ray.actors import jobs
from rlhf_ray.actors.dashboard import connect
from rlhf_ray.config import Recipe
from rlhf_ray.errors import UserError

HEAD_S = 600.0  # for a head that died to be there again
LOOK_S = 5.0
#: exit statuses after which another try changes nothing: done; a mistake in the recipe or data; stopped by somebody
FINAL = (0, 2, jobs.STOPPED_EXIT_STATUS)


def submit_until_done(
    recipe: Recipe,
    run_dir: str,
    *,
    retries: int,
    address: str | None = None,
    data: Sequence[str | Path] = (),
    env: Mapping[str, str] | None = None,
    stop_wait_s: int = 600,
    echo: jobs.Echo = print,
) -> int:
    """Submit, follow, and submit again where the run died, at most `retries` times -> the exit status of the last one.

    UserError for what can't work, and where the cluster is not there again in ten minutes.
    """
    for again in range(retries + 1):
        if again > 0:
            _wait_for_head(address, echo)
        job_id = jobs.submit(recipe, run_dir, address=address, data=data, env=env, stop_wait_s=stop_wait_s, echo=echo)
        try:
            status, why = jobs.logs(job_id, address=address, echo=echo), ""
        except UserError as error:  # the head is gone, or does not know the job any more
            if again == retries:
                raise
            status, why = 1, f" ({error})"
        if status in FINAL or again == retries:
            return status
        left = retries - again
        echo(
            f"job {job_id} died, exit status {status}{why}; it is submitted again and goes on from its last checkpoint; "
            f"{left} of {retries} retries left"
        )
    raise AssertionError("the last try returns or raises")


def _wait_for_head(address: str | None, echo: jobs.Echo) -> None:
    began, told = time.monotonic(), False
    while True:
        try:
            connect(address)
            return
        except UserError as error:
            if time.monotonic() - began > HEAD_S:
                raise
            if not told:
                echo(f"waiting up to {HEAD_S:.0f} s for the cluster: {error}")
                told = True
        time.sleep(LOOK_S)

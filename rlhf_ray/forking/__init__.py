"""Worker processes of a Ray on this machine as forks of one that has imported everything.
`fork_door` is all that others use of it. Without this package, and without the line in `actors.worker_start` that imports it,
workers start as Ray starts them.

May import: nothing of the package.
Heavy packages: ray.
"""

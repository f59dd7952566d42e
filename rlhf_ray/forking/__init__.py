"""Worker processes of a Ray on this machine as forks of one that has imported everything.

May import: runs.
Heavy packages: ray.
"""

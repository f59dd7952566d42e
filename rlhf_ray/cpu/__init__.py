"""Decode steps on CPUs, faster than torch's: functions in C, linear layers packed once, the step's calls recorded.
`cpu_door` is all that others use of it. Without this package, and without the line in `generation.acceleration` that imports it,
torch's operations do the work. Its tests, tests/test_cpu_*.py and tests/processors.py, go with it.

May import: models.
Heavy packages: transformers.
"""

"""`python -m rlhf_ray`: the command line."""

from __future__ import annotations

from rlhf_ray.cli.main import main

main()

"""Memory of a process and all that it started, each shared page counted once. Imports nothing of rlhf_ray: TRL's script too."""

from __future__ import annotations

import os
from pathlib import Path


def tree_pss(root: int) -> float | None:
    """Proportional set size in bytes; None where the system does not tell (Linux does)."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The command's name, in brackets, may hold spaces.
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # ended meanwhile
            continue
    if root not in parents:
        return None
    tree = {root}
    while more := {process for process, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return float(sum(map(_pss, tree)))


def _pss(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    print(tree_pss(os.getpid()))

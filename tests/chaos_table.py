"""The table of results/chaos/."""

from pathlib import Path


def write_table(folder: Path, rows: list[dict]) -> None:
    raise NotImplementedError

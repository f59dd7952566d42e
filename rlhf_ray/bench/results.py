"""What all benchmarks print: a table, sentences, or one JSON object; and where they were measured."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table

from rlhf_ray.runs.pipeline import environment

console = Console()


def hardware() -> dict:
    kept = ("cpu", "cpus", "memory_gb", "gpus", "versions")
    return {key: value for key, value in environment().items() if key in kept}


def on_hardware(result: dict) -> str:
    """ "2 cores of AMD EPYC, 25.3 GB"."""
    found = result["hardware"]
    gpus = "".join(f", {name}" for name in found["gpus"])
    return f"{found['cpus']} cores of {found['cpu']}, {found['memory_gb']} GB{gpus}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of repeats."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(values: Sequence[float], yardstick: Sequence[float]) -> dict[str, float]:
    """Of repeats measured in turn, pair by pair: what else the machine did meanwhile touched both."""
    return spread([value / other for value, other in zip(values, yardstick, strict=True)])


def in_brackets(found: dict[str, float], digits: int = 2) -> str:
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def take_stdout() -> TextIO:
    """What stdout was; from here to the end of the process, whatever else is printed there goes to stderr. vLLM and the processes
    it starts print as they like, and --json promises one object."""
    sys.stdout.flush()
    taken = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return taken


def show(
    result: dict,
    lines: Iterable[str],
    *,
    as_json: bool,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    out: TextIO | None = None,
) -> None:
    """The first column is text, the others are numbers. out: where the JSON goes; None: stdout."""
    if as_json:
        print(json.dumps(result), file=out, flush=True)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")  # words wrap, none is cut
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)

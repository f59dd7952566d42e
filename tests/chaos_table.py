"""The table of results/chaos/: what died where, whether the run ended in the undisturbed run's bits, and the seconds it cost."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from rlhf_ray.bench.results import hardware, on_hardware
from rlhf_ray.config import Recipe

INTRODUCTION = """# chaos: any process, any moment

This folder holds what `make chaos` measured: a tiny PPO run whose processes die, stop or fail at named points. Back to the
[results](../README.md). How recovery works: [rlhf_ray/actors/recovery.py](../../rlhf_ray/actors/recovery.py).

"Exact": the final model, and policy and critic with their optimisers, have the SHA-256 of the undisturbed run's; metrics and
closing figures are the same; each prompt was trained on once per epoch. "Seconds lost": from the moment when a loss was seen to the
moment when all that was lost was under way again; for a rank of policy or critic, from the state that it went back to.

```bash
make chaos                                    # all cells
make chaos ARGS="--only 'all x update' LoRA"  # some of them
make chaos ARGS="--only 'policy x update'"    # one role (or: driver, worker host, link away, link down) in one phase, by itself
make chaos ARGS="--log cells.jsonl"           # notes each cell when it is done; the same command again runs the others
```

How the faults are made, all at named points of the run ([rlhf_ray/actors/faults.py](../../rlhf_ray/actors/faults.py)), none by
a clock: a process is killed or stopped by a signal, or raises, or sleeps. A worker host is a node of Ray on this machine, all of
whose processes are killed. A link is a real one, between network namespaces on a bridge, one host of Ray in each; its interface
goes down, for seconds or for good (as root on Linux; elsewhere these rows are left out). S3 is moto's server on this machine behind
a proxy: it "dies" in the middle of an upload, when all connections end and the next ones are refused, with what it has stored still
there afterwards; or it goes on slowly, or answers errors. What is compared then is what S3 holds in the end, fetched again.
"""
SOAK = "\n[soak](soak.md): a longer such run in which a process is killed every 20 to 60 s, and whether anything grows.\n"


PHASE, MIDDLE = "all x ", "middle of "


def write_table(folder: Path, rows: list[dict], names: list[str], note: str = "") -> None:
    """rows: of `chaos.Matrix`. names: of all cells, whether they were run or not. note: of the circumstances."""
    matrix = [row for row in rows if row["name"].startswith((PHASE, MIDDLE))]
    others = [row for row in rows if row not in matrix]
    machine = on_hardware({"hardware": hardware()})
    introduction = INTRODUCTION + (SOAK if (folder / "soak.md").exists() else "")
    lines = [introduction, f"Measured on {machine}. Every draw is of the recipe's seed, {Recipe.model_fields['seed'].default}.\n"]
    lines += [f"{note}\n"] if note else []
    if matrix:
        lines += ["## Role by phase\n", *_matrix(matrix), ""]
    if others:
        lines += ["## Other faults and set-ups\n", *_others(others), ""]
    lines += ["## Seconds lost, by role\n", *_by_role(rows)]
    left = [name for name in names if name not in {row["name"] for row in rows}]
    if left:
        lines += ["", "## Not run here\n", f"{', '.join(left)}."]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    (folder / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _matrix(rows: list[dict]) -> list[str]:
    """One row per phase, one column per role: losses seen of faults, and their seconds."""
    roles = list(dict.fromkeys(fault["victim"].partition("-")[0] for row in rows for fault in row["wanted"]))
    lines = [
        "Two runs per phase. In one, of 14 steps, every role dies twice, each time in another step, before or after the work of\n"
        "a call. In the other, of 8 steps, every role dies once, in the middle of a call: a chunk is drawn in part or scored and\n"
        "not yet handed in, one optimiser step of four is taken, some of the weights are packed, loaded or copied. A role that\n"
        "has work of its own in the phase dies in that. A cell: losses that were seen of those that there were, and the seconds\n"
        "that each cost. One that is not seen is of an actor that nobody asked anything any more.\n",
        f"| phase | point | exact | {' | '.join(roles)} |", f"|---|---|---|{'---|' * len(roles)}",
    ]  # fmt: skip
    phases = list(dict.fromkeys(row["name"].removeprefix(PHASE).removeprefix(MIDDLE) for row in rows))
    for row in sorted(rows, key=lambda row: phases.index(row["name"].removeprefix(PHASE).removeprefix(MIDDLE))):
        cells = []
        for role in roles:
            lost = [seconds for seconds, of in zip(row["lost_s"], row["roles"], strict=True) if of == role]
            wanted = sum(fault["victim"].startswith(role) for fault in row["wanted"])
            told = ", ".join(f"{seconds:.0f}" for seconds in lost)
            cells.append(f"{len(lost)} of {wanted}" + (f": {told} s" if lost else ""))
        point = "before, after" if row["name"].startswith(PHASE) else "in the middle"
        phase = row["name"].removeprefix(PHASE).removeprefix(MIDDLE)
        lines.append(f"| {phase} | {point} | {_verdict(row)} | {' | '.join(cells)} |")
    return lines


def _others(rows: list[dict]) -> list[str]:
    lines = [
        "| run | faults | came | exact | each prompt once | seconds lost | steps trained again |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        losses = zip(row["lost_s"], row["roles"], strict=True)  # a storage that was away has none, and cost the run nothing
        lost = ", ".join(f"{seconds:.0f}" for seconds, role in losses if seconds is not None and role is not None) or "0"
        if row["restarts"]:
            lost = f"{row['seconds'] - row['undisturbed_s']:.0f} with {row['restarts']} restart{'s' * (row['restarts'] > 1)}"
        again = sum(steps or 0 for steps in row["steps_lost"])
        faults = ", ".join(map(_in_words, row["wanted"]))
        came = f"{len(row.get('met', [])) or row['happened']} of {row['faults']}" if "happened" in row else "not counted"
        once = "yes" if row["each_once"] else "no"
        lines.append(f"| {row['name']} | {faults} | {came} | {_verdict(row)} | {once} | {lost} | {again} |")
    return lines


def _in_words(fault: dict) -> str:
    at = f"{fault['role']}.{fault['method']}"
    if fault["kind"] == "sign":  # of the storage
        return f"{fault['do']} {fault['of'] + ' ' if fault.get('of') else ''}at {at}"
    if fault["kind"] == "link":
        return f"link down {'for ' + str(fault['seconds']) + ' s ' if 'seconds' in fault else ''}at {at}"
    return f"{fault['kind']} at {at}"


def _by_role(rows: list[dict]) -> list[str]:
    seconds: dict[str, list[float]] = {}
    for row in rows:
        for role, lost in zip(row["roles"], row["lost_s"], strict=True):
            if role is not None and lost is not None:
                seconds.setdefault(role, []).append(lost)
    lines = ["| role | losses | median | worst |", "|---|---|---|---|"]
    return lines + [
        f"| {role} | {len(each)} | {statistics.median(each):.1f} s | {max(each):.1f} s |" for role, each in seconds.items()
    ]


def _verdict(row: dict) -> str:
    if row["error"] is not None:
        return f"**no: {row['error'].partition(': ')[0]}**"
    if row["exact"]:
        return "yes"
    return "not asked for" if row["passed"] else f"**no: {', '.join(row['differs'])}**"

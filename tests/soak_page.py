"""results/chaos/soak.md: what a run used over an hour of kills."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from slopes import Slope, slope

from rlhf_ray.bench.results import hardware, on_hardware

SETTLED_S = 300.0  # from when on slopes are of interest: modules are imported, pools filled, every role has died
LAG_S = 120.0  # residuals so far apart are taken for independent: two kills
MIB = 2**20
#: name in the samples -> what it is, the divisor of the unit, the unit
QUANTITIES = {
    "pss": ("memory, shared pages counted once (PSS)", MIB, "MiB"),
    "rss": ("memory as `top` adds it up (RSS)", MIB, "MiB"),
    "shared": ("of it shared memory (/dev/shm: the object store)", MIB, "MiB"),
    "store": ("bytes in the object store", MIB, "MiB"),
    "processes": ("processes", 1, ""),
    "threads": ("threads", 1, ""),
    "descriptors": ("file descriptors", 1, ""),
    "other_files": ("files and folders in the temporary folder, without Ray's session", 1, ""),
    "ray_files": ("files and folders of Ray's session (a log per process that ever was)", 1, ""),
    "ray_file_bytes": ("their bytes", MIB, "MiB"),
}


ENDS = {"after_end": "when the run was stopped", "after_sigkill": "after SIGKILL of a driver"}


def slopes(samples: list[dict]) -> dict[str, Slope]:
    """Per quantity, and "pss_of KIND", "descriptors_of KIND" of each kind of process."""
    settled = [sample for sample in samples if sample["seconds"] >= SETTLED_S]
    hours = np.array([sample["seconds"] / 3600 for sample in settled])
    lag = round(LAG_S / (3600 * float(np.median(np.diff(hours)))))
    parts = {"pss_of": MIB, "descriptors_of": 1}  # those of each kind of process
    kinds = sorted({(part, kind) for sample in settled for part in parts for kind in sample.get(part, {})}, reverse=True)
    found = {name: slope(hours, np.array([sample[name] / unit for sample in settled]), lag=lag)
             for name, (_, unit, _) in QUANTITIES.items()}  # fmt: skip
    return found | {
        f"{part} {kind}": slope(hours, np.array([sample[part].get(kind, 0) / parts[part] for sample in settled]), lag=lag)
        for part, kind in kinds
    }


def write_page(folder: Path, found: dict, samples: list[dict], note: str = "") -> None:
    kills, rates = found["kills"], slopes(samples)
    hours = (samples[-1]["seconds"] - samples[0]["seconds"]) / 3600
    by_role = Counter(kill["role"] for kill in kills)
    stopped = sum(kill["kind"] == "stop" for kill in kills)
    lines = [
        "# soak: PPO while its processes are killed, one after the other\n",
        "What `make soak` measured, the second half of [chaos](README.md). A tiny PPO run; every 20 to 60 s a random process of a",
        "random role is killed, or stopped (one time in eight), but none before the run has finished a step since the last one.\n",
        "```bash", f"make soak ARGS=\"--minutes {found['minutes']:g} --seed {found['seed']}\"", "```\n",
        f"Measured on {on_hardware({'hardware': hardware()})}; load averages {found['load'][0]:.1f} at the start and"
        f" {found['load'][1]:.1f} at the end.\n", *([f"{note}\n"] if note else []),
        f"- {found['minutes']:g} minutes, {found['steps']} steps, {len(kills)} processes killed ({stopped} of them stopped):"
        f" {', '.join(f'{role} {count}' for role, count in by_role.most_common())}.",
        f"- {len(found['lost_s'])} losses told in events.jsonl; a recovery took {np.median(found['lost_s']):.0f} s (median), at"
        f" most {max(found['lost_s']):.0f} s; {found['again']} finished steps were trained again.",
        f"- Weights and optimisers at the end equal to those of as many undisturbed steps in one process (SHA-256):"
        f" {_yes(found['exact'])}.",
        f"- Each prompt trained on once per epoch: {_yes(found['each_once'])}.",
        *(f"- Left behind {when}: {_left(found[name])}." for name, when in ENDS.items() if name in found), "",
        "Slopes are of least squares over the samples from the fifth minute on, one every ten seconds, with the 95 % interval of",
        f"Newey and West ({LAG_S:.0f} s of autocorrelation). A kill takes memory away for some seconds, so values scatter.",
        "Ray keeps a log of each process that ever was, and its log monitor holds them open until there are 200: two files per",
        "process that was killed.\n",
        "| | mean | per hour | 95 % | per kill |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, rate in rates.items():
        part, _, kind = name.partition(" ")
        words, unit = ("PSS", "MiB") if part == "pss_of" else ("file descriptors", "")
        words, _, unit = QUANTITIES.get(name, (f"{words} of {kind}", None, unit))
        per_kill = rate.per_hour * hours / max(len(kills), 1)
        lines.append(
            f"| {words} | {rate.mean:.1f} {unit} | {rate.per_hour:+.2f} | {rate.low:+.2f} to {rate.high:+.2f} | {per_kill:+.3f} |"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "soak.md").write_text("\n".join(lines) + "\n")
    kept = [{name: value for name, value in sample.items() if not name.endswith("_of")} for sample in samples]
    (folder / "soak.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"found": found}, *kept]))


def _yes(value: bool | None) -> str:
    """None: nobody has looked."""
    return "**not compared**" if value is None else "yes" if value else "**no**"


def _left(found: dict) -> str:
    parts = [f"{found['processes']} processes", f"{len(found['shared memory'])} files in /dev/shm"]
    parts.append(f"{len(found['temporary files'])} temporary files, {found['of Ray']} of Ray's session")
    return ", ".join(parts) + (f" ({found['seconds']:.0f} s later)" if "seconds" in found else "")

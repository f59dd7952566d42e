"""What the curves of results/curves say in figures:   python results/curves/table.py

Reads results/curves/sentiment/seed_*/ppo_metrics.jsonl, which results/curves/run.sh copies there. Mean over the seeds (lowest to
highest). A smoothed series is the mean over five steps, since a batch of 128 scatters.
"""

import statistics
from pathlib import Path

from rlhf_ray.runs.metrics import read_metrics

LAST = 40  # steps of the end: 5,120 episodes
HERE = Path(__file__).parent


def series(run: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(run / "ppo_metrics.jsonl") if name in row]


def smoothed(values: list[float], width: int = 5) -> list[float]:
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def end(values: list[float]) -> float:
    return statistics.mean(values[-LAST:])


FIGURES = {
    "score, first step": ("objective/score", lambda v: v[0]),
    "score, smoothed, step 40": ("objective/score", lambda v: smoothed(v)[39]),
    "score, last 40 steps": ("objective/score", end),
    "KL a sequence, highest, smoothed": ("objective/kl", lambda v: max(smoothed(v))),
    "step of the highest KL": ("objective/kl", lambda v: v.index(max(v)) + 1.0),
    "KL a sequence, last 40 steps": ("objective/kl", end),
    "kl_coef, first step": ("objective/kl_coef", lambda v: v[0]),
    "kl_coef, lowest": ("objective/kl_coef", min),
    "kl_coef, highest after that": ("objective/kl_coef", lambda v: max(v[v.index(min(v)) :])),
    "kl_coef, last 40 steps": ("objective/kl_coef", end),
    "approx_kl, highest": ("policy/approx_kl", max),
    "step of the highest approx_kl": ("policy/approx_kl", lambda v: v.index(max(v)) + 1.0),
    "approx_kl, last 40 steps": ("policy/approx_kl", end),
    "clip fraction, highest": ("policy/clip_frac", max),
    "clip fraction, last 40 steps": ("policy/clip_frac", end),
    "value loss, first step": ("value/loss", lambda v: v[0]),
    "value loss, last 40 steps": ("value/loss", end),
    "entropy a token, first step": ("policy/entropy", lambda v: v[0]),
    "entropy a token, last 40 steps": ("policy/entropy", end),
    "returns, last 40 steps": ("value/returns", end),
}


def main() -> None:
    runs = sorted((HERE / "sentiment").glob("seed_*"))
    print(f"{len(runs)} seeds, {len(series(runs[0], 'objective/kl'))} steps each")
    for title, (name, of) in FIGURES.items():
        values = [of(series(run, name)) for run in runs]
        print(f"{title:36s} {statistics.mean(values):9.3g}   ({min(values):.3g} to {max(values):.3g})")


if __name__ == "__main__":
    main()

"""Finished runs side by side: `python -m rlhf_ray.report.compare OUT LABEL=RUN_DIR [LABEL=RUN_DIR ...]`.

Runs of one label differ in their seed. OUT gets README.md (a table of the evaluations, mean and range over a label's runs),
curves.png (mean over its runs, band from the lowest to the highest) and, for each run, its recipe, summary and PPO metrics.
Needs the extra 'bench' (matplotlib).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.config.user_paths import expanded
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.outcome import SUMMARY, read_summary
from rlhf_ray.report.collect import path_shortener
from rlhf_ray.report.models import other_tuned, over_sft, title
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder, environment_of
from rlhf_ray.runs.storage import write_atomically

Groups = dict[str, list[RunFolder]]
CURVES = (
    "objective/score", "objective/kl", "objective/kl_coef", "objective/rlhf_reward", "policy/entropy", "value/loss",
    "policy/approx_kl", "policy/clip_frac", "value/returns",
)  # fmt: skip
#: column -> what stands there, of (summary, figures of the tuned model, how that compares with SFT)
COLUMNS: dict[str, Callable[[Mapping, Mapping, Mapping], float | None]] = {
    "win rate, judge": lambda summary, model, over: _mean(over["win_rate"]["judge"]),
    "win rate, reward": lambda summary, model, over: _mean(over["win_rate"]["reward_model"]),
    "judge": lambda summary, model, over: _mean(model.get("judge")),
    "judge, SFT": lambda summary, model, over: _mean(summary["sft"].get("judge")),
    "score": lambda summary, model, over: _mean(model.get("score")),
    "KL": lambda summary, model, over: over["kl"],
    "distinct-2 / SFT's": lambda summary, model, over: _mean(over["ratio"].get("distinct_2")),
    "tokens": lambda summary, model, over: _mean(model.get("length")),
}


def compare(
    out: Path, groups: Groups, curves: Sequence[str] = CURVES, against: str = "episodes", root: bool = False
) -> Path:
    """Write OUT and return its README.md. Raises UserError for a run without PPO metrics."""
    out.mkdir(parents=True, exist_ok=True)
    for label, runs in groups.items():
        for run in runs:
            _record(run, out / label / f"seed_{seed_of(run)}")
    plot(out / "curves.png", groups, curves, against, root)
    write_atomically(out / "README.md", "\n".join(_readme(out, groups)) + "\n")
    return out / "README.md"


def seed_of(run: RunFolder) -> int:
    return load_recipe(str(run.recipe)).ppo_seed


def plot(path: Path, groups: Groups, curves: Sequence[str], against: str, root: bool = False) -> None:
    """One panel per metric that the runs have; `root`: over the square root of `against` (Gao et al., 2210.10760, of the KL)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {label: [read_metrics(run.stage("ppo").metrics) for run in runs] for label, runs in groups.items()}
    found = [name for name in curves if any(name in row for runs in rows.values() for run in runs for row in run)]
    if not found:
        raise UserError(f"none of these runs has a metric of {', '.join(curves)} in ppo/metrics.jsonl")
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.1 * lines), squeeze=False)
    for axis, name in zip(axes.flat, found, strict=False):
        for number, runs in enumerate(rows.values()):
            xs, low, mean, high = band(runs, against, name)
            if len(xs):
                axis.plot(xs, mean, linewidth=1.4, color=f"C{number}")
                axis.fill_between(xs, low, high, alpha=0.2, color=f"C{number}", linewidth=0)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f"{against}, axis by its square root" if root else against, fontsize=8)
        if root:
            axis.set_xscale("function", functions=(_signed_root, _signed_square))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(found) :]:
        axis.axis("off")
    figure.tight_layout()
    if len(groups) > 1:  # one for all panels, above them
        lines = [plt.Line2D([], [], color=f"C{number}") for number in range(len(groups))]
        figure.legend(
            lines, list(groups), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=min(len(groups), 4), fontsize=9
        )
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _signed_root(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.sqrt(np.abs(values))


def _signed_square(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.square(values)


def band(runs: Sequence[list[dict]], against: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(xs, lowest, mean, highest) of a metric at the steps that all runs have it at."""
    # Before its first step a run has had no episode, and says nothing of how many.
    rows = [[{against: 0.0} | row if row["step"] == 0 else row for row in run] for run in runs]
    tables = [{row["step"]: (row[against], row[name]) for row in run if name in row and against in row} for run in rows]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    xs = np.array([np.mean([table[step][0] for table in tables]) for step in steps])
    ys = np.array([[table[step][1] for table in tables] for step in steps]).reshape(len(steps), len(tables))
    return xs, ys.min(1), ys.mean(1), ys.max(1)


def _mean(figure: dict | None) -> float | None:
    return None if figure is None else figure["mean"]


def _record(run: RunFolder, target: Path) -> None:
    metrics, summary = run.stage("ppo").metrics, run.stage("evaluation").path / "summary.json"
    if not metrics.exists():
        raise UserError(f"{run.path} has no ppo/metrics.jsonl; name a run folder whose PPO has run")
    shorten = path_shortener(run)
    files = {"recipe.yaml": run.recipe, "timings.json": run.path / "timings.json", "ppo_metrics.jsonl": metrics,
             "summary.json": summary}  # fmt: skip
    for name, file in files.items():
        if file.exists():
            write_atomically(target / name, shorten(file.read_text(encoding="utf-8")))


def _readme(out: Path, groups: Groups) -> list[str]:
    environment = environment_of(next(iter(groups.values()))[0])
    seeds = {label: [seed_of(run) for run in runs] for label, runs in groups.items()}
    script = "To repeat: [run.sh](run.sh). " if (out / "run.sh").exists() else ""
    lines = [
        f"# {out.name}",
        "",
        f"{script}On {environment['cpus']} cores of {environment['cpu']}. Mean over the runs of a line, and in "
        "brackets their lowest and highest. Curves: the same, over training ([curves.png](curves.png)).",
        "",
    ]
    if not any((run.stage("evaluation").path / "summary.json").exists() for runs in groups.values() for run in runs):
        runs = (f"{label}: seeds {', '.join(map(str, numbers))}" for label, numbers in seeds.items())
        return [*lines, f"Runs of PPO without an evaluation of their models. {'; '.join(runs)}."]
    lines += ["| | seeds | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]  # fmt: skip
    for label, runs in groups.items():
        folders = [run.stage("evaluation").path for run in runs]
        summaries = [read_summary(folder) for folder in folders if (folder / SUMMARY).exists()]
        views = [(summary, summary["ppo"], summary) for summary in summaries]
        lines.append(_line(label, seeds[label], views))
        for model in other_tuned(summaries[0]) if summaries else ():
            if all(model in summary for summary in summaries):
                views = [(summary, summary[model], over_sft(summary, model)) for summary in summaries]
                words = title(model) if len(groups) == 1 else f"{title(model)} beside {label}"
                lines.append(_line(words, seeds[label], views))
    return lines


def _line(label: str, seeds: Sequence[int], views: Sequence[tuple[Mapping, Mapping, Mapping]]) -> str:
    cells = [_cell([read(*view) for view in views]) for read in COLUMNS.values()]
    return f"| {label} | {', '.join(map(str, seeds))} | " + " | ".join(cells) + " |"


def _cell(values: list[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "–"
    mean = f"{sum(there) / len(there):.3g}"
    return mean if len(there) == 1 else f"{mean} ({min(there):.3g} to {max(there):.3g})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_ray.report.compare", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN_DIR")
    parser.add_argument("--curves", default=",".join(CURVES), help="metrics to plot, separated by commas")
    parser.add_argument("--against", default="episodes", help="metric on the horizontal axis")
    parser.add_argument("--root", action="store_true", help="space that axis by its square root")
    given = parser.parse_args(arguments)
    groups: Groups = {}
    try:
        for one in given.runs:
            label, equals, path = one.partition("=")
            if not equals:
                raise UserError(f"{one!r}: write LABEL=RUN_DIR, for example ppo=runs/demo")
            run = RunFolder(expanded(path).absolute())
            if not run.recipe.exists():
                raise UserError(f"{path} is not a run folder (it has no recipe.yaml)")
            groups.setdefault(label, []).append(run)
        print(compare(given.out, groups, given.curves.split(","), given.against, given.root))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

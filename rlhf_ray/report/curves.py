"""Which of a stage's metrics are drawn together, under which title. What no plot names is drawn under "other"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from rlhf_ray.config.run_names import RunNames
from rlhf_ray.report import charts
from rlhf_ray.report.charts import Series

# title: ((metric, its name in the legend), ...); the metrics that a run has are drawn.
SUPERVISED = {
    "Loss": (("loss", "loss"),),
    "Accuracy": (("accuracy", "accuracy"),),
    "Margin, chosen over rejected": (("margin", "margin"),),
    "Implicit reward": (("reward_chosen", "chosen"), ("reward_rejected", "rejected")),
    "Log-prob of a reply, nats": (("logprob_chosen", "chosen"), ("logprob_rejected", "rejected")),
    "Learning rate": (("learning_rate", "learning rate"),),
    "Gradient norm": (("grad_norm", "gradient norm"),),
    "Speed": (("tokens_per_s", "tokens per second"),),
}
PPO = {
    "Score": (("objective/score", "training prompts"), ("eval/score", "held-out prompts")),
    "Judge, held-out prompts": (("eval/judge", "independent judge"),),
    "Disagreement of the reward models": (
        ("objective/disagreement", "training prompts"),
        ("eval/disagreement", "held-out prompts"),
    ),
    "Score and length: correlation": (("objective/score_length_corr", "training prompts"),),
    "KL to SFT, nats per response": (("objective/kl", "training prompts"), ("eval/kl", "held-out prompts")),
    "Reward: score minus KL penalty": (("objective/rlhf_reward", "reward"),),
    "KL coefficient": (("objective/kl_coef", "kl_coef"),),
    "KL of one update (approx_kl)": (("policy/approx_kl", "approx_kl"),),
    "Clipped share of tokens": (("policy/clip_frac", "policy"), ("value/clip_frac", "value")),
    "Entropy, nats per token": (("policy/entropy", "entropy"),),
    "Policy loss": (("policy/loss", "loss"),),
    "Value loss": (("value/loss", "loss"),),
    "Value: explained variance": (("value/explained_variance", "explained variance"),),
    "Response length, tokens": (
        ("objective/response_length", "training prompts"),
        ("eval/response_length", "held-out prompts"),
    ),
    "Share that ended by itself": (("objective/eos_rate", "training prompts"), ("eval/eos_rate", "held-out prompts")),
    "Generator/policy mismatch": (("policy/mismatch_kl", "KL"), ("policy/mismatch_p99", "99 % quantile")),
    "Truncated sampling: log of the kept mass": (("rollout/log_kept_mass", "mean per token"),),
    "Samples of older policies: age in versions": (("rollout/age_mean", "mean"), ("rollout/age_max", "oldest")),
    "Samples of older policies: importance": (
        ("rollout/importance_mean", "mean weight"),
        ("rollout/importance_capped_frac", "capped share"),
    ),
    "Learning rate": (("policy/learning_rate", "policy"),),
}
TIME_PREFIX, TOTALS = "time/", ("time/step_s",)
NOT_CURVES = ("step", "epoch", "episodes", "tokens", "elapsed_s", "progress", "total_steps")


@dataclass(frozen=True, slots=True)
class Plot:
    title: str
    last: str  # the newest value, or the newest of each series
    legend: list[str]  # empty for one series
    svg: Markup


def of_stage(stage: str, rows: list[dict], names: RunNames = RunNames()) -> tuple[list[Plot], list[Plot]]:
    """(the plots that have a place, the plots of every other number) of one metrics.jsonl."""
    series = _series(rows)
    named, used = [], set(TOTALS) | set(NOT_CURVES)
    for title, members in (PPO if stage == "ppo" else SUPERVISED).items():
        present = [Series(label, series[name].xs, series[name].ys) for name, label in members if name in series]
        used |= {name for name, _ in members}
        if present:
            named.append(_plot(names.told(title), present))
    named += over_optimisation(rows, names)
    times = [
        Series(name.removeprefix(TIME_PREFIX).removesuffix("_s"), one.xs, one.ys)
        for name, one in series.items()
        if name.startswith(TIME_PREFIX) and name not in TOTALS
    ]
    if times:
        used |= {name for name in series if name.startswith(TIME_PREFIX)}
        svg, legend = charts.stacked(times)
        named.append(Plot("Seconds per step", "", legend, svg))
    others = [_plot(name, [one]) for name, one in series.items() if name not in used]
    return named, others


def over_optimisation(rows: list[dict], names: RunNames = RunNames()) -> list[Plot]:
    """The held-out score and the judge's along sqrt(KL), the axis of Gao et al. 2022 (arXiv 2210.10760), where both are
    there: PPO's reward goes on rising while what is wanted falls."""
    points = np.array([
        (row["step"], row["eval/kl"], row["eval/score"], row["eval/judge"]) for row in rows
        if all(row.get(name) is not None for name in ("eval/kl", "eval/score", "eval/judge"))
    ], dtype=float)  # fmt: skip
    if len(points) < 2:
        return []
    steps, kl, scores, judge = points.T
    distance = np.sqrt(np.maximum(kl, 0.0))  # an estimate of a KL near zero may be below it
    series = [Series("score", distance, scores), Series("independent judge", distance, judge)]
    svg = charts.path(series, "√KL", steps)
    return [Plot(names.told("Score and judge over √KL to SFT, held-out prompts"), "", [one.name for one in series], svg)]


def _series(rows: list[dict]) -> dict[str, Series]:
    """Every numeric metric with the steps at which it was written."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                points.setdefault(name, []).append((row["step"], value))
    return {name: Series(name, *np.array(pairs, dtype=float).T) for name, pairs in points.items()}


def _plot(title: str, series: list[Series]) -> Plot:
    return Plot(
        title,
        " · ".join(charts.number(float(one.ys[-1])) for one in series),
        [one.name for one in series] if len(series) > 1 else [],
        charts.curves(series),
    )

"""What Prometheus reads of a run: gauges and counters of the driver, which every node of Ray exports beside Ray's own.

Ray puts `ray_` before each name, and `_total` behind a counter's. cluster/grafana.json shows them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from rlhf_ray.runs.status_file import Written

#: name -> what it is; of the run as it stands
STATE = {
    "rlhf_step": "steps that the stage has done",
    "rlhf_steps": "steps that the stage has",
    "rlhf_step_seconds": "seconds per step of the stage",
    "rlhf_left_seconds": "seconds to the end of the stage",
    "rlhf_samples_per_second": "rollouts per second, all actors together",
    "rlhf_tokens_per_second": "tokens per second of a supervised stage, all ranks together",
    "rlhf_checkpoint_age_seconds": "since the newest whole checkpoint was written",
}
#: name -> (the step's figure, what it is)
FIGURES = {
    "rlhf_score": ("objective/score", "mean score of the step's rollouts"),
    "rlhf_reward": ("objective/rlhf_reward", "mean score less the KL penalty"),
    "rlhf_kl": ("objective/kl", "KL to the reference, nats per response"),
    "rlhf_eval_score": ("eval/score", "mean score of the held-out prompts"),
    "rlhf_response_length": ("objective/response_length", "tokens per response"),
    "rlhf_entropy": ("policy/entropy", "nats per token"),
    "rlhf_approx_kl": ("policy/approx_kl", "of an update, nats per token"),
    "rlhf_clip_frac": ("policy/clip_frac", "share of tokens whose ratio was clipped"),
    "rlhf_mismatch_kl": ("policy/mismatch_kl", "KL of generator and policy, nats per token"),
    "rlhf_policy_grad_norm": ("policy/grad_norm", "before clipping"),
    "rlhf_explained_variance": ("value/explained_variance", "of the critic"),
    "rlhf_loss": ("loss", "of a supervised stage"),
}
#: name -> (prefix and suffix of the step's figures, the tag that stands between them, what it is)
FAMILIES = {
    "rlhf_phase_seconds": ("time/", "_s", "phase", "seconds of the last step, by phase"),
    "rlhf_busy_seconds": ("busy/", "_s", "role", "seconds that actors computed in the last step, by role"),
    "rlhf_object_bytes": ("bytes/", "", "role", "bytes through the object store in the last step, by role"),
}
WAITING = "rlhf_waiting_seconds"
COUNTERS = {
    "rlhf_samples": "rollouts that were trained on",
    "rlhf_restarts": "actors that were made again, by role",
}


class RunMetrics:
    """Says nothing before Ray is there (`exported`), and nothing after it has gone."""

    def __init__(self, run: str):
        self.run = run
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._waited: dict[str, str] | None = None  # tags of the newest wait
        self._on = False

    @contextmanager
    def exported(self) -> Iterator[str]:
        """For the body of the `with`, in which Ray is connected -> where this node's metrics are read."""
        tags = ("run", "stage")
        self._gauges = {name: Gauge(name, words, tags) for name, words in STATE.items()}
        self._gauges |= {name: Gauge(name, words, tags) for name, (_, words) in FIGURES.items()}
        self._gauges |= {name: Gauge(name, words, (*tags, tag)) for name, (_, _, tag, words) in FAMILIES.items()}
        self._gauges[WAITING] = Gauge(WAITING, "how long the run has waited for an actor", (*tags, "actor"))
        self._counters = {name: Counter(name, words, (*tags, "role")) for name, words in COUNTERS.items()}
        self._on = True
        try:
            yield metrics_address()
        finally:
            self._on = False

    def hear(self, event: Mapping[str, Any]) -> None:
        """A progress event of a stage: a step has its figures."""
        if not self._on or "step" not in event:
            return
        stage, figures = event["stage"], {**event, **event.get("metrics", {})}
        for name, (key, _) in FIGURES.items():
            self._set(name, stage, figures.get(key))
        for name, (prefix, suffix, tag, _) in FAMILIES.items():
            for key, value in figures.items():
                if key.startswith(prefix) and key.endswith(suffix):
                    self._set(name, stage, value, **{tag: key.removeprefix(prefix).removesuffix(suffix)})
        if "samples_per_s" in figures and "time/step_s" in figures:
            self._add("rlhf_samples", stage, round(figures["samples_per_s"] * figures["time/step_s"]), role="all")
        for key, value in figures.items():
            if key.startswith("failures/"):
                self._add("rlhf_restarts", stage, value, role=key.removeprefix("failures/"))

    def tell(self, now: Written, checkpoint_age_s: float | None) -> None:
        """The run as it stands, every other second."""
        if not self._on or now.stage is None:
            return
        values = (
            now.step, now.total, now.seconds_per_step, now.left_s, now.samples_per_s, now.tokens_per_s, checkpoint_age_s
        )  # fmt: skip
        for name, value in zip(STATE, values, strict=True):
            self._set(name, now.stage, value)
        self._tell_wait(now)

    def _tell_wait(self, now: Written) -> None:
        waited, self._waited = self._waited, None
        if now.waiting_for is not None and now.waiting_since is not None and now.stage is not None:
            actor = now.waiting_for.partition(" (")[0]  # without step and chunk: a tag has few values
            self._waited = {"stage": now.stage, "actor": actor}
            self._set(WAITING, now.stage, max(time.time() - now.waiting_since, 0.0), actor=actor)
        if waited is not None and waited != self._waited:
            self._set(WAITING, waited["stage"], 0.0, actor=waited["actor"])

    def _set(self, name: str, stage: str, value: float | None, **tags: str) -> None:
        if self._on and value is not None:
            self._gauges[name].set(value, {"run": self.run, "stage": stage, **tags})

    def _add(self, name: str, stage: str, value: float, **tags: str) -> None:
        if value > 0:
            self._counters[name].inc(value, {"run": self.run, "stage": stage, **tags})


def metrics_address() -> str:
    """Where the node of this process exports metrics."""
    own = ray.get_runtime_context().get_node_id()
    (node,) = [each for each in ray.nodes() if each["NodeID"] == own]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def exported_names() -> set[str]:
    """All names, as Prometheus has them."""
    gauges = (*STATE, *FIGURES, *FAMILIES, WAITING)
    return {f"ray_{name}" for name in gauges} | {f"ray_{name}_total" for name in COUNTERS}

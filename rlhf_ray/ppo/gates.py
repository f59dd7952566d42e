"""What stops a run whose log-probs disagree: generator and policy on sampled tokens, the policy and itself before it has moved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from rlhf_ray.errors import RunFailed


class MismatchError(RunFailed):
    """Generator and policy disagree about the log-probs of sampled tokens."""


class MismatchLimits(Protocol):
    """StepConfig has them, too."""

    @property
    def max_mismatch(self) -> float: ...
    @property
    def max_mismatch_kl(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnLimits:
    """For samples of an evaluation."""

    max_mismatch: float
    max_mismatch_kl: float


def check_mismatch(metrics: dict[str, float], limits: MismatchLimits) -> None:
    """The gate between rollout and update: a generator on other weights than the policy's would train on noise.

    Not on the largest gap, which grows with the number of tokens: in 16 bits one of thousands is far off by rounding alone
    (results/bench/README.md, "Rounding and faults").
    """
    remedy = "set generation.precision and ppo.precision to float32, or raise"
    gap, kl = metrics["policy/mismatch_p99"], metrics["policy/mismatch_kl"]
    if not gap <= limits.max_mismatch:  # NaN is not
        raise MismatchError(
            f"generator and policy differ by {gap:.3f} or more in the log-probs of 1 of 100 sampled tokens, above "
            f"ppo.max_mismatch = {limits.max_mismatch:.6g}; {remedy} ppo.max_mismatch"
        )
    if not kl <= limits.max_mismatch_kl:
        raise MismatchError(
            f"the KL of generator and policy is {kl:.4f} nats per sampled token, above ppo.max_mismatch_kl = "
            f"{limits.max_mismatch_kl:.6g}; {remedy} ppo.max_mismatch_kl"
        )


def check_off_policy(metrics: dict[str, float], steps_ahead: int, limits: MismatchLimits) -> None:
    """The same gate where samples may be older than the policy, whose log-probs then differ by design.

    It holds samples of the policy's own version to the limits, where there are any; each evaluation does too, on responses
    of the newest weights (`loop`). A lost sync shows here as an age that the order of calls does not allow.
    """
    age = metrics["rollout/age_max"]
    if not age <= steps_ahead:
        raise MismatchError(
            f"a sample is {age:.0f} policy versions old, above ppo.steps_ahead = {steps_ahead}: a weight sync got lost; look "
            "in the run folder's logs/ of the generation actors, then run the same command again"
        )
    if not math.isfinite(metrics["rollout/importance_mean"]):
        raise MismatchError(
            "the log-prob of a sampled token is not a number; set generation.precision and ppo.precision to float32, or "
            "lower ppo.learning_rate"
        )
    if "policy/mismatch_p99" in metrics:
        check_mismatch(metrics, limits)


def check_first_minibatch(metrics: dict[str, float], limit: float) -> None:
    """Before a policy has moved, its ratio to itself is 1: if not, the old log-probs are not the policy's."""
    moved = metrics.get("first_policy/approx_kl", 0.0)
    if not moved <= limit:  # NaN is not
        raise MismatchError(
            f"approx_kl of an update's first minibatch is {moved:.2g}, above ppo.max_first_approx_kl = {limit}, though the "
            "policy had not moved yet: its log-probs are not repeatable; set ppo.precision to float32, or raise the limit"
        )

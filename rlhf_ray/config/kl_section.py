"""The section `ppo.adaptive_kl`, and which KL penalties work."""

from __future__ import annotations

from rlhf_ray.config.base import Section, option

LARGEST_ERROR = 0.2  # of the controller (`algorithms.kl.adapt_kl_coef`), each way


class KlConfig(Section):
    """The adaptive controller of the KL coefficient (Ziegler et al. 2019)."""

    target: float = option(6.0, "nats per sequence, summed over its tokens", gt=0)
    horizon: int = option(10000, "episodes over which the coefficient adapts; above a fifth of a step's rollouts", gt=0)


def controller_problem(adaptive_kl: KlConfig | None, kl_coef: float, rollouts_per_step: int) -> str | None:
    """Why the controller can't work, in words.

    It multiplies the coefficient by 1 + error * rollouts / horizon, with an error of at least -0.2. A factor below 0 turns
    the penalty into a reward for drifting away, and from 0 no factor leads back.
    """
    if adaptive_kl is None:
        return None
    if kl_coef == 0:
        return (
            "ppo.adaptive_kl is set and ppo.kl_coef is 0: the controller multiplies kl_coef, which would stay 0; "
            "set kl_coef to the value to start from, or adaptive_kl to null"
        )
    factor = 1 - LARGEST_ERROR * rollouts_per_step / adaptive_kl.horizon
    if factor > 0:
        return None
    return (
        f"ppo.adaptive_kl.horizon = {adaptive_kl.horizon} is too short for {rollouts_per_step} rollouts per step: a KL below the "
        f"target would multiply kl_coef by {factor:.3g}, and a coefficient that is not above 0 does not penalise drifting away; "
        f"set horizon to {rollouts_per_step} or more"
    )


def estimator_problem(kl_in: str, kl_estimator: str) -> str | None:
    """Why the estimator does not work where it stands, in words. The gradients: `rlhf_ray/algorithms/README.md`."""
    if kl_in == "loss" and kl_estimator == "k1":
        return (
            "ppo.kl_estimator is k1 and kl_in is loss: k1's expected gradient is zero, so the penalty would have no effect; "
            "set kl_estimator to k2 or k3"
        )
    if kl_in == "reward" and kl_estimator != "k1":
        return (
            f"ppo.kl_estimator is {kl_estimator} and kl_in is reward: near the reference the gradient of such a reward is 0, and "
            "farther away it may point away from it; set kl_estimator to k1, or kl_in to loss"
        )
    return None

"""How a DPO model does on held-out pairs. Pure numpy.   N pairs; a log-ratio is log pi - log pi_ref of a reply, [N].

The implicit reward of a reply is beta times its log-ratio (arXiv 2305.18290, eq. 5 without the term that depends on the
prompt alone), so all figures of a reward model on pairs apply to it too.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from rlhf_ray.supervised.reward_metrics import pair_figures


def dpo_losses(
    chosen_logratios: np.ndarray,
    rejected_logratios: np.ndarray,
    chosen_lengths: np.ndarray,
    rejected_lengths: np.ndarray,
    *,
    beta: float,
    loss: Literal["sigmoid", "ipo"],
    label_smoothing: float,
) -> np.ndarray:
    """The loss of each pair, as TRL computes it. Lengths are the replies' tokens, EOS included.

    sigmoid: -(1 - eps) log sigmoid(x) - eps log sigmoid(-x), x = beta * (chosen - rejected); cDPO where eps > 0.
    ipo: (chosen / tokens - rejected / tokens - 1 / (2 beta))**2.
    """
    if loss == "ipo":
        return (chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths - 1 / (2 * beta)) ** 2
    x = beta * (chosen_logratios - rejected_logratios)
    # -log sigmoid(x) = log(1 + e^-x)
    return (1 - label_smoothing) * np.logaddexp(0, -x) + label_smoothing * np.logaddexp(0, x)


def dpo_figures(
    *,
    chosen_logratios: np.ndarray,
    rejected_logratios: np.ndarray,
    chosen_lengths: np.ndarray,
    rejected_lengths: np.ndarray,
    beta: float,
    loss: Literal["sigmoid", "ipo"],
    label_smoothing: float,
    groups: np.ndarray | None = None,
) -> dict:
    """Loss, a reward model's figures for the implicit reward, and how far the model is from the reference.

    groups: what pairs have in common (their prompt)
    logratio_chosen, logratio_rejected: mean log-ratios, nats per reply; above 0: likelier than under the reference.
    drift: minus their mean. Where the reference wrote the replies, that estimates KL(pi_ref || pi).
    """
    losses = dpo_losses(
        chosen_logratios, rejected_logratios, chosen_lengths, rejected_lengths,
        beta=beta, loss=loss, label_smoothing=label_smoothing,
    )  # fmt: skip
    rewards = (beta * chosen_logratios, beta * rejected_logratios)
    return {
        "eval_loss": float(losses.mean()),
        **pair_figures(*rewards, chosen_lengths, rejected_lengths, groups=groups),
        "logratio_chosen": float(chosen_logratios.mean()),
        "logratio_rejected": float(rejected_logratios.mean()),
        "drift": -float((chosen_logratios.mean() + rejected_logratios.mean()) / 2),
    }

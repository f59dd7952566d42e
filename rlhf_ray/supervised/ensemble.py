"""How good an ensemble of reward models is on held-out rows, from the scores that its members saved.

The stage's folder holds member 0, member_1/ ... in it the others; each holds a member's raw scores in heldout.npz.
"""

from __future__ import annotations

from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from rlhf_ray.algorithms.ensembles import combine_scores, disagreement
from rlhf_ray.config import RewardConfig
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import StageFolder
from rlhf_ray.supervised.reward_metrics import heldout_figures

SCORES = ("chosen", "rejected", "scores")  # the arrays that differ between members
# Figures of one model's logits only: a combined score is on the scale of the normalised scores.
OF_LOGITS = ("ece", "calibration", "margin_mean", "sign_accuracy", "score_mean", "score_std")


def save_scores(target: StageFolder, scores: dict[str, np.ndarray], *, seed: int) -> None:
    """Save a member's raw scores of the held-out rows; `seed` draws the pairs of scored rows."""
    arrays: dict[str, Any] = {"seed": seed, **scores}
    np.savez(target.path / "heldout.npz", **arrays)


def _saved_scores(target: StageFolder, number: int) -> dict[str, np.ndarray]:
    path = target.member(number).path / "heldout.npz"
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise UserError(
            f"{path} is damaged or gone ({error}); delete {target.member_done(number)}, and the next run trains this member again"
        ) from error


def ensemble_summary(each: list[dict], target: StageFolder, config: RewardConfig) -> dict:
    """The stage's DONE: the figures of member 0, which is the stage's model, those of the others and of all together."""
    left = []
    for number in range(len(each)):
        left.append(_saved_scores(target, number))
    moments = [(one.get("reward_mean", 0.0), one.get("reward_std", 1.0)) for one in each]
    others = {f"member_{number}": one for number, one in enumerate(each) if number > 0}
    together = ensemble_figures(left, moments, config)
    seconds = round(sum(one["seconds"] for one in each), 2)
    return each[0] | {"seconds": seconds, "members": len(each), **others, "ensemble": together}


def ensemble_figures(
    left: list[dict[str, np.ndarray]], moments: list[tuple[float, float]], config: RewardConfig
) -> dict:
    """Held-out figures of the combined score, and the members' mean disagreement.

    left: each member's raw scores; moments: mean and deviation that normalise them
    """
    combined, apart = dict(left[0]), []
    for name in (name for name in SCORES if name in combined):
        each = np.stack([(one[name] - mean) / std for one, (mean, std) in zip(left, moments, strict=True)])
        members = torch.from_numpy(each.astype(np.float64))
        combined[name] = combine_scores(members, combine=config.combine, std=config.combine_std).numpy()
        apart.append(disagreement(members).numpy())
    figures = heldout_figures(combined, seed=int(combined["seed"]), middle=0.0)
    kept = {name: value for name, value in figures.items() if name not in OF_LOGITS}
    kept["intervals"] = {name: value for name, value in figures["intervals"].items() if name in kept}
    return kept | {"combine": config.combine, "disagreement": float(np.concatenate(apart).mean())}

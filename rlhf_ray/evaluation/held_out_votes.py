"""How often the scorers of an evaluation agree with people, on votes that no training saw.   N pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_ray.algorithms.intervals import share_interval
from rlhf_ray.config import Recipe
from rlhf_ray.config.columns import column_problems
from rlhf_ray.data.role_files import has_role, read_role
from rlhf_ray.data.tokens import encode_pairs
from rlhf_ray.models.control_tokens import shown
from rlhf_ray.rewards.answers import Answers, score_answers
from rlhf_ray.rewards.scorer import Scorer
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.reward_metrics import numbered, pairs_right

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLE = "reward_eval_votes"


def agreement_with_votes(
    recipe: Recipe, folder: RunFolder, scorers: Mapping[str, Scorer | None], tokenizer: PreTrainedTokenizerBase
) -> dict | None:
    """{"pairs": N, scorer's name: the share of pairs that it orders as people do, with Wilson's interval}; a tie counts half.

    None where no votes are held out, or the recipe's functions ask for columns, which votes don't have.
    tokenizer: the policy's
    """
    if not has_role(folder, ROLE) or column_problems(recipe, (), "votes"):
        return None
    rows = read_role(folder, ROLE)
    found: dict = {"pairs": len(rows)}
    for name, scorer in scorers.items():
        if scorer is not None:
            chosen, rejected = (_scores(scorer, tokenizer, rows["prompt"], rows[side]) for side in ("chosen", "rejected"))
            right = pairs_right(chosen - rejected).tolist()
            found[name] = share_interval(right, numbered(rows["prompt"]).tolist())
    return found


def _scores(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, prompts, replies):
    answers = Answers(
        prompts=list(prompts), responses=[shown(reply) for reply in replies], ended=[True] * len(prompts),
        token_ids=[ids for ids, _ in encode_pairs(tokenizer, list(prompts), list(replies))], tokenizer=tokenizer, columns={},
    )  # fmt: skip
    return score_answers(scorer, answers).total

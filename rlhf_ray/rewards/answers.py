"""Responses to score, in every form that a scorer may read.   B responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rlhf_ray.config.columns import Columns
from rlhf_ray.messages import Scores
from rlhf_ray.models.control_tokens import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_ray.rewards.scorer import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Prompts with the policy's responses.

    Functions get the text, as the data stage stored it. A reward model that reads the policy's tokens gets `token_ids`, which
    are those that it was trained on: no decoding and encoding stands between. Another one encodes the text.
    """

    prompts: Sequence[str]  # as stored: marked
    responses: Sequence[str]  # without what ended them
    ended: Sequence[bool]  # whether the response ended by itself, that is, whether a token that ends responses is part of it
    token_ids: Sequence[Sequence[int]]  # prompt and response, with that token
    tokenizer: PreTrainedTokenizerBase  # the policy's
    columns: Columns  # the other columns of the prompts' rows, one value per response


@runtime_checkable
class AnswerScorer(Protocol):
    """A scorer that reads more than text."""

    def score_answers(self, answers: Answers) -> Scores: ...


def score_answers(scorer: Scorer | AnswerScorer, answers: Answers) -> Scores:
    """By any scorer; those that read text get what people would read."""
    if isinstance(scorer, AnswerScorer):
        return scorer.score_answers(answers)
    prompts = [shown(prompt) for prompt in answers.prompts]
    return scorer.score(prompts, answers.responses, answers.ended, answers.columns)

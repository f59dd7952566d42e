"""Scores a response to its prompt: with a reward model, an ensemble of them, the user's own Python function, or a weighted
sum of these.   B responses.   `rewards.from_recipe` makes the scorer that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from rlhf_ray.algorithms.ensembles import Combine, combine_scores, disagreement
from rlhf_ray.config.columns import NO_COLUMNS, Columns, asked_by
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.data.tokens import encode_pairs
from rlhf_ray.errors import UserError
from rlhf_ray.messages import Scores
from rlhf_ray.models.control_tokens import marker
from rlhf_ray.models.embeddings import fit_embeddings
from rlhf_ray.models.float_head import score_in_float32
from rlhf_ray.models.frozen import hold_frozen
from rlhf_ray.models.last_block import last_feed_forward
from rlhf_ray.models.load import disable_dropout, load_reward_model, reward_normalisation, to_device
from rlhf_ray.models.positions import positions_of
from rlhf_ray.models.tokenizer import eos_id, load_tokenizer, pad_id, same_tokens
from rlhf_ray.rewards.answers import Answers, score_answers
from rlhf_ray.rewards.finite_scores import ModelScore, UserScore, check_finite, sample_words
from rlhf_ray.rewards.http_reward import HttpReward
from rlhf_ray.rewards.isolated_function import IsolatedFunction, row_of
from rlhf_ray.rewards.returned import NotNumbers, numbers_of, shown_error
from rlhf_ray.training.classifier import line_logits, pack_classifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_REMEDY = "look at its weights and its config's reward_mean and reward_std, or set ppo.precision to float32"


class Scorer(Protocol):
    """Gives each response one score. One that reads more than text has `answers.AnswerScorer`'s method, too."""

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool], columns: Columns = NO_COLUMNS
    ) -> Scores:
        """ended: whether the response ended by itself, that is, whether EOS is part of it. columns: the other columns
        of the prompts' rows, one value per response; a scorer takes those that it asks for."""
        ...


class RewardScorer:
    """A reward model with its own tokenizer, whatever the policy's is. Scores are normalised: (raw - mean) / std.

    With the policy's own tokenizer it reads the policy's token ids, else the text. A text longer than the model's positions
    keeps its end: the score is read at the last token.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        trust_remote_code: bool = False,
    ):
        self.folder, self.tokenizer = folder, load_tokenizer(folder, trust_remote_code)
        self.model = load_reward_model(folder, None, trust_remote_code).eval()
        self.model.requires_grad_(False)
        disable_dropout(self.model)
        score_in_float32(self.model)
        self.mean, self.std = reward_normalisation(self.model.config)
        self.compute_dtype, self.device, self.batch_size = compute_dtype, torch.device(device), batch_size
        self.positions = positions_of(self.model.config)
        self.pad_token_id = self._padding()
        self.packed = pack_classifier(self.model)
        self._last_feed_forward = last_feed_forward(self.model)
        hold_frozen(self.model, compute_dtype)
        to_device(self.model, device)
        self._policy: tuple[PreTrainedTokenizerBase, bool] | None = None  # and whether its token ids are this model's

    def score_answers(self, answers: Answers) -> Scores:
        if self._policy is None or self._policy[0] is not answers.tokenizer:
            self._policy = answers.tokenizer, same_tokens(self.tokenizer, answers.tokenizer)
        if self._policy[1]:
            return self._score_ids([list(ids) for ids in answers.token_ids], answers.prompts, answers.responses)
        mark = marker(self.tokenizer, of_replies=True)
        return self.score(answers.prompts, [mark(text) for text in answers.responses], answers.ended)

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool], columns: Columns = NO_COLUMNS
    ) -> Scores:
        rows = encode_pairs(self.tokenizer, prompts, responses)
        token_ids = [ids if end else ids[:-1] for (ids, _), end in zip(rows, ended, strict=True)]
        return self._score_ids(token_ids, prompts, responses)

    def _score_ids(self, token_ids: list[list[int]], prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        token_ids = [ids[-(self.positions or 0) :] or [eos_id(self.tokenizer)] for ids in token_ids]
        scores = [self._raw(token_ids[i : i + self.batch_size]) for i in range(0, len(token_ids), self.batch_size)]
        raw = np.concatenate(scores) if scores else np.empty(0, np.float32)
        what = f"the reward model {self.folder} gave the score"
        return Scores(total=check_finite(ModelScore, what, self._normalised(raw), prompts, responses, remedy=MODEL_REMEDY))

    def _normalised(self, raw: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # what is not finite is told of with its sample
            return (raw - self.mean) / self.std

    def _padding(self) -> int:
        """The token that the model itself skips to find the last one. Other people's models may skip EOS, or nothing at
        all: then a PAD is added."""
        config = self.model.config.get_text_config()
        if config.pad_token_id is None:
            fit_embeddings(self.model, self.tokenizer)
            config.pad_token_id = self.model.config.pad_token_id = pad_id(self.tokenizer)
        return config.pad_token_id

    @torch.inference_mode()
    def _raw(self, token_ids: list[list[int]]) -> np.ndarray:
        with torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            logits = self._packed_logits(token_ids) if self.packed else self._padded_logits(token_ids)
        return logits.squeeze(-1).float().cpu().numpy()

    def _packed_logits(self, token_ids: list[list[int]]) -> torch.Tensor:
        rows = [np.array(ids) for ids in token_ids]
        lengths = np.array([len(row) for row in rows])
        # Where the model would read its score: at the last token that is not its PAD (in some models EOS).
        last = np.array([np.flatnonzero(row != self.pad_token_id).max(initial=0) for row in rows])
        places = torch.from_numpy(lengths.cumsum() - lengths + last).to(self.device)
        return line_logits(self.model, rows, places, self._last_feed_forward)

    def _padded_logits(self, token_ids: list[list[int]]) -> torch.Tensor:
        width = max(map(len, token_ids))
        input_ids = torch.full((len(token_ids), width), self.pad_token_id)
        for row, ids in zip(input_ids, token_ids, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        mask = (torch.arange(width) < torch.tensor([len(ids) for ids in token_ids])[:, None]).long()
        return self.model(
            input_ids=input_ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False
        ).logits


class EnsembleScorer:
    """Several reward models that score together (`algorithms.ensembles`)."""

    def __init__(self, members: Sequence[Scorer], *, combine: Combine, std: float):
        self.members, self.std = members, std
        self.combine: Combine = combine

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool], columns: Columns = NO_COLUMNS
    ) -> Scores:
        scores = [member.score(prompts, responses, ended, columns) for member in self.members]
        return self._combined(scores, prompts, responses)

    def score_answers(self, answers: Answers) -> Scores:
        scores = [score_answers(member, answers) for member in self.members]
        return self._combined(scores, answers.prompts, answers.responses)

    def _combined(self, scores: list[Scores], prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        each = np.stack([part.total for part in scores])  # [M, B]
        together = torch.from_numpy(each)
        combined = combine_scores(together, combine=self.combine, std=self.std).numpy()
        return Scores(
            total=check_finite(ModelScore, f"the ensemble's score ({self.combine}) is", combined, prompts, responses),
            disagreement=disagreement(together).numpy(),
        )


@dataclass(frozen=True, slots=True)
class WeightedTerm:
    weight: float
    scorer: Scorer


class WeightedSum:
    """Several rewards at once: total = sum of weight * score over the named terms."""

    def __init__(self, terms: dict[str, WeightedTerm]):
        self.terms = terms
        # This process only waits for an isolated function, so it computes the other scores meanwhile.
        self.aside = [name for name, term in terms.items() if isinstance(term.scorer, (IsolatedFunction, HttpReward))]
        self._threads = ThreadPoolExecutor(max(len(self.aside), 1))

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool], columns: Columns = NO_COLUMNS
    ) -> Scores:
        return self._sum(lambda scorer: scorer.score(prompts, responses, ended, columns), prompts, responses)

    def score_answers(self, answers: Answers) -> Scores:
        return self._sum(lambda scorer: score_answers(scorer, answers), answers.prompts, answers.responses)

    def _sum(self, score: Callable[[Scorer], Scores], prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        scorers = {name: term.scorer for name, term in self.terms.items()}
        waiting = {name: self._threads.submit(score, scorers[name]) for name in self.aside}
        here: dict[int, Scores] = {}  # a model that is part of two terms scores once
        for name, scorer in scorers.items():
            if name not in waiting and id(scorer) not in here:
                here[id(scorer)] = score(scorer)
        parts = {
            name: waiting[name].result() if name in waiting else here[id(scorer)] for name, scorer in scorers.items()
        }
        for name, part in parts.items():
            check_finite(UserScore, f"the reward '{name}' is", part.total, prompts, responses)
        with np.errstate(all="ignore"):  # what is not finite is told of with its sample
            total = np.asarray(sum(np.float32(term.weight) * parts[name].total for name, term in self.terms.items()), np.float32)
        weighted = " + ".join(f"{term.weight:g} {name}" for name, term in self.terms.items())
        total = check_finite(
            UserScore, f"the sum of ppo.rewards ({weighted}) is", total, prompts, responses, remedy="lower the weights",
        )  # fmt: skip
        late = [part.late for part in parts.values() if part.late is not None]
        apart = [part.disagreement for part in parts.values() if part.disagreement is not None]
        return Scores(
            total=total,
            terms={name: part.total for name, part in parts.items()},
            disagreement=apart[0] if apart else None,  # the reward stage's: there is no other ensemble
            late=np.logical_or.reduce(late) if late else None,
        )


class FunctionScorer:
    """A user's function (prompts, responses) -> scores, which may ask for columns of the prompts' rows by name
    (`config.columns`). An error in it is the user's, and is shown with the sample."""

    def __init__(self, path: str):
        self.path = path
        self.function = import_function(path)
        self.asked = asked_by(self.function)

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool], columns: Columns = NO_COLUMNS
    ) -> Scores:
        own = self.asked.of(columns, prompts)
        try:
            returned = self._call(prompts, responses, own)
        except Exception as error:  # fault boundary: the user's code may raise anything
            self._raise_for_first(prompts, responses, own)
            raise UserError(
                f"{self.path} raised {shown_error(error)} on {len(prompts)} samples together, and on none of "
                f"them alone; the first is {sample_words(prompts[0], responses[0], row_of(own, 0))}"
            ) from error
        try:
            scores = np.array(numbers_of(returned, len(prompts)), np.float64)
        except NotNumbers as wrong:
            at = wrong.place
            told = "" if at is None else f" for {sample_words(prompts[at], responses[at], row_of(own, at))}"
            raise UserError(f"{self.path} returned {wrong}{told}; return one number for each response, in a list") from None
        return Scores(total=check_finite(UserScore, f"{self.path} returned", scores, prompts, responses, own))

    def _call(self, prompts: Sequence[str], responses: Sequence[str], columns: Columns) -> object:
        # Copies: the function may change its lists.
        own = {name: list(values) for name, values in columns.items()}
        return self.function(list(prompts), list(responses), **own)

    def _raise_for_first(self, prompts: Sequence[str], responses: Sequence[str], columns: Columns) -> None:
        """UserError with the first sample that the function raises on when it is given alone."""
        for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            row = row_of(columns, place)
            try:
                self._call([prompt], [response], {name: [value] for name, value in row.items()})
            except Exception as error:  # fault boundary: the user's code may raise anything
                raise UserError(
                    f"{self.path} raised {shown_error(error)} on {sample_words(prompt, response, row)}"
                ) from error

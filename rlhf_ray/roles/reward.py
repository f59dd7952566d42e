"""Scores chunks."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config.columns import NO_COLUMNS
from rlhf_ray.data.chat import last_question
from rlhf_ray.data.role_files import PromptColumns
from rlhf_ray.messages import RolloutBatch, Scores
from rlhf_ray.models.control_tokens import shown
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.rewards.answers import Answers, score_answers
from rlhf_ray.rewards.finite_scores import ModelScore, UserScore, check_scores
from rlhf_ray.rewards.scorer import Scorer
from rlhf_ray.roles.rollout_text import answers_of


class Reward:
    """Scores the policy's responses. A scorer gets the stored text of their prompts, or the policy's token ids."""

    def __init__(
        self,
        scorer: Scorer,
        policy_folder: str | Path,
        *,
        judge: Scorer | None = None,
        stop: tuple[str, ...] = (),
        trust_remote_code: bool = False,
        columns: tuple[PromptColumns, PromptColumns] | None = None,
    ):
        """columns: the prompts and the held-out prompts, with the other columns that scorers ask for. Without them, a
        prompt's text is that of its token ids."""
        self.columns = columns
        self.scorer, self.judge_scorer, self.stop = scorer, judge, stop
        self.tokenizer = load_tokenizer(policy_folder, trust_remote_code)

    def score(self, rollout: RolloutBatch) -> Scores:
        """The scores before the missing-EOS penalty and the KL penalty; all finite."""
        return self._score(self.scorer, rollout, "reward")

    def judge(self, rollout: RolloutBatch) -> Scores:
        """The same by the independent judge."""
        assert self.judge_scorer is not None, "only ppo.judge_evaluations asks the judge"
        return self._score(self.judge_scorer, rollout, "judge")

    def _score(self, scorer: Scorer, rollout: RolloutBatch, name: str) -> Scores:
        answers = self._answers(rollout)
        try:
            scores = score_answers(scorer, answers)
            source = f"the {name}'s score ({type(scorer).__name__}) is"
            return check_scores(scores, source, answers.prompts, answers.responses)
        except (UserScore, ModelScore) as error:
            raise type(error)(f"{error} ({rollout.chunk.where(error.place)})") from error

    def _answers(self, rollout: RolloutBatch) -> Answers:
        chunk, sequences = rollout.chunk, rollout.sequences
        rows = None if self.columns is None else self.columns[chunk.evaluation]
        return answers_of(
            self.tokenizer, None if rows is None else rows.prompts(chunk.prompt_indices), sequences.prompts(),
            sequences.responses(), rollout.ended.tolist(), stop=self.stop,
            columns=NO_COLUMNS if rows is None else rows.of(chunk.prompt_indices),
        )  # fmt: skip

    def texts(self, rollout: RolloutBatch, count: int) -> list[tuple[str, str]]:
        """The first `count` (prompt, response) pairs, to show; of a conversation, the user's last turn."""
        answers, places = self._answers(rollout), rollout.chunk.prompt_indices
        chats = [None] * len(places) if self.columns is None else self.columns[rollout.chunk.evaluation].messages(places)
        prompts = [
            last_question(messages or []) or shown(prompt) for messages, prompt in zip(chats, answers.prompts, strict=True)
        ]
        return list(zip(prompts, answers.responses, strict=True))[:count]

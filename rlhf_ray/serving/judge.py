"""A judge over served answers: a reward server scores a part of them, for the comparison of two versions."""

from __future__ import annotations

import asyncio
import logging

from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.rewards.http_reward import HttpReward
from rlhf_ray.serving.answered import Answered
from rlhf_ray.serving.publication import Publisher

logger = logging.getLogger(__name__)

_WAITING, _AT_ONCE = 256, 16
TIMEOUT_S = 30.0


class Judge:
    """A listener of the front's, and a task. Answers that it is too slow for are not scored; a judge that does not answer
    costs scores and nothing else."""

    def __init__(self, url: str, publisher: Publisher, key: str | None = None):
        self._scorer = HttpReward([url], timeout_s=TIMEOUT_S, retries=0, key=key)
        self._publisher = publisher
        self._queue: asyncio.Queue[tuple[str, str, str, str]] = asyncio.Queue(_WAITING)

    def ended(self, answer: Answered) -> None:
        for prompt, response in answer.texts[:1] if answer.status == 200 and not answer.failed else ():
            if not self._queue.full():
                self._queue.put_nowait((answer.model, answer.version, prompt, response))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            batch = [await self._queue.get()]
            while len(batch) < _AT_ONCE and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            prompts, responses = [one[2] for one in batch], [one[3] for one in batch]
            try:
                scores = await asyncio.to_thread(self._scorer.score, prompts, responses, [True] * len(batch))
            except (RunFailed, UserError) as error:
                logger.warning("the judge gave no scores: %s", error)
                continue
            for (model, version, _, _), score in zip(batch, scores.total, strict=True):
                self._publisher.scored(model, version, float(score))

"""Which comparison a rater judges next: one that waits, or a new one, drawn from two of the served models or versions."""

from __future__ import annotations

import asyncio
import random
import secrets

from rlhf_ray.serving.api_errors import ApiError, bad_request
from rlhf_ray.serving.page.bodies import ComparisonRequest, ShownAnswer, ShownComparison
from rlhf_ray.serving.page.served_answers import Card, Models
from rlhf_ray.votes.records import Prompt, Showing, prompt_key
from rlhf_ray.votes.store import VoteStore

DRAWS = 50  # of the list, to find a prompt that is new to the rater


class Comparing:
    """Offers comparisons. prompts: the list that they are drawn from; most_votes: those with so many are done; longest: tokens of
    an answer, unless a request says otherwise.

    as_they_are: the prompts are the run's own, in the form that its models were trained on. A text of another list is what a
    person says: for a model with a chat template it becomes a message.
    """

    def __init__(
        self, store: VoteStore, models: Models, prompts: list[Prompt], most_votes: int, *, as_they_are: bool, longest: int
    ):  # fmt: skip
        self.store, self.models, self.prompts, self.most_votes = store, models, prompts, most_votes
        self.as_they_are, self.longest = as_they_are, longest
        self._random = random.Random(secrets.randbits(64))

    async def next(self, rater: str, asked: ComparisonRequest) -> ShownComparison:
        """ApiError where there is nothing to compare, or a model can't answer: then nothing is stored."""
        waiting = None
        if asked.prompt is None and asked.models is None and not asked.fresh:
            waiting = await asyncio.to_thread(self.store.unjudged, rater, most_votes=self.most_votes, skip=asked.skip)
        comparison = waiting if waiting is not None else await self._new(rater, asked)
        return shown(await asyncio.to_thread(self.store.show, comparison, rater))

    async def _new(self, rater: str, asked: ComparisonRequest) -> str:
        two = await self._two_models(asked.models)
        if asked.prompt is not None:
            prompt = self.models.own_prompt(asked.prompt, two)
        else:
            listed = await self._listed(rater)
            prompt = listed if self.as_they_are else self.models.fitting(listed, two)
        one, other = await self.models.two_answers(
            prompt, two, temperature=asked.temperature, max_tokens=asked.max_tokens or self.longest
        )
        return await asyncio.to_thread(self.store.add, prompt, one, other)

    async def _two_models(self, asked: list[str] | None) -> list[Card]:
        """Two at random; the same one twice where there is no other."""
        if asked is not None:
            return await self.models.cards_of(asked)
        cards = await self.models.rivals()
        if not cards:
            raise ApiError(
                503, "No model is running. Please retry shortly.", code="unavailable", headers={"Retry-After": "5"}
            )
        return self._random.sample(cards, 2) if len(cards) > 1 else cards * 2

    async def _listed(self, rater: str) -> Prompt:
        if not self.prompts:
            raise bad_request(
                "This server has no list of prompts (--prompts FILE gives it one); write one of your own.",
                param="prompt", code="no_prompts",
            )  # fmt: skip
        judged = await asyncio.to_thread(self.store.judged_prompts, rater)
        drawn = [self._random.choice(self.prompts) for _ in range(DRAWS)]
        return next((each for each in drawn if prompt_key(each) not in judged), drawn[0])


def shown(showing: Showing, vote: dict[str, object] | None = None) -> ShownComparison:
    """Without a word of who wrote what."""
    return ShownComparison(
        comparison=showing.comparison.id, prompt=showing.comparison.prompt,
        left=ShownAnswer(text=showing.left.text), right=ShownAnswer(text=showing.right.text), vote=vote,
    )  # fmt: skip

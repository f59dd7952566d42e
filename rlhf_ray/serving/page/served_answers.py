"""The served models, asked through the front as any client asks: which there are, and what they answer."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, replace
from typing import Any

import httpx
from starlette.types import ASGIApp

from rlhf_ray.serving.api_errors import ApiError
from rlhf_ray.votes.records import Answer, Prompt, turns

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A served model, or one version of it."""

    name: str
    chat: bool  # whether it has a chat template
    longest_prompt: int | None = None  # tokens; None: no limit
    version: str | None = None  # that has to answer; None: whichever takes the request

    @property
    def called(self) -> str:
        """'ppo', or 'ppo@3f2a91c07b5e' of a version: what a request of the page names it by."""
        return self.name if self.version is None else f"{self.name}@{self.version}"


class Models:
    """front: the app that answers /v1/..., without a key. ending: what ends a person's prompt for models without chat template."""

    def __init__(self, front: ASGIApp, ending: str = ""):
        self.front, self.ending = front, ending
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(front, raise_app_exceptions=False), base_url="http://page", timeout=None
        )

    async def cards(self) -> list[Card]:
        """Those that have a replica now."""
        data = (await self.ask("GET", "/v1/models"))["data"]
        return [
            Card(
                name=each["id"], chat=bool(each.get("chat_template", True)),
                longest_prompt=each["max_model_len"] - 1 if each.get("max_model_len") else None,
            )
            for each in data
        ]  # fmt: skip

    async def versions(self) -> list[Card]:
        """The stable version and the candidate of each model that has a candidate now: those that can be told apart."""
        try:
            states = (await self.ask("GET", "/versions"))["data"]
        except ApiError:  # a server whose models stay as they are
            return []
        pairs = {each["model"]: (each["stable"], each["candidate"]) for each in states if each["candidate"] is not None}
        return [replace(card, version=version) for card in await self.cards() for version in pairs.get(card.name, ())]

    async def rivals(self) -> list[Card]:
        """What is compared: the models, and in place of one with a candidate its two versions."""
        pinned = await self.versions()
        apart = {card.name for card in pinned}
        return [card for card in await self.cards() if card.name not in apart] + pinned

    async def choices(self) -> list[Card]:
        """What a person may ask for: every model, and the versions that can be told apart."""
        return await self.cards() + await self.versions()

    async def cards_of(self, names: list[str]) -> list[Card]:
        """ApiError 404 for a name that is not served."""
        there = {card.called: card for card in await self.choices()}
        for name in names:
            if name not in there:
                known = ", ".join(map(repr, there))
                raise ApiError(404, f"The model '{name}' is not served now; there is {known}.", code="model_not_found")
        return [there[name] for name in names]

    async def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, version: str | None = None
    ) -> dict[str, Any]:
        """The front's answer; ApiError with its status and words where it is none."""
        pinned = {} if version is None else {"X-Model-Version": version}
        answer = await self._client.request(method, path, json=body, headers=pinned)
        found = answer.json()
        if answer.is_success:
            return found
        error, retry = found.get("error", {}), answer.headers.get("retry-after")
        raise ApiError(
            answer.status_code, error.get("message", "The model could not be asked."), code=error.get("code"),
            param=error.get("param"), headers=None if retry is None else {"Retry-After": retry},
        )  # fmt: skip

    def own_prompt(self, text: str, cards: list[Card]) -> Prompt:
        """What a person wrote, as these models take it."""
        return self.fitting(text if text[-1:].isspace() else text + self.ending, cards, text)

    @staticmethod
    def fitting(prompt: Prompt, cards: list[Card], message: str | None = None) -> Prompt:
        """A text as a message where one of the models has a chat template. message: then said in place of the prompt."""
        if isinstance(prompt, str) and any(card.chat for card in cards):
            return turns(prompt if message is None else message)
        return prompt

    async def two_answers(
        self, prompt: Prompt, cards: list[Card], *, temperature: float, max_tokens: int
    ) -> list[Answer]:
        """One of each of two models. Drawn again, twice at most, where both say the same, which nobody could judge."""
        found: list[Answer] = []
        for _ in range(3):
            drawing = [self.answer(prompt, card, temperature=temperature, max_tokens=max_tokens) for card in cards]
            found = list(await asyncio.gather(*drawing))
            if found[0].text.strip() != found[1].text.strip():
                break
        return found

    async def answer(self, prompt: Prompt, card: Card, *, temperature: float, max_tokens: int) -> Answer:
        seed = secrets.randbits(53)
        sampling: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        path, body = request_for(prompt, card)
        while True:
            try:
                found = await self.ask("POST", path, body | sampling | {"seed": seed}, card.version)
            except ApiError as error:
                if not too_long(error.status, error.param, sampling["max_tokens"]):
                    raise
                sampling["max_tokens"] //= 2
            else:
                break
        choice = found["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        return Answer(text=storable(text), model=card.name, version=version_of(found), sampling=sampling, seed=seed)


def request_for(prompt: Prompt, card: Card) -> tuple[str, dict[str, Any]]:
    """(path, body): a text goes to the completions, messages go to the chat."""
    if isinstance(prompt, str):
        return COMPLETIONS, {"model": card.name, "prompt": prompt}
    return CHAT, {"model": card.name, "messages": turns(prompt)}


def too_long(status: int, param: str | None, max_tokens: int) -> bool:
    """Whether an answer was refused because the model has no room for one so long, and half as long may do."""
    return status == 400 and param == "max_tokens" and max_tokens >= 16


def version_of(answer: dict[str, Any]) -> str:
    """The version that wrote an answer: what the server says of it, or 1 for a server whose models stay as they are."""
    return str(answer.get("system_fingerprint") or "1")


def storable(text: str) -> str:
    """A model may write what no database holds."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()

"""An answer token by token: its log-probs under the model and under a reference, the critic's values, and its reward.

Both models read the very tokens that were drawn (`return_token_ids`), so that a token's log-ratio is that of the draw. Log-probs
are those before temperature. KL: the sum over the answer of log-prob minus reference log-prob (k1, nats), as PPO measures it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from rlhf_ray.serving.api_errors import ApiError
from rlhf_ray.serving.critic_values import VALUES
from rlhf_ray.serving.page.bodies import PlaygroundBody
from rlhf_ray.serving.page.served_answers import COMPLETIONS, Card, Models, request_for, too_long, version_of

REWARD_WAIT_S = 60.0


async def answers(models: Models, reward_url: str | None, body: PlaygroundBody) -> dict[str, Any]:
    """{answers: one per model}. ApiError for a reference that reads other tokens, and what the models refuse."""
    reference = None if body.reference is None else (await models.cards_of([body.reference]))[0]
    cards = await models.cards_of(body.models)
    return {"answers": await asyncio.gather(*(_answer(models, card, reference, reward_url, body) for card in cards))}


async def _answer(
    models: Models, card: Card, reference: Card | None, reward_url: str | None, body: PlaygroundBody
) -> dict[str, Any]:
    found = await _drawn(models, card, body)
    choice = found["choices"][0]
    prompt_ids: list[int] = choice.get("prompt_token_ids") or found["prompt_token_ids"]
    ids = (prompt_ids + choice["token_ids"])[: card.longest_prompt]
    drawn = len(ids) - len(prompt_ids)
    scoring = [_scored(models, card, ids, found.get("system_fingerprint"))]
    if reference is not None:
        scoring.append(_scored(models, reference, ids, reference.version))
    (own, *others), values = await asyncio.gather(asyncio.gather(*scoring), _values(models, card, ids, drawn))
    reference_scores = others[0] if others else None
    if reference_scores is not None and reference_scores["tokens"] != own["tokens"]:
        told = f"{body.reference} reads other tokens than {card.name}, so it can't be its reference."
        raise ApiError(400, told, param="reference")
    tokens = [{"token": token, "logprob": logprob} for token, logprob in _pairs(own, drawn)]
    for token, value in zip(tokens, values, strict=True) if values else ():
        token["value"] = value
    kl = None
    if reference_scores is not None:
        for token, (_, logprob) in zip(tokens, _pairs(reference_scores, drawn), strict=True):
            token["reference_logprob"] = logprob
        kl = sum(token["logprob"] - token["reference_logprob"] for token in tokens)
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return {
        "model": card.name, "version": version_of(found), "text": text, "finish_reason": choice["finish_reason"],
        "seed": body.seed, "tokens": tokens, "logprob": sum(token["logprob"] for token in tokens), "kl": kl,
        **await _reward(reward_url, "".join(own["tokens"][: len(prompt_ids)]), text),
    }  # fmt: skip


async def _drawn(models: Models, card: Card, body: PlaygroundBody) -> dict[str, Any]:
    path, asked = request_for(models.own_prompt(body.prompt, [card]), card)
    asked |= {
        "temperature": body.temperature,
        "max_tokens": body.max_tokens,
        "seed": body.seed,
        "return_token_ids": True,
    }
    while True:
        try:
            return await models.ask("POST", path, asked, card.version)
        except ApiError as error:
            if not too_long(error.status, error.param, asked["max_tokens"]):
                raise
            asked["max_tokens"] //= 2


async def _scored(models: Models, card: Card, ids: list[int], version: str | None = None) -> dict[str, Any]:
    """{tokens, token_logprobs, ...} of the ids under a model. version: that must say so, of a model that has several."""
    asked = {"model": card.name, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    return (await models.ask("POST", COMPLETIONS, asked, version))["choices"][0]["logprobs"]


async def _values(models: Models, card: Card, ids: list[int], drawn: int) -> list[float]:
    """Before each of the last `drawn` tokens, what the critic expects of the whole; [] where the model has none."""
    try:
        found = await models.ask("POST", VALUES, {"model": card.name, "prompt": ids}, card.version)
    except ApiError as error:
        if error.status == 404:
            return []
        raise
    return found["values"][len(ids) - drawn - 1 : len(ids) - 1]


def _pairs(scores: dict[str, Any], last: int) -> list[tuple[str, float]]:
    pairs = list(zip(scores["tokens"], scores["token_logprobs"], strict=True))
    return pairs[len(pairs) - last :]


async def _reward(url: str | None, prompt: str, text: str) -> dict[str, Any]:
    """{reward} of the whole, by the protocol of OpenRLHF's reward server. A failure is told in words, and is no reward."""
    if url is None:
        return {"reward": None}
    try:
        async with httpx.AsyncClient(timeout=REWARD_WAIT_S) as client:
            answer = await client.post(url, json={"query": [prompt + text], "prompts": [prompt]})
            answer.raise_for_status()
            return {"reward": float(answer.json()["rewards"][0])}
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        return {"reward": None, "reward_error": f"the reward server did not answer ({type(error).__name__})"}

"""From an engine's tokens to the chunks of an answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from rlhf_ray.serving.request_bodies import GenerationRequest
from rlhf_ray.serving.responses import ChatWriter, Choice, CompletionWriter, usage
from rlhf_ray.serving.runner import Ticket

Writer = CompletionWriter | ChatWriter


async def stream_of(
    body: GenerationRequest, prompts: list[list[int]], choices: list[Choice], ticket: Ticket, writer: Writer
) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of a streamed answer. With include_usage every chunk has the field. It is null in all but the last."""
    extra: dict[str, Any] = {"usage": None} if body.include_usage else {}
    for index in range(len(choices)):
        opening = writer.opening(index)
        if opening is not None:
            yield opening | extra
    for index, choice in enumerate(choices):
        if choice.finish_reason is not None:  # of which nothing is drawn
            yield writer.piece(index, "", [], choice.finish_reason) | extra
    async for touched in _progress(choices, ticket):
        for index in touched:
            text, tokens = choices[index].take()
            if text or tokens or choices[index].finish_reason is not None:
                yield writer.piece(index, text, tokens, choices[index].finish_reason) | extra
    if body.include_usage:
        yield writer.last(usage(prompts, choices))


async def finish(choices: list[Choice], ticket: Ticket) -> None:
    async for _ in _progress(choices, ticket):
        pass


async def _progress(choices: list[Choice], ticket: Ticket) -> AsyncIterator[list[int]]:
    """Feed tokens to the choices as they come. Yields the indices of the choices that changed. Cancels the rest at the end."""
    try:
        while events := await ticket.events():
            changed: dict[int, bool] = {}
            for index, event in events:
                if choices[index].finish_reason is None:
                    choices[index].push(event)
                    changed[index] = True
                    if choices[index].finish_reason is not None:
                        ticket.cancel(index)  # its text holds a stop string that the engine has not seen
            yield list(changed)
    finally:
        ticket.cancel()

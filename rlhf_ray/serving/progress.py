"""From an engine's tokens to the chunks of an answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from rlhf_ray.serving.handover import Begun, Drawn, Journal
from rlhf_ray.serving.request_bodies import GenerationRequest
from rlhf_ray.serving.responses import ChatWriter, Choice, CompletionWriter, usage
from rlhf_ray.serving.runner import Ticket

Writer = CompletionWriter | ChatWriter


async def stream_of(
    body: GenerationRequest,
    prompts: list[list[int]],
    choices: list[Choice],
    ticket: Ticket,
    writer: Writer,
    journal: Journal,
    begun: Begun,
) -> AsyncGenerator[dict[str, Any]]:
    """The chunks of a streamed answer. With include_usage every chunk has the field. It is null in all but the last.

    ticket: of the choices that are not complete. begun: what another replica has sent of it, which the choices have taken in.
    """
    extra: dict[str, Any] = {"usage": None} if body.include_usage else {}
    for index in range(len(choices)):
        opening = writer.opening(index)
        if opening is not None and index not in begun.opened:
            journal.opened(index)
            yield opening | extra
    for index, choice in enumerate(choices):
        if choice.finish_reason is not None and not choice.token_ids:  # of which nothing is drawn
            yield writer.piece(index, "", [], choice.finish_reason) | extra
    unsaid: dict[int, list[Drawn]] = {}
    async for drawn in _progress(choices, ticket):
        for index, new in drawn.items():
            unsaid.setdefault(index, []).extend(new)
            text, tokens = choices[index].take()
            if text or tokens or choices[index].finish_reason is not None:
                for each in unsaid.pop(index):
                    journal.drew(index, each)
                yield writer.piece(index, text, tokens, choices[index].finish_reason) | extra
    if body.include_usage and not begun.counted:
        journal.counted()
        yield writer.last(usage(prompts, choices))


async def finish(choices: list[Choice], ticket: Ticket) -> None:
    async for _ in _progress(choices, ticket):
        pass


async def _progress(choices: list[Choice], ticket: Ticket) -> AsyncIterator[dict[int, list[Drawn]]]:
    """Feed tokens to the choices as they come. Yields what each choice has taken in, by its index. Cancels the rest at the end.

    ticket: its rows are the choices that are not complete.
    """
    rows = [index for index, choice in enumerate(choices) if choice.finish_reason is None]
    try:
        while events := await ticket.events():
            taken: dict[int, list[Drawn]] = {}
            for row, event in events:
                index, drawn = rows[row], Drawn.of(event)
                if choices[index].finish_reason is None:
                    choices[index].push(drawn)
                    taken.setdefault(index, []).append(drawn)
                    if choices[index].finish_reason is not None:
                        ticket.cancel(row)  # its text holds a stop string that the engine has not seen
            yield taken
    finally:
        ticket.cancel()

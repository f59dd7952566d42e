"""What a replica needs to say what another one would have said, and to go on where that one has stopped. No HTTP.

A stream says with each of its chunks what the chunk tells the client, as entries of a journal. The front keeps those whose chunks
it has passed on, without reading them, and gives them to the replica that goes on. Entries, in msgpack:

    [index]                                  the chunk that opens this choice
    [index, token, reason]                   a token of this choice, and why the choice ended with it, if it did
    [index, token, reason, logprob, top]     the same where the client has asked for log-probs
    []                                       the chunk with the usage
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, cast

import msgpack

from rlhf_ray.config.sampling_params import FinishReason, TokenEvent

HANDOVER = "handover"
"""Where an app finds it in a request's state (`scope["state"]`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """What two runs of one request would draw for themselves."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    """For a request that names none."""


class Drawn(NamedTuple):
    """One token of one choice."""

    token_id: int
    reason: FinishReason | None
    """Why the response ended with it; None: it goes on."""
    logprob: float | None
    top: Iterable[tuple[int, float]] = ()

    @classmethod
    def of(cls, event: TokenEvent) -> Self:
        reason = None if event.completion is None else event.completion.finish_reason
        if event.raw is None:
            return cls(event.token_id, reason, event.logprob)
        return cls(event.token_id, reason, event.raw.logprob, event.raw.top)


class Journal:
    """Written while a stream is. `take` with each chunk that is sent."""

    def __init__(self, *, logprobs: bool):
        self._logprobs = logprobs
        self._entries = bytearray()

    def opened(self, index: int) -> None:
        self._note([index])

    def drew(self, index: int, drawn: Drawn) -> None:
        entry: list[Any] = [index, drawn.token_id, drawn.reason]
        self._note([*entry, drawn.logprob, list(drawn.top)] if self._logprobs else entry)

    def counted(self) -> None:
        self._note([])

    def take(self) -> bytes:
        """What was written since the last call."""
        taken = bytes(self._entries)
        self._entries.clear()
        return taken

    def _note(self, entry: list[Any]) -> None:
        self._entries += cast(bytes, msgpack.packb(entry))  # None only where a packer keeps what it packs


class Begun:
    """What a stream's reader has been told, read from its journal."""

    def __init__(self, journal: bytes = b""):
        self.opened: set[int] = set()
        self.drawn: dict[int, list[Drawn]] = {}
        """Of each choice, the tokens so far."""
        self.counted = False
        if not journal:
            return
        unpacker = msgpack.Unpacker(use_list=False, max_buffer_size=0)
        unpacker.feed(journal)
        for entry in unpacker:
            if not entry:
                self.counted = True
            elif len(entry) == 1:
                self.opened.add(entry[0])
            else:
                index, token_id, reason, *logprobs = entry
                logprob, top = logprobs or (None, ())
                self.drawn.setdefault(index, []).append(Drawn(token_id, reason, logprob, top))


@dataclass(slots=True)
class Handover:
    """Of one request, between the front's wire and the app."""

    fixed: Fixed = field(default_factory=Fixed)
    begun: bytes = b""
    """The journal of the stream that is to be gone on with; b"": from the start."""
    journal: Journal | None = None
    """The app's, of a stream that another replica can go on with."""


def handover_of(scope: MutableMapping[str, Any]) -> Handover:
    """A request's; one of its own where it has come through no front."""
    return scope.setdefault("state", {}).setdefault(HANDOVER, Handover())

"""Who votes: a name, or the token of an invitation; and how fast."""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections.abc import Callable

from fastapi import Request

from rlhf_ray.serving.api_errors import ApiError, bad_request
from rlhf_ray.votes.database import Database
from rlhf_ray.votes.invitations import rater_of, standing

MOST_BUCKETS = 10_000


class Raters:
    """Tells who asks. api_key: the server's; who has it may vote by any name that was not invited."""

    def __init__(self, database: Database | None, *, api_key: str | None, invited_only: bool):
        self.database, self.api_key = database, api_key
        self.invited_only = invited_only or api_key is not None

    async def rater(self, request: Request, name: str | None) -> str:
        """The rater's name, or ApiError 401 for one who may not vote and 400 where no name is given."""
        assert self.database is not None, "only a server with votes has raters"
        token = bearer(request)
        if token is not None and not self._is_key(token):
            rater = await asyncio.to_thread(rater_of, self.database, token)
            if rater is None:
                raise _unauthorized("This link is not valid any more; ask for a new one.")
            return rater
        if token is None and self.invited_only:
            raise _unauthorized("This server takes votes from invited raters only; open the link that you were sent.")
        if name is None:
            raise bad_request("Say who you are: 'rater' is missing.", param="rater", code="missing_required_parameter")
        if await asyncio.to_thread(standing, self.database, name) != "none":
            raise _unauthorized(f"'{name}' votes by a link; open the link that you were sent, or choose another name.")
        return name

    async def check(self, request: Request) -> str | None:
        """ApiError 401 for one who may not use the models or read the votes. The rater whose token it is, if it is one."""
        token = bearer(request)
        if token is not None and not self._is_key(token):
            rater = None if self.database is None else await asyncio.to_thread(rater_of, self.database, token)
            if rater is None:
                raise _unauthorized("This link or key is not valid (any more); ask for a new one.")
            return rater
        if token is None and self.invited_only:
            raise _unauthorized("This server asks for the link that you were sent, or for its API key.")
        return None

    def _is_key(self, token: str) -> bool:
        return self.api_key is not None and hmac.compare_digest(token.encode(), self.api_key.encode())


def bearer(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_rater", headers={"WWW-Authenticate": "Bearer"})


class RateLimit:
    """A bucket per name that holds `per_minute` and fills evenly: so many at once, and no more than so many a minute after."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # name -> (what is left in it, when that was so)

    def take(self, name: str) -> None:
        """ApiError 429 with Retry-After where the bucket is empty."""
        now = self._clock()
        left, at = self._buckets.pop(name, (float(self.per_minute), now))
        left = min(left + (now - at) * self.per_minute / 60, float(self.per_minute))
        if left < 1:
            self._buckets[name] = (left, now)
            wait = math.ceil((1 - left) * 60 / self.per_minute)
            raise ApiError(
                429, f"That was more than {self.per_minute} in a minute; wait {wait} s.",
                code="rate_limit_exceeded", headers={"Retry-After": str(wait)},
            )  # fmt: skip
        self._buckets[name] = (left - 1, now)
        while len(self._buckets) > MOST_BUCKETS:  # the one that was longest not used
            self._buckets.pop(next(iter(self._buckets)))

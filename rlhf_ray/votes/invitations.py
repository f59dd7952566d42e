"""Raters who vote by a link of their own: the link holds a token, and the database holds the token's hash.

A name that was ever invited votes with its token alone, also where others vote by name.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import Literal

import sqlalchemy as sa

from rlhf_ray.errors import UserError
from rlhf_ray.votes.database import Database
from rlhf_ray.votes.records import check_name
from rlhf_ray.votes.schema import invitations

Standing = Literal["none", "invited", "revoked"]


def invite(database: Database, rater: str) -> str:
    """A new token for the rater; an older one of theirs ends."""
    check_name("a rater", rater)
    token = secrets.token_urlsafe(24)
    row = {"token_hash": _hash(token), "made_at": time.time()}
    with database.writing() as connection:
        if not connection.execute(invitations.update().where(invitations.c.rater == rater).values(**row)).rowcount:
            connection.execute(invitations.insert().values(rater=rater, **row))
    return token


def revoke(database: Database, rater: str) -> None:
    """The rater's token ends, and the name can't vote. UserError for one who was not invited."""
    with database.writing() as connection:
        update = invitations.update().where(invitations.c.rater == rater).values(token_hash=None)
        if not connection.execute(update).rowcount:
            raise UserError(f"'{rater}' was never invited, so there is nothing to revoke; correct the name")


def rater_of(database: Database, token: str) -> str | None:
    """Whose token it is; None: nobody's, or not any more."""
    query = sa.select(invitations.c.rater).where(invitations.c.token_hash == _hash(token))
    with database.reading() as connection:
        return connection.execute(query).scalar_one_or_none()


def standing(database: Database, rater: str) -> Standing:
    """What became of the name's invitation."""
    query = sa.select(invitations.c.token_hash).where(invitations.c.rater == rater)
    with database.reading() as connection:
        row = connection.execute(query).one_or_none()
    return "none" if row is None else "revoked" if row.token_hash is None else "invited"


def _hash(token: str) -> str:
    """A token has 192 random bits: no salt and no slow hash is needed."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()

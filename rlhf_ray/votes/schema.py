"""The tables, their version, and the way from each version to the next.

    votes_schema     one row: version, held_out_share
    comparisons      prompt and when it was made; stored before anybody sees it
    answers          the two of a comparison, a and b: text, who wrote it, sampling parameters, seed
    showings         one per (comparison, rater): which answer stands on the left, when it was first shown
    votes            one per (comparison, rater)
    replaced_votes   what stood in `votes` before a rater changed it; nothing but its keys is read
    invitations      one per invited rater: the hash of the token in the rater's link, null once it is revoked

Prompts are JSON: a text, or a list of messages. Sampling parameters are JSON too. Times are seconds since 1970 (UTC).
"""

from __future__ import annotations

import json

import sqlalchemy as sa

from rlhf_ray.errors import UserError
from rlhf_ray.votes.records import prompt_key

VERSION = 3
LOCK = 0x724C4846  # of PostgreSQL, held while the tables are made or changed

metadata = sa.MetaData()


def _vote_columns(*, key_is_primary: bool = False) -> list[sa.Column | sa.Constraint]:
    return [
        sa.Column("key", sa.Text, nullable=False, primary_key=key_is_primary),
        sa.Column("choice", sa.Text, nullable=False),
        sa.Column("voted_at", sa.Double, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("rating", sa.Integer),
        sa.Column("reason", sa.Text),
        sa.Column("edit_of", sa.Text),
        sa.Column("edit", sa.Text),
        sa.Column("flag", sa.Text),
        sa.CheckConstraint("choice IN ('left', 'right', 'tie', 'both_bad')"),
        sa.ForeignKeyConstraint(["comparison", "rater"], ["showings.comparison", "showings.rater"]),
    ]


schema_version = sa.Table(
    "votes_schema", metadata,
    sa.Column("one", sa.Integer, sa.CheckConstraint("one = 1"), primary_key=True, autoincrement=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("held_out_share", sa.Double, nullable=False),
)  # fmt: skip
comparisons = sa.Table(
    "comparisons", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("made_at", sa.Double, nullable=False),
    sa.Column("prompt_key", sa.Text, nullable=False, index=True),
)  # fmt: skip
answers = sa.Table(
    "answers", metadata,
    sa.Column("comparison", sa.Text, sa.ForeignKey("comparisons.id"), primary_key=True),
    sa.Column("name", sa.Text, sa.CheckConstraint("name IN ('a', 'b')"), primary_key=True),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("sampling", sa.Text, nullable=False),
    sa.Column("seed", sa.BigInteger),
)  # fmt: skip
showings = sa.Table(
    "showings", metadata,
    sa.Column("comparison", sa.Text, sa.ForeignKey("comparisons.id"), primary_key=True),
    sa.Column("rater", sa.Text, primary_key=True),
    sa.Column("left_name", sa.Text, sa.CheckConstraint("left_name IN ('a', 'b')"), nullable=False),
    sa.Column("shown_at", sa.Double, nullable=False),
)  # fmt: skip
votes = sa.Table(
    "votes", metadata,
    sa.Column("comparison", sa.Text, primary_key=True),
    sa.Column("rater", sa.Text, primary_key=True),
    *_vote_columns(),
    sa.UniqueConstraint("rater", "key"),
)  # fmt: skip
replaced_votes = sa.Table(
    "replaced_votes", metadata,
    sa.Column("comparison", sa.Text, primary_key=True),
    sa.Column("rater", sa.Text, primary_key=True),
    *_vote_columns(key_is_primary=True),
    sa.Column("replaced_at", sa.Double, nullable=False),
)  # fmt: skip
invitations = sa.Table(
    "invitations", metadata,
    sa.Column("rater", sa.Text, primary_key=True),
    sa.Column("token_hash", sa.Text, unique=True),
    sa.Column("made_at", sa.Double, nullable=False),
)  # fmt: skip


def create(connection: sa.Connection, held_out_share: float) -> None:
    """Make the tables, unless another process has in the meantime. In a transaction that writes."""
    _lock(connection)
    there = set(sa.inspect(connection).get_table_names())
    if schema_version.name in there:
        return
    foreign = sorted(there & set(metadata.tables))
    if foreign:
        raise UserError(
            f"the database holds a table '{foreign[0]}' of something else; give votes a database of their own"
        )
    metadata.create_all(connection)
    connection.execute(schema_version.insert().values(one=1, version=VERSION, held_out_share=held_out_share))


def read(connection: sa.Connection) -> tuple[int, float] | None:
    """(version, held-out share); None where there are no tables of ours."""
    if not sa.inspect(connection).has_table(schema_version.name):
        return None
    row = connection.execute(sa.select(schema_version.c.version, schema_version.c.held_out_share)).one_or_none()
    return None if row is None else (row.version, row.held_out_share)


def check(version: int, where: str) -> None:
    """UserError for a version that this code can't work with."""
    if version > VERSION:
        raise UserError(
            f"{where} has schema {version}, made by a newer rlhf_ray, and this one knows schemas up to {VERSION}; "
            "install the newer one, nothing was changed"
        )
    if version < VERSION:
        raise UserError(
            f"{where} has schema {version}, and this rlhf_ray works with schema {VERSION}; end what uses it, copy it, and run: "
            f"rlhf-ray votes migrate {where}"
        )


def migrate(connection: sa.Connection, where: str) -> tuple[int, int]:
    """(version before, version now). All steps are one transaction: where one fails, the database stays as it was."""
    _lock(connection)
    found = read(connection)
    if found is None:
        raise UserError(f"{where} holds no votes: it has no table '{schema_version.name}'; correct the name")
    version = found[0]
    if version > VERSION:
        check(version, where)
    for step in range(version, VERSION):
        STEPS[step](connection)
    connection.execute(schema_version.update().values(version=VERSION))
    return version, VERSION


def _to_2(connection: sa.Connection) -> None:
    """Comparisons get the key of their prompt, by which prompts are held out; votes get a flag."""
    for table in (votes, replaced_votes):
        connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN flag TEXT")
    # A column that may not be null can't be added to rows that are there: '' until the next lines.
    connection.exec_driver_sql("ALTER TABLE comparisons ADD COLUMN prompt_key TEXT NOT NULL DEFAULT ''")
    rows = connection.execute(sa.select(comparisons.c.id, comparisons.c.prompt)).all()
    keys = [{"of": row.id, "key_of_prompt": prompt_key(json.loads(row.prompt))} for row in rows]
    if keys:
        update = comparisons.update().where(comparisons.c.id == sa.bindparam("of"))
        connection.execute(update.values(prompt_key=sa.bindparam("key_of_prompt")), keys)
    for index in comparisons.indexes:
        index.create(connection)


def _to_3(connection: sa.Connection) -> None:
    """Raters can be invited by a link."""
    invitations.create(connection)


STEPS = {1: _to_2, 2: _to_3}  # version -> what makes it the next one


def _lock(connection: sa.Connection) -> None:
    """SQLite's transaction that writes is alone anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})

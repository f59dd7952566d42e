"""The database of votes: by path and URL, from version to version, and what is said of one that can't be used."""

import json
import re
import sqlite3
import threading

import pytest
import sqlalchemy as sa
from command import rlhf_ray
from postgres import USUALLY_SQLITE
from voted import shown, vote

from rlhf_ray.errors import UserError
from rlhf_ray.votes import database, schema
from rlhf_ray.votes.database import Database, database_url, migrate, name_of
from rlhf_ray.votes.reading import held_out_prompts, read_judgements
from rlhf_ray.votes.records import is_held_out, prompt_key
from rlhf_ray.votes.store import VoteStore

V1 = """
CREATE TABLE votes_schema (one INTEGER NOT NULL CHECK (one = 1), version INTEGER NOT NULL,
    held_out_share DOUBLE PRECISION NOT NULL, PRIMARY KEY (one));
CREATE TABLE comparisons (id TEXT NOT NULL, prompt TEXT NOT NULL, made_at DOUBLE PRECISION NOT NULL, PRIMARY KEY (id));
CREATE TABLE answers (comparison TEXT NOT NULL, name TEXT NOT NULL CHECK (name IN ('a', 'b')), text TEXT NOT NULL,
    model TEXT NOT NULL, version TEXT NOT NULL, sampling TEXT NOT NULL, seed BIGINT, PRIMARY KEY (comparison, name),
    FOREIGN KEY(comparison) REFERENCES comparisons (id));
CREATE TABLE showings (comparison TEXT NOT NULL, rater TEXT NOT NULL, left_name TEXT NOT NULL CHECK (left_name IN ('a', 'b')),
    shown_at DOUBLE PRECISION NOT NULL, PRIMARY KEY (comparison, rater), FOREIGN KEY(comparison) REFERENCES comparisons (id));
CREATE TABLE votes (comparison TEXT NOT NULL, rater TEXT NOT NULL, key TEXT NOT NULL, choice TEXT NOT NULL,
    voted_at DOUBLE PRECISION NOT NULL, seconds DOUBLE PRECISION NOT NULL, rating INTEGER, reason TEXT, edit_of TEXT, edit TEXT,
    PRIMARY KEY (comparison, rater), CHECK (choice IN ('left', 'right', 'tie', 'both_bad')),
    FOREIGN KEY(comparison, rater) REFERENCES showings (comparison, rater), UNIQUE (rater, key));
CREATE TABLE replaced_votes (comparison TEXT NOT NULL, rater TEXT NOT NULL, key TEXT NOT NULL, choice TEXT NOT NULL,
    voted_at DOUBLE PRECISION NOT NULL, seconds DOUBLE PRECISION NOT NULL, rating INTEGER, reason TEXT, edit_of TEXT, edit TEXT,
    replaced_at DOUBLE PRECISION NOT NULL, PRIMARY KEY (comparison, rater, key),
    CHECK (choice IN ('left', 'right', 'tie', 'both_bad')),
    FOREIGN KEY(comparison, rater) REFERENCES showings (comparison, rater));
INSERT INTO votes_schema VALUES (1, 1, 0.25);
INSERT INTO comparisons VALUES ('c1', '"Name a colour."', 10.0);
INSERT INTO comparisons VALUES ('c2', '[{"content": "Hi", "role": "user"}]', 11.0);
INSERT INTO answers VALUES ('c1', 'a', 'Blue.', 'ppo', '2', '{"temperature": 0.5}', 7);
INSERT INTO answers VALUES ('c1', 'b', 'No.', 'sft', '1', '{}', NULL);
INSERT INTO answers VALUES ('c2', 'a', 'Hello', 'ppo', '2', '{}', 1);
INSERT INTO answers VALUES ('c2', 'b', 'What?', 'sft', '1', '{}', 2);
INSERT INTO showings VALUES ('c1', 'ann', 'b', 12.0);
INSERT INTO showings VALUES ('c2', 'ann', 'a', 13.0);
INSERT INTO votes VALUES ('c1', 'ann', 'k1', 'right', 14.0, 2.0, 4, 'because', NULL, NULL);
"""


REAL = re.compile("REAL|DOUBLE PRECISION")  # names of one type


def statements():
    return [line for line in V1.split(";\n") if line.strip()]


@pytest.fixture(params=["sqlite", "postgresql"])
def old(request, tmp_path):
    """The URL of a database that version 1 made."""
    if request.param == "sqlite":
        with sqlite3.connect(tmp_path / "votes.db") as connection:
            connection.executescript(V1)
        return str(tmp_path / "votes.db")
    url = request.getfixturevalue("cluster").new_database()
    with sa.create_engine(database_url(url)).begin() as connection:
        for line in statements():
            connection.exec_driver_sql(line.replace("%", "%%"))
    return url


def shape(url):
    """Tables -> columns (type, may it be null), the primary key and the indexes."""
    engine = sa.create_engine(database_url(url))
    inspector = sa.inspect(engine)
    found = {
        table: (
            {each["name"]: (REAL.sub("DOUBLE", str(each["type"])), each["nullable"]) for each in inspector.get_columns(table)},
            sorted(inspector.get_pk_constraint(table)["constrained_columns"]),
            sorted(tuple(each["column_names"]) for each in inspector.get_indexes(table)),
            sorted(tuple(each["column_names"]) for each in inspector.get_unique_constraints(table)),
        )
        for table in inspector.get_table_names()
    }  # fmt: skip
    engine.dispose()
    return found


def test_version_1_becomes_this_one_with_all_that_it_held(old, tmp_path, request):
    with pytest.raises(UserError, match=r"has schema 1, and this rlhf_ray works with schema 3; .*rlhf-ray votes migrate"):
        VoteStore(old, create=True)
    answer = rlhf_ray("votes", "migrate", old)
    assert (answer.returncode, answer.stdout) == (0, "schema 1 -> 3\n"), answer.stderr
    assert migrate(old) == (3, 3)

    store = VoteStore(old, create=True)
    (found,) = read_judgements(store.database)
    assert found.vote == vote("c1", "right", key="k1", seconds=2.0, rating=4, reason="because") and found.judged == "a"
    assert (found.voted_at, found.seconds, found.vote.flag) == (14.0, 2.0, None)
    assert found.comparison.a.seed == 7 and found.comparison.a.sampling == {"temperature": 0.5}
    assert store.database.held_out_share == 0.25  # what was held out stays so
    with store.database.reading() as connection:
        keys = dict(connection.execute(sa.text("SELECT id, prompt_key FROM comparisons")).all())
    prompts = {"c1": "Name a colour.", "c2": [{"role": "user", "content": "Hi"}]}
    assert keys == {id: prompt_key(prompt) for id, prompt in prompts.items()}
    assert held_out_prompts(store.database) == [prompt for prompt in prompts.values() if is_held_out(prompt_key(prompt), 0.25)]

    assert not store.vote(vote("c1", "right", key="k1", rating=4, reason="because")).new  # a retry from before
    assert store.vote(vote("c2", "left", key="k2", flag="rude")).new
    assert store.replace(vote("c1", "tie", key="k3")).new and store.vote(vote(shown(store))).new
    store.close()
    fresh = str(tmp_path / "fresh.db") if "://" not in old else request.getfixturevalue("cluster").new_database()
    VoteStore(fresh, create=True).close()
    assert shape(old) == shape(fresh)


@pytest.mark.parametrize("old", USUALLY_SQLITE, indirect=True)
def test_a_migration_that_fails_changes_nothing(old, monkeypatch):
    def breaks(connection):
        schema._to_2(connection)
        raise UserError("the power went")

    monkeypatch.setitem(schema.STEPS, 1, breaks)
    before = shape(old)
    with pytest.raises(UserError, match="the power went"):
        migrate(old)
    assert shape(old) == before
    monkeypatch.undo()
    assert migrate(old) == (1, 3)


def test_a_newer_schema_is_refused(tmp_path):
    url = str(tmp_path / "votes.db")
    VoteStore(url, create=True).close()
    with sqlite3.connect(url) as connection:
        connection.execute("UPDATE votes_schema SET version = 4")
    for call in (lambda: Database(url), lambda: VoteStore(url, create=True), lambda: migrate(url)):
        with pytest.raises(UserError, match=r"votes.db has schema 4, made by a newer rlhf_ray, .* up to 3; install the newer one"):
            call()
    assert rlhf_ray("votes", "summary", url).returncode == 2


def test_many_that_open_a_new_database_at_once_make_it_once(request, tmp_path):
    for url in (str(tmp_path / "votes.db"), request.getfixturevalue("cluster").new_database()):
        shares, start = [], threading.Barrier(6)

        def open_it(place, url=url, shares=shares, start=start):
            start.wait(30)
            store = VoteStore(url, create=True, held_out_share=place / 10)
            shares.append(store.database.held_out_share)
            store.close()

        threads = [threading.Thread(target=open_it, args=[place]) for place in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(shares) == 6 and len(set(shares)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a/votes.db", "sqlite:////a/votes.db"),
        ("sqlite:////a/votes.db", "sqlite:////a/votes.db"),
        ("postgres://ann@host/votes", "postgresql+psycopg://ann@host/votes"),
        ("postgresql://host:5433/votes", "postgresql+psycopg://host:5433/votes"),
    ],
)
def test_paths_and_urls(text, expected):
    assert str(database_url(text)) == expected


def test_a_relative_path_is_under_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("votes.db", "sqlite:///votes.db"):
        assert name_of(database_url(text)) == str(tmp_path / "votes.db")


def test_a_password_is_not_shown():
    assert name_of(database_url("postgresql://ann:secret@host/votes")) == "postgresql://ann:***@host/votes"
    with pytest.raises(UserError) as refused:
        database_url("mysql://ann:secret@host/votes")
    assert "secret" not in str(refused.value) and "PostgreSQL" in str(refused.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("{here}/no.db", "there is no database of votes at '{here}/no.db'; correct the name"),
        ("{here}/text.db", "text.db can't be opened as a database of votes (file is not a database)"),
        ("{here}", "'{here}' is a folder, and votes are kept in a file; name one, for example {here}/votes.db"),
        ("{here}/other.db", "other.db holds no votes: it has no table 'votes_schema'"),
        ("{here}/empty.db", "empty.db holds no votes"),
        ("sqlite://", "names no file"),
        ("", "give a file, for example votes.db"),
        ("mysql://host/votes", "is of the kind 'mysql'; votes are kept in a SQLite file"),
        ("postgresql://host:port/votes", "is no database URL"),
        ("postgresql://votes@/nothing?host={here}", "can't be opened as a database of votes (connection"),
    ],
)
def test_what_can_not_be_opened_is_said_in_words(tmp_path, url, words):
    (tmp_path / "text.db").write_text("not a database at all, but a text that is long enough for a header" * 20)
    (tmp_path / "empty.db").touch()
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE votes (x)")
    url, words = url.replace("{here}", str(tmp_path)), words.replace("{here}", str(tmp_path))
    for command in (["votes", "summary", url], ["votes", "export", url, str(tmp_path / "out.jsonl")], ["votes", "migrate", url]):
        answer = rlhf_ray(*command)
        assert answer.returncode == 2 and words in answer.stderr, answer.stderr
        assert "Traceback" not in answer.stderr and not (tmp_path / "out.jsonl").exists()


def test_a_table_of_something_else_is_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE votes (x)")
    with pytest.raises(UserError, match="holds a table 'votes' of something else"):
        VoteStore(str(tmp_path / "other.db"), create=True)
    with pytest.raises(UserError, match="there is no folder"):
        VoteStore(str(tmp_path / "nowhere" / "votes.db"), create=True)


def test_postgresql_without_its_driver_names_the_extra(monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("No module named 'psycopg'")

    monkeypatch.setattr(database.sa, "create_engine", missing)
    with pytest.raises(UserError, match=re.escape("pip install 'psycopg[binary]'")):
        Database("postgresql://host/votes")


def test_a_store_outlives_a_connection_that_postgresql_ended(cluster):
    store = VoteStore(cluster.new_database(), create=True)
    id = shown(store)
    with store.database.reading() as connection:
        mine = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar()
    cluster._sql(f"SELECT pg_terminate_backend({mine})")
    assert store.vote(vote(id)).new
    store.close()


def test_the_share_is_held_out_by_the_words_alone():
    """A prompt's place is the first 16 hex digits of its key, of 2^64: worked out here for the ends and the middle."""
    assert is_held_out("0" * 64, 0.1) and not is_held_out("f" * 64, 0.99) and not is_held_out("0" * 64, 0.0)
    assert is_held_out("7" + "f" * 63, 0.5) and not is_held_out("8" + "0" * 63, 0.5)
    held = sum(is_held_out(prompt_key(f"Question {number}?"), 0.1) for number in range(5000))
    assert abs(held - 500) < 4 * (5000 * 0.1 * 0.9) ** 0.5  # four deviations of a binomial


def test_prompts_held_out_are_told_apart_from_the_others(tmp_path):
    store = VoteStore(str(tmp_path / "votes.db"), create=True, held_out_share=0.5)
    prompts = [f"Question {number}?" for number in range(40)]
    for prompt in prompts:
        for _ in range(2):  # both comparisons of a prompt are on one side
            store.vote(vote(shown(store, prompt=prompt)))
    held = held_out_prompts(store.database)
    assert json.dumps(held) and 8 <= len(held) <= 32 and set(held) < set(prompts)
    train, held_out, both = (
        {each.comparison.prompt for each in read_judgements(store.database, part=part)} for part in ("train", "held_out", "all")
    )
    assert (train, held_out, both) == (set(prompts) - set(held), set(held), set(prompts))

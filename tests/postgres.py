"""A PostgreSQL cluster of the tests' own: in a folder of temporary files, on a socket there, as another user where we are root."""

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

NUMBERS = itertools.count()

#: `params` where PostgreSQL is to say what SQLite says, and what counts once is tested on both elsewhere
USUALLY_SQLITE = ["sqlite", pytest.param("postgresql", marks=pytest.mark.thorough)]


def program(name):
    """The newest that Debian installed, or the one on the path; None without PostgreSQL."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    return str(found[-1]) if found else shutil.which(name)


def other_user():
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


class Cluster:
    """databases(): the URL of a new, empty database of this running cluster."""

    def __init__(self, folder, user):
        self.folder, self.user = folder, user
        self.process = None

    def start(self):
        run = {"user": self.user, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}, "cwd": self.folder}
        initdb = [program("initdb"), "-D", f"{self.folder}/data", "-A", "trust", "-U", "votes", "-E", "UTF8", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, **run)
        command = [program("postgres"), "-D", f"{self.folder}/data", "-k", self.folder, "-c", "listen_addresses=", "-c",
                   "fsync=off"]  # fmt: skip
        with open(f"{self.folder}/log", "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **run)
        deadline = time.monotonic() + 30
        while True:
            try:
                return self._sql("SELECT 1")
            except Exception:
                assert self.process.poll() is None and time.monotonic() < deadline, Path(self.folder, "log").read_text()
                time.sleep(0.05)

    def url(self, name="postgres"):
        return f"postgresql://votes@/{name}?host={self.folder}"

    def new_database(self):
        name = f"votes{next(NUMBERS)}"
        self._sql(f"CREATE DATABASE {name}")
        return self.url(name)

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(timeout=30)

    def _sql(self, line):
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(line)


@pytest.fixture(scope="session")
def cluster():
    """Skips by name what is not there."""
    pytest.importorskip("psycopg")
    if program("initdb") is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    user = other_user()
    if os.geteuid() == 0 and user is None:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")
    folder = tempfile.mkdtemp(prefix="votes-")
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    running = Cluster(folder, user)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)

"""Processes that vote: forks of one that has imported the store, so that each starts at once, and can be killed alone."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
from processes import descendants


class Voter:
    """A running process; what it reads and prints are lines of `stdin` and `stdout`."""

    def __init__(self, pid, inbox, outbox):
        self.pid, self.stdin, self.stdout = pid, open(inbox, "w"), open(outbox)  # noqa: SIM115 - open as long as the process

    def kill(self):
        """-> whether it had not ended yet."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def ask(self, line):
        self.stdin.write(f"{line}\n")
        self.stdin.flush()


@pytest.fixture(scope="session")
def voters(tmp_path_factory):
    """start(role, *arguments) -> Voter, where the role is a function below."""
    folder = tmp_path_factory.mktemp("voters")
    parent = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    started = []

    def start(role, *arguments):
        pipes = [str(folder / f"{len(started)}.{name}") for name in ("in", "out")]
        for pipe in pipes:
            os.mkfifo(pipe)
        parent.stdin.write(json.dumps([role, *pipes, *arguments]) + "\n")
        parent.stdin.flush()
        started.append(Voter(int(parent.stdout.readline()), *pipes))
        return started[-1]

    yield start
    for pid in descendants(parent.pid):  # those that a failed test left
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for voter in started:
        with contextlib.suppress(BrokenPipeError):  # of what a killed one has not read
            voter.stdin.close()
        voter.stdout.close()
    parent.communicate(timeout=60)


def on_request(url, name):
    """Lines '<comparison> <choice>' in; 'votes', and what became of it, out."""
    store = VoteStore(url)
    print("ready", flush=True)
    for line in sys.stdin:
        id, choice = line.split()
        print("votes", flush=True)
        try:
            print("new" if store.vote(vote(id, choice, key=id + name)).new else "again", flush=True)
        except VoteRefused:
            print("refused", flush=True)


def killed(url, id, when):
    """Ends by SIGKILL before or after the commit; either way the answer never leaves."""
    store = VoteStore(url)
    if when == "before":
        sa.event.listen(sa.Engine, "commit", lambda connection: os.kill(os.getpid(), signal.SIGKILL))
    receipt = store.vote(vote(id, key="click"))
    os.kill(os.getpid(), signal.SIGKILL)
    print(receipt, flush=True)


def one_after_the_other(url, first, *ids):
    """Votes on the comparisons from the first-th on: '<place> <whether it was new>' out."""
    store = VoteStore(url)
    for place in range(first, len(ids)):
        print(place, store.vote(vote(ids[place], key=f"click {place}")).new, flush=True)


def main():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        role, inbox, outbox, *arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(inbox, os.O_RDONLY), 0)  # the parent's pipes end with the parent
            os.dup2(os.open(outbox, os.O_WRONLY), 1)
            sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115 - until the process ends
            globals()[role](*arguments)
            sys.stdout.flush()
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    import sqlalchemy as sa
    from voted import vote

    from rlhf_ray.votes.records import VoteRefused
    from rlhf_ray.votes.store import VoteStore

    main()

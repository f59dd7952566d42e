"""A run that died is submitted again; one that is done, wrong or stopped is not. The cluster is scripted."""

import pytest
from command import rlhf_ray
from tiny import tiny_recipe

from rlhf_ray.actors import resubmit
from rlhf_ray.errors import UserError


class Cluster:
    """What `jobs` and `dashboard` answer: each job ends as the script says, with an exit status or a lost connection."""

    def __init__(self, ends, away=0):
        self.ends, self.away = list(ends), away
        self.submitted, self.said = [], []

    def submit(self, recipe, run_dir, **options):
        self.submitted.append(run_dir)
        return f"tiny-{len(self.submitted)}"

    def logs(self, job_id, **options):
        end = self.ends.pop(0)
        if isinstance(end, str):
            raise UserError(end)
        return end

    def connect(self, address):
        self.away -= 1
        if self.away >= 0:
            raise UserError("no Ray dashboard answers")


@pytest.fixture
def run(monkeypatch):
    def run(ends, retries, away=0):
        cluster = Cluster(ends, away)
        monkeypatch.setattr(resubmit.jobs, "submit", cluster.submit)
        monkeypatch.setattr(resubmit.jobs, "logs", cluster.logs)
        monkeypatch.setattr(resubmit, "connect", cluster.connect)
        monkeypatch.setattr(resubmit, "LOOK_S", 0.0)
        status = resubmit.submit_until_done(tiny_recipe(), "/shared/run", retries=retries, echo=cluster.said.append)
        return status, cluster

    return run


@pytest.mark.parametrize(
    ("ends", "retries", "status", "submissions"),
    [
        ([0], 3, 0, 1),
        ([-9, 1, 0], 3, 0, 3),  # killed; failed; done
        ([2], 3, 2, 1),  # a mistake in the recipe stays one
        ([130], 3, 130, 1),  # somebody stopped it
        ([-9, 2], 3, 2, 2),
        ([-9, -9, -9], 2, -9, 3),
        ([1], 0, 1, 1),
        (["the head is gone", 0], 1, 0, 2),
    ],
)
def test_only_a_run_that_died_is_submitted_again(run, ends, retries, status, submissions):
    found, cluster = run(ends, retries)
    assert (found, cluster.submitted) == (status, ["/shared/run"] * submissions)
    assert sum("submitted again" in line for line in cluster.said) == submissions - 1


def test_a_head_that_comes_back_is_waited_for_and_one_that_does_not_is_said(run, monkeypatch):
    status, cluster = run([-9, 0], 1, away=3)
    assert (status, len(cluster.submitted)) == (0, 2)
    assert sum("waiting up to" in line for line in cluster.said) == 1
    monkeypatch.setattr(resubmit, "HEAD_S", -1.0)
    with pytest.raises(UserError, match="no Ray dashboard answers"):
        run([-9], 1, away=1)
    with pytest.raises(UserError, match="the head is gone"):
        run(["the head is gone"], 0)


def test_retries_need_a_terminal_that_follows():
    answer = rlhf_ray("submit", "demo", "--run-dir", "/shared/x", "--retries", "2", "--no-follow")
    assert answer.returncode == 2 and "--retries 2 needs a terminal that follows" in answer.stderr

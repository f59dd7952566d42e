"""What every test needs before torch, Ray or Hugging Face are imported. None of them is imported here: of the processes of
`pytest -n 2`, the first only hands tests out."""

import functools
import gc
import json
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reads from the hub
os.environ.setdefault("RAY_AUTH_MODE", "token")  # as the command line does; Ray reads it once, when it is imported
os.environ.pop("RAY_ADDRESS", None)  # a cluster that happens to run here is not ours

import pytest
import shared_ray
from differences import table
from leftovers import Before
from postgres import cluster  # noqa: F401 - a fixture
from voters import voters  # noqa: F401 - a fixture
from xdist.scheduler import LoadScopeScheduling


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """The million objects that imports make stay: Python's collector would look at all of them again and again, in imports and
    in tests."""
    if session.config.getoption("numprocesses", None):
        return (yield)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        torch.set_num_threads(1)  # the models are so small that a second thread only costs


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk():
    """No test takes the power away, which is all that a flush is against: what is written stays when a process is killed. Of SQLite
    databases this is said where they are opened; processes that a test starts wait as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        if (database := sys.modules.get("rlhf_ray.votes.database")) is not None:
            prepare = database._prepare_sqlite

            @functools.wraps(prepare)
            def without_flush(connection, record):
                prepare(connection, record)
                connection.execute("PRAGMA synchronous = OFF")

            patch.setattr(database, "_prepare_sqlite", without_flush)
        yield


@pytest.fixture(scope="module")
def session():
    """A Ray that runs: the one that several files share."""
    shared_ray.start()


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory):
    """`chaos.Ended` of a tiny run of PPO on the shared Ray, which several files compare theirs with."""
    from chaos import Ended
    from tiny import tiny_recipe, write_start

    from rlhf_ray.runs.run_folder import RunFolder

    shared_ray.start()
    ended = Ended(write_start(tiny_recipe(), RunFolder(tmp_path_factory.mktemp("undisturbed"))))
    stage = ended.folder.stage("ppo")
    stage.path.mkdir()
    stage.metrics.write_text(json.dumps({"step": 0, "eval/score": 99.0}) + "\n")  # of one that died before its first checkpoint
    ended.run(tiny_recipe())
    return ended


@pytest.fixture(scope="module")
def faults_file(session):
    """The file in which a test names the faults of the shared Ray's actors; this process notes its steps beside it."""
    from rlhf_ray.actors import faults

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faults.VARIABLE, str(shared_ray.faults_file()))
        yield shared_ray.faults_file()
    shared_ray.faults_file().unlink(missing_ok=True)


@pytest.fixture(scope="module", autouse=True)
def end_of_the_shared_ray(request):
    """Before a file that does not use it: a process has one Ray at a time."""
    if request.path.name not in SHARED_RAY[1:]:  # the first starts Rays of its own, too
        shared_ray.end()


@pytest.fixture(autouse=True)
def nothing_left_by_a_test(request):
    """Else the tests after it would depend on it."""
    before = Before(starts_ray=starts_ray(request.node))
    yield
    fail_for(request.node.nodeid, before.left())


@pytest.fixture(scope="module", autouse=True)
def nothing_left_by_a_file(request, end_of_the_shared_ray):
    """Neither by the fixtures that its tests share."""
    before = Before(starts_ray=starts_ray(request.node))
    yield
    fail_for(request.node.nodeid, before.left())


def starts_ray(node) -> bool:
    return node.get_closest_marker("ray") is not None or node.path.name in GROUPS["ray"]


def fail_for(where, left):
    if left:
        pytest.fail(f"{where} leaves changed: {'; '.join(left)}", pytrace=False)


def pytest_sessionfinish():
    shared_ray.end()


def pytest_addoption(parser):
    parser.addoption("--differences", action="store_true", help="print the largest difference of each invariance")


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--differences"):
        terminalreporter.section("largest difference of each invariance")
        for line in table():
            terminalreporter.write_line(line)


# The first starts Rays of its own before it shares.
SHARED_RAY = ("test_bench_commands.py", "test_supervised.py", "test_not_finite_ray.py", "test_ppo_ray.py", "test_recovery.py",
              "test_recovery_stages.py")  # fmt: skip
GROUPS = {
    # Two Rays at once would slow each other down.
    "ray": ("test_addresses.py", "test_cluster.py", "test_demo.py", "test_forked_workers.py", "test_monitoring.py",
            "test_placement.py", "test_private_run.py", "test_ray_output.py", "test_ray_start.py", "test_several_models.py",
            "test_serving.py", "test_serving_faults.py", "test_swap.py", "test_takeover_handles.py", "test_weight_transport.py",
            *SHARED_RAY),
    # Forks of one process (`ranks`).
    "ranks": ("test_deepspeed_engine.py", "test_not_finite_ranks.py", "test_trained_deepspeed.py", "test_supervised_training.py",
              "test_supervised_resume.py", "test_frozen.py", "test_dpo_stage.py"),
    # One PostgreSQL.
    "postgresql": ("test_votes.py", "test_votes_schema.py", "test_votes_raters.py"),
}  # fmt: skip
#: Each takes tens of seconds: none of them begins when the others are done.
LONG = ("test_single_process.py", "test_truncated_sampling.py", "test_update.py", "test_trained_updates.py", "test_forking.py",
        "test_generation.py", "test_invariance.py", "test_run_in_store.py")  # fmt: skip
ORDER = [*(file for files in GROUPS.values() for file in files), *LONG]


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0].rpartition("/")[2]


def pytest_collection_modifyitems(items):
    """The longest groups first, so that both processes end at about the same time; within them as they stand there."""
    places = {file: place for place, file in enumerate(ORDER)}
    items.sort(key=lambda item: places.get(file_of(item.nodeid), len(places)))


class Groups(LoadScopeScheduling):
    """`make test` has two processes. Each takes file after file, and the files of a group together."""

    def _split_scope(self, nodeid: str) -> str:
        file = file_of(nodeid)
        return next((group for group, files in GROUPS.items() if file in files), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False
    return Groups(config, log)

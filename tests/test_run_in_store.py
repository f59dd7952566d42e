"""Run folders in a store (memory:// and file://): what the store holds at any moment, and what a run and its readers make of it."""

import json
import os
import shutil
import sys
import threading
import time
import uuid
from contextlib import suppress

import pytest
from command import rlhf_ray
from stores import Crash, Crashing, Toy, look_until_level, mirror_of, tree

from rlhf_ray.errors import RunFailed, UserError
from rlhf_ray.runs import remote
from rlhf_ray.runs.contents import CONTENTS, Contents, is_live
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.fetching import fetch_run, read_contents
from rlhf_ray.runs.lease import Lease, LeaseLost
from rlhf_ray.runs.remote import in_store, local_copy
from rlhf_ray.runs.remote_store import StorageAway, Store
from rlhf_ray.runs.run_folder import COPIES, RunFolder, working_copy
from rlhf_ray.runs.sealed import damaged_files, sealed
from rlhf_ray.runs.troubles import Troubles


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    monkeypatch.setenv(COPIES, str(tmp_path / "copies"))


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    """Of a store that nobody has used."""
    return f"memory:///{uuid.uuid4().hex}/run" if request.param == "memory" else f"file://{tmp_path}/store/run"


@pytest.fixture
def memory():
    return f"memory:///{uuid.uuid4().hex}/run"


def run_at(url):
    return RunFolder(working_copy(url), url)


def story(run):
    """A run of some steps; after each piece the caller may look."""
    run.model("sft/model", 1)
    run.done("sft")
    yield
    (run.path / "ppo").mkdir()
    for step in (1, 2, 3):
        run.step(step)
        yield
        if step in (1, 3):
            run.model("ppo/best", step)
        yield
    run.model("ppo/model", 3)
    run.done("ppo")
    yield


def test_a_deleted_copy_comes_back_from_the_store_byte_by_byte(url):
    folder = run_at(url)
    with in_store(folder, 20, every_s=0.05):
        for _ in story(Toy(folder.path)):
            time.sleep(0.02)
        there = tree(folder.path)
    shutil.rmtree(folder.path)
    with in_store(folder, 20):
        assert tree(folder.path) == there
    assert sorted(there) == sorted(read_contents(Store(url)).files)


def test_a_crash_after_any_change_of_the_store_leaves_a_run_that_can_go_on(memory, tmp_path, monkeypatch):
    """At each of the changes that a run's uploads consist of, in turn, the process dies. What another host then fetches is what the
    run's own disk might have held: only whole checkpoints and models, all of one step each, and no DONE without its model."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    crashed, number, newest = True, -1, 0
    while crashed:
        number, crashed = number + 1, False
        url = f"{memory}{number}"
        store = Crashing(url)
        store.changes = number
        run = Toy(tmp_path / f"run{number}")
        try:
            mirror = mirror_of(run.path, store)
            for _ in story(run):
                look_until_level(mirror)
        except Crash:
            crashed = True
        copy = tmp_path / f"copy{number}"
        if read_contents(Store(url)) is None:
            assert number < 6, "the list of contents comes soon"
            continue
        fetch_run(Store(url), copy)
        for folder in sealed(copy / "ppo" / "checkpoints", "step_*"):
            assert damaged_files(folder, "state.json") == []
            step = int(folder.name[-6:])
            assert (folder / "policy.safetensors").read_text() == f"policy.safetensors of step {step}"
            rows = [json.loads(line)["step"] for line in (copy / "ppo/metrics.jsonl").read_text().splitlines()]
            assert step in rows, "a run that goes on drops later rows, but can't make earlier ones"
            newest = max(newest, step)
        for model in (copy / "sft/model", copy / "ppo/best", copy / "ppo/model"):
            if model.exists():
                steps = {path.read_text().rpartition(" ")[2] for path in model.iterdir()}
                assert (len(steps), len(list(model.iterdir()))) == (1, 2), f"{model} after {number} changes"
        for stage in ("sft", "ppo"):
            assert not (copy / stage / "DONE").exists() or (copy / stage / "model").exists()
        shutil.rmtree(run.path)
    assert (number > 30, newest) == (True, 3)


def test_what_a_crash_left_unnamed_goes_with_the_next_run_and_nothing_else_does(memory, tmp_path):
    run = Toy(tmp_path / "run")
    list(zip(range(4), story(run), strict=False))
    look_until_level(mirror_of(run.path, Store(memory)))
    store = Store(memory)
    for name in ("ppo/checkpoints/step_000009/state.json", "sft/model/config.json~0123abcd", "somebody/elses.txt"):
        store.write(name, b"x", 1)
    mirror = mirror_of(run.path, store)
    look_until_level(mirror)
    assert "somebody/elses.txt" in store.names()
    assert [name for name in store.names() if name not in read_contents(store).files] == [CONTENTS, "somebody/elses.txt"]


def two_checkpoints(memory, tmp_path):
    """(a run whose store has both, the store)"""
    run, store = Toy(tmp_path / "run"), Store(memory)
    (run.path / "ppo").mkdir()
    for step in (1, 2):
        run.step(step, keep=2)
    look_until_level(mirror_of(run.path, store))
    return run, store


def test_the_newest_checkpoint_is_fetched_and_the_one_before_it_where_that_is_damaged(memory, tmp_path):
    run, store = two_checkpoints(memory, tmp_path)
    copy, told = tmp_path / "copy", []
    fetch_run(store, copy, told.append)
    assert [path.name for path in sealed(copy / "ppo/checkpoints", "step_*")] == ["step_000002"]
    assert told == []
    store.write("ppo/checkpoints/step_000002/policy.safetensors", b"policy.safetensors of step 3", 1)
    other = tmp_path / "other"
    fetch_run(store, other, told.append)
    assert [path.name for path in sealed(other / "ppo/checkpoints", "step_*")] == ["step_000001"]
    assert "ppo/checkpoints/step_000002 is damaged" in told[0] and "policy.safetensors" in told[0]


def test_an_older_checkpoint_that_was_not_fetched_stays_in_the_store_until_there_is_a_newer_one(memory, tmp_path):
    run, store = two_checkpoints(memory, tmp_path)
    run.path = tmp_path / "elsewhere"
    fetch_run(store, run.path)
    mirror = mirror_of(run.path, store)
    look_until_level(mirror)
    held = {name.split("/")[2] for name in read_contents(store).files if "checkpoints" in name}
    assert held == {"step_000001", "step_000002"}
    run.step(3, keep=2)
    look_until_level(mirror)
    held = {name.split("/")[2] for name in store.names() if "checkpoints" in name}
    assert held == {"step_000002", "step_000003"}


def test_a_damaged_model_is_refused_by_name(memory, tmp_path):
    run, store = Toy(tmp_path / "run"), Store(memory)
    run.model("sft/model", 1)
    look_until_level(mirror_of(run.path, store))
    store.write("sft/model/model.safetensors", b"half", 1)
    with pytest.raises(RunFailed, match=r"sft/model/model.safetensors in memory:.*SHA-256"):
        local_copy(memory)
    assert not (remote.reading_copy(memory) / "sft/model/model.safetensors").exists()


class Away(Store):
    """Takes nothing while `away`."""

    away = True

    def _whole(self, name, write):
        if self.away:
            raise OSError("503 Slow Down")
        super()._whole(name, write)


def test_a_storage_that_is_away_stops_nobody_is_told_and_gets_everything_later(memory, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_ray.runs.remote_store.FIRST_PAUSE_S", 0.01)
    run, events, told = Toy(tmp_path / "run"), EventLog(tmp_path / "run" / "events.jsonl"), []
    store = Away(memory, Troubles(events.add, told.append, quiet_s=0.0))
    mirror = mirror_of(run.path, store, every_s=0.02, file_deadline_s=0.05)
    monkeypatch.setattr("rlhf_ray.runs.mirror.LIVE_DEADLINE_S", 0.05)
    mirror.start()
    try:
        run.model("sft/model", 1)
        began = time.monotonic()
        missing = mirror.finish(0.5)
        assert 0.4 < time.monotonic() - began < 10
        assert "not yet in memory:" in missing and "sft/model" in missing and "503 Slow Down" in missing
        assert str(run.path) in missing
        assert read_contents(Store(memory)) is None, "nothing that is not whole"
        store.away = False
        assert mirror.finish(20) is None
        assert mirror.finish(20) is None
    finally:
        mirror.close()
    assert read_contents(Store(memory)).files.keys() == tree(run.path).keys()
    first, last = [(event["what"], event["done"]) for event in events.read()][:2]
    assert "failed: 503 Slow Down" in first[0] and "tried again" in first[1]
    assert "answers again" in last[0] and "failed tries" in last[1]


def test_a_try_that_fails_is_made_again_with_growing_pauses_until_the_deadline(memory, monkeypatch):
    """0.5 s, 1 s, 2 s, 4 s: after 7.5 s another pause of 8 s would be over the deadline of 10 s."""
    pauses, now = [], [0.0]

    class Waits:
        def wait(self, seconds):
            pauses.append(seconds)
            now[0] += seconds
            return False

    store = Store(memory)
    store._given_up = Waits()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def fails():
        raise OSError("500 Internal Error")

    with pytest.raises(StorageAway, match=r"reading x at memory:.* failed 5 times in 8 s: 500 Internal Error"):
        store.tried("reading x", fails, 10)
    assert pauses == [0.5, 1, 2, 4]


def test_the_copy_that_is_newer_counts(memory):
    """What was not uploaded is not lost on the host that has it; where the run went on elsewhere, that counts."""
    folder = run_at(memory)
    with in_store(folder, 20):
        Toy(folder.path)
    (folder.path / "late.json").write_text("not uploaded")
    with in_store(folder, 20):
        assert (folder.path / "late.json").exists()
    elsewhere = RunFolder(folder.path.with_name("elsewhere"), memory)
    with in_store(elsewhere, 20):
        assert (elsewhere.path / "late.json").read_text() == "not uploaded"
        (elsewhere.path / "later.json").write_text("of another host")
        (elsewhere.path / "late.json").unlink()
    with in_store(folder, 20):
        assert tree(folder.path) == tree(elsewhere.path)
        assert (folder.path / "later.json").exists() and not (folder.path / "late.json").exists()


def test_a_store_that_was_emptied_begins_anew_and_the_copy_is_kept_aside(memory):
    folder, told = run_at(memory), []
    with in_store(folder, 20):
        Toy(folder.path)
    store = Store(memory)
    for name in store.names():
        store.remove(name, 1)
    with in_store(folder, 20) as stored:
        stored.tells(told.append)
        assert tree(folder.path) == {}
    (aside,) = folder.path.parent.glob(f"{folder.path.name}-*")
    assert (aside / "recipe.yaml").exists() and str(aside) in told[0]


def test_two_runs_never_work_in_one_folder_and_a_dead_one_is_succeeded(memory):
    one, two, patient = (Lease(Store(memory), stands_still_s=seconds) for seconds in (0.5, 0.5, 60.0))
    one.take()
    ended = threading.Event()

    def living():
        while not ended.wait(0.05):
            one.renew(1)

    beating = threading.Thread(target=living)
    beating.start()
    with pytest.raises(UserError, match="is in use by process"):
        patient.take()
    ended.set()
    beating.join()
    two.take()  # the first has stood still for half a second
    with pytest.raises(LeaseLost, match="works in memory:"):
        one.renew(1)
    one.release(1)
    two.renew(1)  # the first has not taken the second's away
    two.release(1)
    assert Store(memory).names() == []


def test_a_run_whose_place_was_taken_uploads_nothing_more_and_ends(memory):
    folder = run_at(memory)
    with pytest.raises(RunFailed, match="this run was away for too long"), in_store(folder, 20, every_s=0.02) as stored:
        Toy(folder.path)
        stored.finish(20)
        for _ in range(500):
            with suppress(UserError):  # as the run has just renewed its own
                Lease(Store(memory), stands_still_s=0.0).take()
            time.sleep(0.05)
            stored.check()
    (folder.path / "after.json").write_text("x")
    assert "after.json" not in read_contents(Store(memory)).files


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("s3://key:secret@bucket/run", "holds a user or a key"),
        ("memory://", "names no folder"),
        ("nosuch://bucket/run", "is of no kind that is known"),
        ("simplecache::memory://a/b", "is a chain"),
    ],
)
def test_urls_that_can_not_be_opened_are_refused_in_words(given, says):
    with pytest.raises(UserError, match=says) as refused:
        Store(given)
    assert "secret" not in str(refused.value)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"needs the package s3fs on every node.*rlhf-ray\[s3\]"):
        Store("s3://bucket/run")


def test_a_name_that_leaves_the_folder_is_refused():
    """The list of contents is another's: nobody who can write it may write elsewhere on this machine."""
    entry = {"size": 1, "sha256": "", "modified": 0, "key": "k"}
    text = json.dumps({"format": 1, "session": "x", "files": {"../../.bashrc": entry}})
    with pytest.raises(RunFailed, match="damaged"):
        Contents.from_json(text.encode(), "memory://x/y")


def test_which_files_are_overwritten_in_place():
    live = ("status.json", "ppo/metrics.jsonl", "events.jsonl", "logs/ray.log", "sft/tensorboard/events.out", "recipe.yaml")
    settled = ("sft/DONE", "ppo/model/config.json", "ppo/checkpoints/step_000002/state.json", "evaluation/summary.json")
    assert [name for name in live + settled if is_live(name)] == list(live)


def test_status_report_and_doctor_read_from_the_store(memory, tmp_path):
    folder = run_at(memory)
    with in_store(folder, 20):
        for _ in story(Toy(folder.path)):
            pass
        EventLog(folder.events).add("reward actor 1 died", "made again", 2.0, role="reward")
    shutil.rmtree(folder.path)
    told = rlhf_ray("status", memory)
    assert "checkpoint  ppo/checkpoints/step_000003" in told.stdout and "restarts    reward 1" in told.stdout
    assert not list((tmp_path / "copies").rglob("*.safetensors")), "no weights are fetched to tell a state"
    told = rlhf_ray("report", memory)
    assert f"{memory}/report.html" in told.stdout
    assert b"reward actor 1 died" in Store(memory).read("report.html")
    assert (local_copy(memory) / "report.html").exists()
    missing = rlhf_ray("status", memory + "-of-nobody")
    assert (missing.returncode, "holds no run" in missing.stderr) == (2, True)


def test_a_folder_of_a_run_in_a_store_is_fetched_alone(memory):
    folder = run_at(memory)
    with in_store(folder, 20):
        for _ in story(Toy(folder.path)):
            pass
    model = local_copy(f"{memory}/ppo/best")
    assert (model / "model.safetensors").read_text() == "model.safetensors of step 3"
    top = remote.reading_copy(memory)
    assert sorted(tree(top)) == ["ppo/best/config.json", "ppo/best/model.safetensors", "recipe.yaml"]
    checkpoint = local_copy(f"{memory}/ppo/checkpoints/step_000003")
    assert damaged_files(checkpoint, "state.json") == []
    assert (top / "sft/model/config.json").exists(), "what a model is made of with the checkpoint's weights"
    with pytest.raises(UserError, match="has no ppo/none"):
        local_copy(f"{memory}/ppo/none")


def test_serve_and_export_take_the_url(memory, tmp_path, monkeypatch):
    """Up to the functions that load the model, which get a folder of this machine."""
    folder, given = run_at(memory), []
    with in_store(folder, 20):
        for _ in story(Toy(folder.path)):
            pass
    shutil.rmtree(folder.path)
    monkeypatch.setattr("rlhf_ray.serving.launch.serve", lambda path, **options: given.append((path, options["name"])))
    monkeypatch.setattr("rlhf_ray.ppo.export_model.export_model", lambda source, *rest: given.append((source, rest[1])))
    assert rlhf_ray("export", memory, str(tmp_path / "model"), "--stage", "best").returncode == 0
    top = remote.reading_copy(memory)
    assert given.pop() == (top, "best")
    weights = [name for name in tree(top) if name.endswith(".safetensors")]
    assert weights == ["ppo/best/model.safetensors"], "no other model's weights are fetched"
    for url, path, name in ((memory, top, "run"), (f"{memory}/ppo/model", top / "ppo/model", "run-ppo")):
        assert rlhf_ray("serve", url).returncode == 0
        assert given.pop() == (path, name)
    assert (top / "sft/model/model.safetensors").exists() and not (top / "ppo/checkpoints").exists()

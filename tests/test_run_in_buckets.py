"""Run folders in object stores, on servers on this machine, behind a proxy that kills, slows and fails them.

S3: moto's server. Google Cloud Storage: gcp-storage-emulator, which the client library reaches as it would reach Google's.
"""

import json
import os
import shutil
import socket
import threading
import time
import urllib.request
import uuid

import pytest
from faulty_proxy import FaultyProxy
from stores import Toy, look_until_level, mirror_of, tree

from rlhf_ray.errors import UserError
from rlhf_ray.runs import remote_store as stores
from rlhf_ray.runs.contents import Contents
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.fetching import fetch_run, read_contents
from rlhf_ray.runs.remote import in_store, local_copy
from rlhf_ray.runs.remote_store import Store
from rlhf_ray.runs.run_folder import COPIES, RunFolder, working_copy
from rlhf_ray.runs.troubles import Troubles

MB = 1024**2
PART_BYTES = 5 * MB  # the least that S3 takes


class S3:
    protocol = "s3"
    environment = {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere", "AWS_CONFIG_FILE": "/nowhere",
    }  # fmt: skip
    address = "AWS_ENDPOINT_URL"

    def __init__(self):
        pytest.importorskip("s3fs", reason="needs the extra 's3': pip install s3fs")
        moto = pytest.importorskip("moto.server", reason="needs moto's S3 server: pip install 'moto[server]'")
        self.server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def make(self, bucket):
        import fsspec

        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)

    def stop(self):
        self.server.stop()


class GoogleCloud:
    protocol = "gs"
    environment = {"GOOGLE_CLOUD_PROJECT": "testing", "NO_GCE_CHECK": "true"}  # no search for a key on this machine
    address = "STORAGE_EMULATOR_HOST"

    def __init__(self):
        pytest.importorskip("gcsfs", reason="needs the extra 'gs': pip install gcsfs")
        emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs pip install gcp-storage-emulator")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.server = emulator.create_server("127.0.0.1", self.port, in_memory=True)
        self.server.start()

    def make(self, bucket):
        urllib.request.urlopen(
            urllib.request.Request(
                f"http://127.0.0.1:{self.port}/storage/v1/b?project=testing", json.dumps({"name": bucket}).encode(),
                {"Content-Type": "application/json"},
            )
        ).close()  # fmt: skip

    def stop(self):
        self.server.stop()


@pytest.fixture(scope="module", params=[S3, GoogleCloud], ids=lambda kind: kind.protocol)
def cloud(request):
    running = request.param()
    yield running
    running.stop()


@pytest.fixture
def proxy(cloud, tmp_path, monkeypatch):
    between = FaultyProxy(cloud.port)
    own = {cloud.address: between.url, COPIES: str(tmp_path / "copies"), "NO_PROXY": "127.0.0.1"}
    for name, value in (cloud.environment | own).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stores, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(stores, "FIRST_PAUSE_S", 0.05)
    yield between
    between.close()


@pytest.fixture
def url(cloud, proxy):
    """Of a bucket that nobody has used."""
    bucket = f"b{uuid.uuid4().hex}"
    cloud.make(bucket)
    return f"{cloud.protocol}://{bucket}/runs/toy"


def large_model(run, step, size=11 * MB):
    run.model("ppo/best", step, os.urandom(size))


def test_a_run_goes_there_in_parts_and_comes_back(url):
    folder = RunFolder(working_copy(url), url)
    with in_store(folder, 60, every_s=0.1):
        run = Toy(folder.path)
        large_model(run, 1)
        for step in (1, 2, 3):
            run.step(step)
        there = tree(folder.path)
    shutil.rmtree(folder.path)
    with in_store(folder, 60):
        assert tree(folder.path) == there
    assert tree(local_copy(f"{url}/ppo/best")) == {
        name.removeprefix("ppo/best/"): digest for name, digest in there.items() if name.startswith("ppo/best/")
    }


def test_a_server_that_dies_in_the_middle_of_an_upload_costs_nothing_but_time(url, cloud, proxy, tmp_path, monkeypatch):
    """Killed after 8 of 11 MB. Before: the old policy, whole. Meanwhile: the same, and the run goes on. Afterwards: the new one."""
    monkeypatch.setattr("rlhf_ray.runs.mirror.LIVE_DEADLINE_S", 0.5)
    run, told = Toy(tmp_path / "run"), []
    store = Store(url, Troubles(EventLog(run.path / "events.jsonl").add, told.append, quiet_s=0.0))
    mirror = mirror_of(run.path, store, every_s=0.05, file_deadline_s=60)
    mirror.start()
    try:
        run.model("ppo/best", 1)
        assert mirror.finish(60) is None
        proxy.cut_after = 8 * MB
        large_model(run, 2)
        run.step(2)
        missing = mirror.finish(3)
        assert proxy.dead and "ppo/best" in missing and f"not yet in {cloud.protocol}://" in missing
        run.step(3)
        between = tmp_path / "between"
        with monkeypatch.context() as past_the_proxy:
            past_the_proxy.setenv(cloud.address, f"http://127.0.0.1:{cloud.port}")
            fetch_run(Store(url), between)
        assert (between / "ppo/best/model.safetensors").read_bytes() == b"model.safetensors of step 1"
        assert not (between / "ppo/checkpoints").exists()
        proxy.mend()
        assert mirror.finish(60) is None
    finally:
        mirror.close()
    copy = tmp_path / "copy"
    fetch_run(Store(url), copy)
    assert tree(copy) == tree(run.path)
    events = [event["what"] for event in EventLog(run.path / "events.jsonl").read()]
    assert any("failed" in what for what in events) and "answers again" in events[-1]


@pytest.mark.parametrize("status", [500, 503])
def test_errors_of_the_server_are_tried_again(url, proxy, tmp_path, status):
    run = Toy(tmp_path / "run")
    events = EventLog(tmp_path / "events.jsonl")
    mirror = mirror_of(run.path, Store(url, Troubles(events.add, pytest.fail, quiet_s=0.0)))
    for step in (1, 2):
        run.model("ppo/best", step)
        run.step(step)
        proxy.status = status
        proxy.kill()  # a connection is kept open; the errors come with new ones
        proxy.mend()
        proxy.errors, proxy.status = 4, status
        look_until_level(mirror)
    copy = tmp_path / "copy"
    proxy.errors = 2
    fetch_run(Store(url), copy)
    assert tree(copy) == tree(run.path)
    assert proxy.refused >= 8 and len(events.read()) >= 2


def test_a_slow_storage_does_not_hold_the_run_up_and_gets_the_newest_checkpoint(url, proxy, tmp_path):
    """Two MB a second for 4 MB: while those go, ten steps are made. Those in between are left out."""
    run = Toy(tmp_path / "run")
    mirror = mirror_of(run.path, Store(url), every_s=0.05)
    mirror.start()
    try:
        proxy.bytes_per_s = 2 * MB
        large_model(run, 1, 4 * MB)
        began = time.monotonic()
        for step in range(1, 11):
            run.step(step)
            time.sleep(0.05)
        made_s = time.monotonic() - began
        assert "ppo/best/model.safetensors" not in (read_contents(Store(url)) or Contents()).files
        assert made_s < 10
        assert mirror.finish(60) is None
    finally:
        mirror.close()
    copy = tmp_path / "copy"
    proxy.mend()
    fetch_run(Store(url), copy)
    assert tree(copy) == tree(run.path)
    assert {path.name for path in (copy / "ppo/checkpoints").iterdir()} == {"step_000010"}


def test_a_download_that_is_cut_off_is_never_taken_for_a_whole_file(url, proxy, tmp_path):
    run = Toy(tmp_path / "run")
    large_model(run, 1)
    look_until_level(mirror_of(run.path, Store(url)))
    copy = tmp_path / "copy"
    proxy.cut_answer_after = 7 * MB
    threading.Timer(0.5, proxy.mend).start()
    fetch_run(Store(url), copy)
    assert tree(copy) == tree(run.path)
    assert proxy.cut_answer_after is None


def test_a_bucket_that_is_not_there_is_said_at_the_start(cloud, proxy, monkeypatch):
    monkeypatch.setattr(stores, "CHECK_DEADLINE_S", 0.2)
    with pytest.raises(UserError, match=rf"{cloud.protocol}://no-such-bucket/run can't be written .*bucket"):
        Store(f"{cloud.protocol}://no-such-bucket/run").check_writable()

"""The storage of `chaos`: moto's S3 server behind a proxy that dies, slows down or answers with errors in the middle of an upload,
when a fault of kind "sign" says so."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy

from rlhf_ray.runs.fetching import fetch_run
from rlhf_ray.runs.remote import in_store
from rlhf_ray.runs.remote_store import Store
from rlhf_ray.runs.run_folder import COPIES, RunFolder, working_copy

LOOK_S = 0.01  # between two looks for signs
EVERY_S = 0.5  # between two looks at the run folder: a tiny run is short
UPLOADED_S = 300.0


def refused() -> str | None:
    """Why there is none here."""
    missing = [name for name in ("moto", "s3fs") if find_spec(name) is None]
    return f"not installed: {' and '.join(missing)} (pip install 'moto[server]' s3fs)" if missing else None


class Storage:
    """A server whose uploads meet faults: what a sign says (`do`) of the next one with such a part in its name (`of`)."""

    def __init__(self, scratch: Path, signs: Path):
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.proxy = FaultyProxy(self._server.get_host_and_port()[1])
        self.environment = {
            "AWS_ENDPOINT_URL": self.proxy.url, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
            "AWS_CONFIG_FILE": "/nowhere", "NO_PROXY": "127.0.0.1", COPIES: str(scratch / "copies"),
        }  # fmt: skip
        self.signs = signs
        self._over = threading.Event()
        self._obeying = threading.Thread(target=self._obey, daemon=True)
        self._obeying.start()

    def bucket(self) -> str:
        """The URL of a run folder that nobody has used."""
        import fsspec

        name = f"b{uuid.uuid4().hex}"
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
        return f"s3://{name}/runs/tiny"

    def take_met(self) -> list[str]:
        """The uploads that met a fault since the last call."""
        met, self.proxy.met = self.proxy.met, []
        return met

    def close(self) -> None:
        self._over.set()
        self._obeying.join()
        self.proxy.close()
        self._server.stop()

    def _obey(self) -> None:
        while not self._over.wait(LOOK_S):
            for sign in sorted(self.signs.glob("*.json")):
                fault = json.loads(sign.read_text())
                sign.unlink()
                self.proxy.meet.append((fault["do"], fault.get("of", "")))


@contextmanager
def storage_with_faults(scratch: Path, faults_file: Path) -> Iterator[Storage]:
    storage = Storage(scratch, faults_file.with_name(f"{faults_file.name}.signs"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in storage.environment.items():
            patch.setenv(name, value)
        try:
            yield storage
        finally:
            storage.close()


def stored_folder(url: str) -> RunFolder:
    """The working copy of a run in the storage, on this machine."""
    return RunFolder(working_copy(url), url)


@contextmanager
def kept_in_store(folder: RunFolder) -> Iterator[RunFolder]:
    """For the body of the `with` the folder is followed by its store, if it has one."""
    with in_store(folder, UPLOADED_S, every_s=EVERY_S) as stored:
        yield folder if stored is None else stored.folder


def as_stored(folder: RunFolder, scratch: Path) -> RunFolder:
    """What the store has of the run: fetched again, without the working copy."""
    assert folder.url is not None
    copy = scratch / f"fetched_{uuid.uuid4().hex[:8]}"
    fetch_run(Store(folder.url), copy)
    return RunFolder(copy)

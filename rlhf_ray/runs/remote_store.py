"""A place for run folders that is no local path: s3://, gs://, file://, memory://, whatever fsspec opens.

Every operation has a name, is tried again with growing pauses until its deadline, and tells whoever listens. What is written
appears whole or not at all: object stores promise that for a put, and elsewhere a file is renamed at the end.
"""

from __future__ import annotations

# fsspec comes without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec  # pyright: ignore[reportMissingTypeStubs]  # it has none

from rlhf_ray.errors import RunFailed, UserError, whole_message

Answer = TypeVar("Answer")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
READ_DEADLINE_S = 120.0  # of a reader at a terminal
CHECK_DEADLINE_S = 10.0  # of the question whether the place can be written at all
PART_BYTES = 16 * 1024**2  # of a file, that are in memory at a time
PARTS_AT_ONCE = 2
#: protocol -> the package that opens it, and our extra that brings it
PACKAGES = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "gcs": ("gcsfs", "gs")}
#: where a put appears whole; elsewhere a file gets its name when it is written
WHOLE_PUTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "memory"})
#: no more tries help
OUR_MISTAKES = (TypeError, AttributeError, NameError, AssertionError)


class StorageAway(RunFailed):
    """An operation was given up at its deadline."""


class Listener(Protocol):
    """Hears of tries that failed, and of operations that are done."""

    def failed(self, name: str, error: str) -> None: ...

    def done(self, name: str) -> None: ...


def is_url(given: object) -> bool:
    return "://" in str(given)


class Store:
    """The files below a URL, by names relative to it ("ppo/model/config.json"). May be used by several threads.

    UserError for a URL that can't be opened here: the package is missing, or it holds a secret.
    """

    def __init__(self, url: str, listener: Listener | None = None):
        self.url = url.rstrip("/")
        self.protocol = check_url(self.url)
        self._fs, self._root = _opened(self.url, self.protocol)
        self._listener = listener
        self._given_up = threading.Event()

    def __truediv__(self, name: str) -> Store:
        return Store(f"{self.url}/{name}", self._listener)

    def give_up(self) -> None:
        """Operations that wait for their next try end now, with StorageAway."""
        self._given_up.set()

    # -- operations -----------------------------------------------------------------------------------------------------

    def read(self, name: str, deadline_s: float = READ_DEADLINE_S) -> bytes | None:
        """None where there is no such file."""

        def read() -> bytes | None:
            try:
                return self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None

        return self.tried(f"reading {name}", read, deadline_s)

    def write(self, name: str, content: bytes, deadline_s: float) -> None:
        self.tried(
            f"writing {name}", lambda: self._whole(name, lambda path: self._fs.pipe_file(path, content)), deadline_s
        )

    def put(self, file: Path, name: str, deadline_s: float) -> None:
        """Upload a file that nobody changes meanwhile. FileNotFoundError where it is gone."""
        size = file.stat().st_size
        # In parts, few at a time: its memory is bounded.
        options = {"chunksize": PART_BYTES} if self.protocol in PACKAGES else {}
        if self.protocol in ("s3", "s3a"):
            options["max_concurrency"] = PARTS_AT_ONCE

        def put() -> None:
            if not file.exists():
                raise FileGone(str(file))
            self._whole(name, lambda path: self._fs.put_file(str(file), path, **options))
            found = self._fs.info(self._path(name))["size"]
            if found != size:
                raise OSError(f"{found} bytes have arrived of {size}")

        self.tried(f"upload of {name}", put, deadline_s)

    def get(self, name: str, file: Path, deadline_s: float) -> str | None:
        """Download to a file -> its SHA-256; None where there is no such file in the store."""

        def get() -> str | None:
            digest = hashlib.sha256()
            try:
                with self._fs.open(self._path(name), "rb", block_size=PART_BYTES) as source, open(file, "wb") as target:
                    while part := source.read(PART_BYTES):
                        digest.update(part)
                        target.write(part)
                    target.flush()
                    os.fsync(target.fileno())
            except FileNotFoundError:
                return None
            return digest.hexdigest()

        return self.tried(f"download of {name}", get, deadline_s)

    def names(self, below: str = "", deadline_s: float = READ_DEADLINE_S) -> list[str]:
        """Of all files, in order."""
        top = self._path(below) if below else self._root

        def names() -> list[str]:
            try:
                return self._fs.find(top)
            except FileNotFoundError:
                return []

        root = self._root.rstrip("/") + "/"
        return sorted(each.removeprefix(root) for each in self.tried(f"listing {below or self.url}", names, deadline_s))

    def remove(self, name: str, deadline_s: float) -> None:
        """It may be gone already."""

        def remove() -> None:
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

        self.tried(f"removing {name}", remove, deadline_s)

    def check_writable(self) -> None:
        """UserError where a small file can't be written, read and removed again, with the cause."""
        name, content = f".written-{uuid.uuid4().hex}", b"rlhf-ray"
        try:
            self.write(name, content, CHECK_DEADLINE_S)
            found = self.read(name, CHECK_DEADLINE_S)
            self.remove(name, CHECK_DEADLINE_S)
        except StorageAway as error:
            raise UserError(
                f"{self.url} can't be written ({whole_message(error.__cause__ or error)}); look at the name of the bucket, the "
                "credentials of this machine, and the address of the service (for S3: AWS_ENDPOINT_URL)"
            ) from error
        if found != content:
            raise UserError(f"{self.url} does not give back what was written there; choose another --run-dir")

    # -- how ------------------------------------------------------------------------------------------------------------

    def tried(self, name: str, operation: Callable[[], Answer], deadline_s: float) -> Answer:
        """What the operation returns, at the latest try. StorageAway when the deadline is over."""
        began, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                answer = operation()
            except (FileGone, *OUR_MISTAKES):
                raise
            except Exception as error:  # fault boundary: the storage; each of its libraries has errors of its own
                pause = min(FIRST_PAUSE_S * 2 ** (tries - 1), LONGEST_PAUSE_S)
                lost = time.monotonic() - began
                if self._listener is not None:
                    self._listener.failed(name, whole_message(error))
                if lost + pause > deadline_s or self._given_up.wait(pause):
                    words = f"{name} at {self.url} failed {tries} times in {lost:.0f} s: {whole_message(error)}"
                    raise StorageAway(words) from error
            else:
                if self._listener is not None:
                    self._listener.done(name)
                return answer

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _whole(self, name: str, write: Callable[[str], Any]) -> None:
        path = self._path(name)
        if self.protocol in WHOLE_PUTS:
            write(path)
            return
        folder, _, last = path.rpartition("/")
        partial = f"{folder}/.{last}.{uuid.uuid4().hex[:8]}.tmp"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            write(partial)
            self._fs.mv(partial, path)
        except BaseException:  # fault boundary: one write; whatever ended it, no half file stays
            if self._fs.exists(partial):
                self._fs.rm_file(partial)
            raise


class FileGone(FileNotFoundError):
    """The local file that was to be uploaded."""


def check_url(url: str) -> str:
    """Its protocol. UserError for what is no URL of a folder, or holds a secret."""
    protocol, _, rest = url.partition("://")
    if "::" in url:
        raise UserError(f"{url!r} is a chain of file systems; give one URL, such as s3://bucket/runs/demo")
    if "@" in rest.partition("/")[0]:
        raise UserError(
            "the URL of the run folder holds a user or a key, which everybody who lists this machine's processes would see; give "
            "it without, and the credentials by the environment or the service's own files"
        )
    if not rest.strip("/"):
        raise UserError(f"{url!r} names no folder; give one, such as s3://bucket/runs/demo or file:///shared/runs/demo")
    return protocol


def _opened(url: str, protocol: str) -> tuple[Any, str]:
    """(fsspec's file system, the URL's path in it)."""
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        # Our own tries have names and are told; a library's would stand still without a word.
        options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 1}}
    try:
        fs: Any = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        package, extra = PACKAGES.get(protocol, (str(error.name or protocol), None))
        remedy = f"pip install {package}" + (f", or: pip install 'rlhf-ray[{extra}]'" if extra else "")
        raise UserError(f"{url} needs the package {package} on every node; install it with: {remedy}") from error
    except ValueError as error:
        raise UserError(
            f"{url!r} is of no kind that is known ({error}); give a path, or s3://, gs://, file:// or memory://"
        ) from error
    if hasattr(fs, "retries"):  # those of some services try again by themselves, and tell nobody
        fs.retries = 1
    if protocol in ("gs", "gcs"):
        _without_its_own_tries(fs)
    return fs, str(fs._strip_protocol(url))


def _without_its_own_tries(fs: Any) -> None:
    """gcsfs sends a request six times, and begins an upload six times with six each: minutes in which nobody is told anything.

    Its attribute `retries` does not reach either. What it would try again is raised as an OSError, which it does not.
    """
    from gcsfs.retry import is_retriable  # pyright: ignore[reportMissingImports]  # an extra

    once = getattr(type(fs)._request, "__wrapped__", None)  # gcsfs's own name: another version may have another
    if once is None:
        return

    async def request(*arguments: Any, **options: Any) -> Any:
        try:
            return await once(fs, *arguments, **options)
        except Exception as error:  # fault boundary: one request; aiohttp, google.auth and gcsfs have errors of their own
            if is_retriable(error):
                raise OSError(whole_message(error)) from error
            raise

    fs._request = request
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what fails is told once, by our own tries

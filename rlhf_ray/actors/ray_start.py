"""The start of a Ray in words and with a deadline, and the files that it needs in a home folder."""

from __future__ import annotations

import logging
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from rlhf_ray.actors.ray_private import node_looked_up_by
from rlhf_ray.errors import RunFailed, UserError

START_S = 300.0  # where no recipe says otherwise
RAYS_OWN_S = 30.0  # that Ray allows its first process
SLACK_S = 15.0
TELL_S = 15.0
ATTEMPTS, TOO_SLOW = 3, "timed out during startup"  # what Ray says where a process of its own was too late

log = logging.getLogger(__name__)


class RayNotThere(RunFailed):
    """Ray began to start and hangs, and nothing ends the call."""

    process_must_end = True


def refuse_second_ray() -> None:
    """UserError where this process uses a Ray already: it has one at a time, and it is not ours to shut down."""
    if ray.is_initialized():
        raise UserError(
            "this process is connected to a Ray already (ray.init was called, or another run goes on in it), and a run starts "
            "one of its own or joins a cluster; call ray.shutdown() first, or run it in a process of its own "
            "(rlhf-ray run RECIPE.yaml --address HOST:PORT joins that Ray's cluster)"
        )


def start_ray(options: dict[str, Any], deadline_s: float = START_S, remedy: str = "") -> Callable[[], None]:
    """ray.init(**options) -> what shuts it down. In a thread, since nothing ends it when it hangs.

    Raises what ray.init raises, RayNotThere past the deadline. remedy: what lengthens the deadline
    """
    refuse_second_ray()
    prepare_home(makes_token=options.get("address") == "local")
    logging.getLogger("ray").setLevel(logging.ERROR)  # it warns that a thread gets no handler of SIGTERM
    started, attempt = time.monotonic(), _Start(options, deadline_s)
    try:
        _wait_for(attempt, started, deadline_s, remedy)
    except (KeyboardInterrupt, SystemExit):
        attempt.abandon()
        raise
    if attempt.error is not None:
        raise attempt.error
    return attempt.shut_down


def _wait_for(attempt: _Start, started: float, deadline_s: float, remedy: str) -> None:
    while not attempt.over.wait(min(TELL_S, max(started + deadline_s - time.monotonic(), 0.0))):
        waited = time.monotonic() - started
        if waited >= deadline_s:
            raise RayNotThere(
                f"Ray did not start within {deadline_s:.0f} s{remedy}; this machine may be too busy, or short of memory or disk: "
                f"see {session_logs()}, then run the same command again"
            )
        log.warning("waiting %.0f s for Ray to start", waited)


class _Start:
    """One ray.init, in a thread that lives as long as that Ray: its processes end with the thread that started them."""

    def __init__(self, options: dict[str, Any], deadline_s: float):
        self.error: BaseException | None = None
        self._abandoned = False
        self.over, self._shut_down = threading.Event(), threading.Event()
        threading.Thread(target=self._run, args=(options, deadline_s), name="start of Ray", daemon=True).start()

    def _run(self, options: dict[str, Any], deadline_s: float) -> None:
        try:
            self._init(options, time.monotonic() + deadline_s)
        except BaseException as error:  # fault boundary: this thread; the caller's raises it
            self.error = error
        self.over.set()
        if self.error is not None:
            return
        if self._abandoned:
            ray.shutdown()
        else:
            self._shut_down.wait()

    def _init(self, options: dict[str, Any], deadline: float) -> None:
        """Ray's processes end where one waits longer than 30 s for another. The next ones, whose files are then in memory, are
        faster."""
        for attempt in range(ATTEMPTS):
            try:
                with patience(deadline - time.monotonic()):
                    ray.init(**options)
                return
            except Exception as error:  # fault boundary: Ray raises a bare one for it
                left = deadline - time.monotonic()
                if TOO_SLOW not in str(error) or attempt + 1 == ATTEMPTS or left < 2 * RAYS_OWN_S or self._abandoned:
                    raise
                log.warning("Ray's processes did not find each other in time; they are started again")
                with suppress(Exception):
                    ray.shutdown()

    def abandon(self) -> None:
        """Nobody wants that Ray any more: it ends, now or as soon as it has started."""
        self._abandoned = True
        self._shut_down.set()
        if self.over.is_set() and self.error is None:
            ray.shutdown()

    def shut_down(self) -> None:
        try:
            ray.shutdown()
        finally:
            self._shut_down.set()


@contextmanager
def patience(deadline_s: float) -> Iterator[None]:
    """Let Ray's first process take that long to appear. Ray allows 30 s, which no setting changes; busy machines need more."""
    started = time.monotonic()
    deadline = started + max(deadline_s - SLACK_S, RAYS_OWN_S)  # before `start_ray` gives up, whose words know no reason

    def patient(look: Callable[..., Any]) -> Callable[..., Any]:
        def wait_for_node(*args: Any, **kwargs: Any) -> Any:
            while True:
                try:
                    return look(*args, **kwargs)
                except RuntimeError:  # it is not there yet
                    now = time.monotonic()
                    if now > deadline or (now > started + RAYS_OWN_S and not _raylet_runs()):
                        raise
                    time.sleep(0.1)

        return wait_for_node

    with node_looked_up_by(patient):
        yield


def _raylet_runs() -> bool:
    """Whether the raylet that this process started lives."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = file.read_text().partition("(")[2].rpartition(") ")
            state, parent = rest.split()[:2]
            if name == "raylet" and int(parent) == os.getpid() and state != "Z":
                return True
    return False


def start_own_ray(options: dict[str, Any], deadline_s: float = START_S, remedy: str = "") -> Callable[[], None]:
    """`start_ray` for a Ray on this machine: whatever keeps it from starting is one sentence."""
    try:
        return start_ray(options, deadline_s, remedy)
    except (UserError, RunFailed):
        raise
    except AuthenticationError as error:
        raise UserError(
            f"Ray has no token ({_first_line(error)}); unset RAY_AUTH_TOKEN_PATH, or run: ray get-auth-token --generate"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        with suppress(Exception):
            ray.shutdown()
        raise RunFailed(
            f"Ray did not start: {_first_line(error)}; see {session_logs()}, then run the same command again"
        ) from error
    except OSError as error:
        with suppress(Exception):  # what there is of it may not end either
            ray.shutdown()
        raise RunFailed(
            f"Ray did not start: {_first_line(error)}; its files are in {temporary_folder()}: make room there, or set "
            "RAY_TMPDIR to another folder with a short path"
        ) from error
    except Exception as error:  # fault boundary: Ray's start raises RuntimeError, ValueError and bare Exceptions
        with suppress(Exception):
            ray.shutdown()
        raise RunFailed(
            f"Ray did not start: {_first_line(error)}; see {session_logs()}, then run the same command again"
        ) from error


def temporary_folder() -> Path:
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"


def session_logs() -> Path:
    return temporary_folder() / "session_latest" / "logs"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


# -- what Ray and others keep in a home folder ------------------------------------------------------------------------


def prepare_home(*, makes_token: bool = True) -> None:
    """A token that nobody else can read; and where the home folder can't be written, other places for what would go there.

    makes_token: not where a cluster has one already, which this machine must be given.
    """
    home = home_folder()
    if home is None:
        _other_places()
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(given) if given else Path(os.path.expanduser("~")) / ".ray" / "auth_token"
    if file.is_file() and file.stat().st_size > 0:
        protect(file)
    elif makes_token and given is None and (home is None or not _make_token(file)):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # for this process and those that it starts


def home_folder() -> Path | None:
    """None where there is none that can be written."""
    home = Path(os.path.expanduser("~"))
    return home if home.is_absolute() and home.is_dir() and os.access(home, os.W_OK | os.X_OK) else None


def protect(file: Path) -> None:
    """Take others' rights to read a token; a warning where it belongs to somebody else."""
    found = file.stat()
    if not found.st_mode & 0o077:
        return
    if found.st_uid == os.geteuid():
        with suppress(OSError):  # a file system that is read only
            file.chmod(0o600)
            return
    log.warning(
        "%s can be read by others (mode %03o), who can then run code in this Ray; its owner should run: chmod 600 %s",
        file, stat.S_IMODE(found.st_mode), file,
    )  # fmt: skip


def _make_token(file: Path) -> bool:
    """Before Ray does, which makes it readable by all. It appears whole, and one that another process makes now stays."""
    part = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            if file.stat().st_size == 0:
                file.unlink()
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            opened.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(part, file)
        part.unlink()
    except OSError:
        return False
    return True


def _other_places() -> None:
    """For caches of compiled code; the hub's cache can be read where it is."""
    cache = Path(os.environ.get("HF_HOME") or Path(os.path.expanduser("~")) / ".cache" / "huggingface")
    if cache.is_dir():
        os.environ.setdefault("HF_HOME", str(cache))
    home = os.path.expanduser("~")
    if not os.path.isabs(home):  # no HOME, and a user whom the system does not know, as in many containers
        os.environ["HOME"] = home = str(_own_folder())  # Ray Train can't be imported without one
    if "XDG_CACHE_HOME" in os.environ:
        return
    folder = _own_folder()
    os.environ["XDG_CACHE_HOME"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    told = "there is no home folder" if home == str(folder) else f"the home folder {home} can't be written"
    log.warning("%s; caches of compiled code go to %s", told, folder)


def _own_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"rlhf_ray_cache_{os.geteuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    found = folder.lstat() if folder.exists() else None
    # Code is loaded from it, so nobody else may have made it.
    if found is None or not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        return Path(tempfile.mkdtemp(prefix="rlhf_ray_cache_"))
    return folder

"""What others on the machine and on the network see of a run: its folder, its sockets, its ports, its secrets."""

import os
import socket
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from cats import STAGE, cats_folder, cats_tokenizer, recipe_of  # noqa: F401 - fixtures
from command import rlhf_ray
from tiny import tiny_recipe, write_start

from rlhf_ray.actors.jobs import environment_of
from rlhf_ray.actors.ppo_stage import run_ppo
from rlhf_ray.actors.ray_start import temporary_folder
from rlhf_ray.actors.session import ray_session
from rlhf_ray.actors.supervised import run_supervised
from rlhf_ray.errors import UserError
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.resume import write_recipe
from rlhf_ray.runs.run_folder import RunFolder, held, make_private

SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "RLHF_RAY_API_KEY", "RAY_AUTH_TOKEN")


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_a_run_folder_is_its_owners_alone(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "new")
    with held(folder):
        assert mode(folder.path) == 0o700
    folder.path.chmod(0o775)  # of an earlier version, say
    with held(folder):
        assert mode(folder.path) == 0o700


def test_other_bits_of_a_folder_stay(tmp_path):
    tmp_path.chmod(0o2750)
    make_private(tmp_path)
    assert mode(tmp_path) == 0o2700


def test_a_secret_does_not_go_on_the_command_line(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("OTHER_TOKEN", raising=False)
    assert environment_of(["A=1", "B=x=y", "HF_TOKEN"]) == {"A": "1", "B": "x=y", "HF_TOKEN": "hf_secret"}
    for name in ("HF_TOKEN", "WANDB_API_KEY", "my_password", "AWS_SECRET"):
        with pytest.raises(UserError, match=f"--env {name}=... would show its value.*write --env {name}$") as caught:
            environment_of([f"{name}=hf_secret"])
        assert "hf_secret" not in str(caught.value)
    with pytest.raises(UserError, match="'OTHER_TOKEN': write NAME=VALUE, or set OTHER_TOKEN"):
        environment_of(["OTHER_TOKEN"])
    answer = rlhf_ray("submit", "demo", "--run-dir", "/x", "--env", "HF_TOKEN=hf_secret", "--address", "http://127.0.0.1:1")
    assert answer.returncode == 2 and "would show its value" in answer.stderr and "hf_secret" not in answer.stderr


class Watch(threading.Thread):
    """Looks at all processes of this test while a run goes on: their command lines, where they listen, their unix sockets."""

    def __init__(self):
        super().__init__(daemon=True)
        self.commands, self.listening, self.sockets = set(), {}, {}
        self.over = threading.Event()
        self.others = set(Path("/tmp").glob("rlhf_ray_*"))  # of what else runs on this machine

    def run(self):
        while not self.over.wait(0.3):
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                with suppress(psutil.Error, OSError):  # it has just ended
                    self.look(process)
            for folder in set(Path("/tmp").glob("rlhf_ray_*")) - self.others:
                for file in folder.glob("s*"):
                    with suppress(OSError):
                        if stat.S_ISSOCK(file.stat().st_mode):
                            self.sockets[str(file)] = mode(file), mode(folder)

    def look(self, process):
        command = " ".join(process.cmdline())
        self.commands.add(command)
        for one in process.net_connections("inet"):
            if one.status == psutil.CONN_LISTEN:
                self.listening[one.laddr.ip.removeprefix("::ffff:"), one.laddr.port] = command[:60]


@pytest.fixture
def cats(folder, tmp_path):
    run = RunFolder(tmp_path / "cats")
    run.path.mkdir()
    os.symlink(folder.path / "data", run.path / "data")
    return run


@pytest.mark.ray
@pytest.mark.thorough
def test_stages_on_this_machine_listen_on_loopback_and_keep_their_secrets(cats, tmp_path, monkeypatch):
    values = {name: f"{name.lower()}{'0123456789abcdef' * 4}"[-64:] for name in SECRETS}
    values.pop("RAY_AUTH_TOKEN", None)  # Ray reads it once per process: another one would shut out the Rays of later tests
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    ranks = {"policy": {"actors": 2, "threads": 1, "cpus": 0.1}}  # two meet over the network, the critic's one alone
    recipe = tiny_recipe(ppo={"steps": 2, "checkpoint_every": 1}, resources=ranks)
    folder = write_start(recipe, RunFolder(tmp_path / "run"))
    write_recipe(recipe, folder.recipe)
    watch = Watch()
    watch.start()
    try:
        with held(folder), ray_session(None, stages=("supervised", "ppo"), log=folder.ray_log):
            run_supervised(recipe_of(sft=STAGE | {"workers": 2, "microbatch_size": 4, "max_steps": 3, "threads": 1}), cats, "sft")
            logs = temporary_folder() / "session_latest"
            logs = logs.resolve()
            run_ppo(recipe, folder, lambda event: None)
            EventLog(folder.events).add("nothing", "nothing")
            time.sleep(1)
            of_ray = [file.read_bytes() for file in logs.rglob("*") if file.is_file()]  # they go with the run
    finally:
        watch.over.set()
        watch.join()
    assert folder.stage("ppo").done
    assert {address for address, _ in watch.listening} == {"127.0.0.1"}, watch.listening
    assert watch.sockets and set(watch.sockets.values()) == {(0o600, 0o700)}, watch.sockets
    assert len(watch.commands) > 5
    values["RAY_AUTH_TOKEN"] = os.environ.get("RAY_AUTH_TOKEN") or (Path.home() / ".ray" / "auth_token").read_text().strip()
    for name, value in values.items():
        assert not [command for command in watch.commands if value in command], name
        assert of_ray and not [content for content in of_ray if value.encode() in content], name
        for where in (folder.path, cats.path):
            files = [file for file in where.rglob("*") if file.is_file()]
            assert files and not [file for file in files if value.encode() in file.read_bytes()], name


def test_the_socket_of_a_branch_is_its_owners_alone(tmp_path):
    from rlhf_ray.forking.fork_server import _bound

    before = os.umask(0)
    try:
        own, path = _bound(str(tmp_path / "s"))
    finally:
        os.umask(before)
    with own:
        assert own.family == socket.AF_UNIX and mode(path) == 0o600

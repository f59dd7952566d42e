"""The cluster scripts and the job commands, on a real cluster of two nodes (two Ray node processes) of this machine."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rlhf_ray.actors import jobs
from rlhf_ray.actors.dashboard import connect
from rlhf_ray.config import Recipe
from rlhf_ray.errors import UserError

REPO = Path(__file__).resolve().parent.parent
CLUSTER = REPO / "cluster"
SCRIPTS = sorted(path.name for path in CLUSTER.glob("*.sh"))
RAY_OPTIONS = ("--num-cpus", "1", "--object-store-memory", "100000000")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def script(name, *arguments, env, timeout=280):
    return subprocess.run(
        ["bash", str(CLUSTER / name), *arguments],
        env=env,
        timeout=timeout,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )


def bare_env(home):
    """An environment without anybody's token or cluster, in which this test's Python is the active one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RLHF_RAY", "SLURM"))}
    binaries = Path(sys.executable).parent
    return env | {
        "HOME": str(home),
        "RLHF_RAY_STATE": str(home / "state"),
        "VIRTUAL_ENV": str(binaries.parent),
        "PATH": f"{binaries}:{env['PATH']}",
    }


@pytest.fixture(scope="module")
def short_tmp(tmp_path_factory):
    """A folder with a short path: Ray's sockets lie below it, and a socket's path has at most 107 characters."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="rlhf", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def cluster(short_tmp):
    """A head and a worker by the scripts; yields (dashboard address, environment, gcs address)."""
    home = short_tmp / "home"
    home.mkdir()
    env = bare_env(home)
    gcs, dashboard, client, agent, worker_agent = free_ports(5)
    head = script(
        "head.sh",
        "--port",
        gcs,
        "--dashboard-port",
        dashboard,
        "--ray-client-server-port",
        client,
        "--dashboard-agent-listen-port",
        agent,
        "--temp-dir",
        str(short_tmp / "head"),
        *RAY_OPTIONS,
        env=env,
    )
    try:
        assert head.returncode == 0, head.stderr
        joined = next(line for line in head.stdout.splitlines() if "worker.sh" in line).split()
        address = joined[joined.index("cluster/worker.sh") + 1]
        worker = script(
            "worker.sh",
            address,
            "--dashboard-agent-listen-port",
            worker_agent,
            "--temp-dir",
            str(short_tmp / "worker"),
            *RAY_OPTIONS,
            env=env,
        )
        assert worker.returncode == 0, worker.stderr
        yield f"http://127.0.0.1:{dashboard}", env, address
    finally:
        stopped = script("stop.sh", env=env)
    assert "stopped the worker" in stopped.stdout and "stopped the head" in stopped.stdout
    # Nothing of ours is left: every Ray process carries its folder in its arguments.
    left = subprocess.run(
        ["pgrep", "-f", str(short_tmp / "head") + "|" + str(short_tmp / "worker")], capture_output=True, text=True
    ).stdout
    assert left == ""
    assert "nothing" in script("stop.sh", env=env).stdout


@pytest.fixture
def as_user(cluster, monkeypatch):
    """This process as a person with the cluster's token; returns the dashboard's address."""
    address, env, _ = cluster
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", env["HOME"])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # a stray one must not redirect us
    return address


@pytest.fixture
def entry(monkeypatch):
    """Put `code` in the place of the run, everything else being as it is: a run takes minutes."""

    def use(code):
        real = jobs.entrypoint

        def replaced(run_dir, **options):
            command = real(run_dir, **options)
            before, run = command.split("exec ")
            words = shlex.split(run)
            assert words[:4] == ["python", "-m", "rlhf_ray.cli.main", "run"]
            return f"{before}exec python -c {shlex.quote(textwrap.dedent(code))} {shlex.join(words[4:])}"

        monkeypatch.setattr(jobs, "entrypoint", replaced)

    return use


def recipe(name="tiny", **sections):
    return Recipe.model_validate({"name": name, **sections})


# --- the scripts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_parses(name):
    assert subprocess.run(["bash", "-n", str(CLUSTER / name)], capture_output=True, text=True).stderr == ""


def test_a_cluster_without_a_token_is_refused(tmp_path):
    env = bare_env(tmp_path)
    worker = script("worker.sh", "127.0.0.1:6379", env=env)
    assert worker.returncode == 2 and "no token" in worker.stderr
    head = script("head.sh", env=env | {"RAY_AUTH_MODE": "disabled"})
    assert head.returncode == 2 and "open to anyone" in head.stderr
    head = script("head.sh", env=env | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})
    assert head.returncode == 2 and "there is no token" in head.stderr
    assert not (tmp_path / "state").exists(), "nothing was started"


def test_stop_leaves_a_process_that_merely_has_the_number(tmp_path):
    env = bare_env(tmp_path)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "head.pid").write_text(f"{bystander.pid}\nMon Jan  1 00:00:00 2001\n")
        assert "nothing" in script("stop.sh", env=env).stdout
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("way", ["make_token", "protect_token"])  # of head.sh and slurm.sh; of worker.sh, which makes none
def test_a_token_that_others_can_read_becomes_private(tmp_path, way):
    """An existing file, also by RAY_AUTH_TOKEN_PATH. Where its mode can't be changed, there is a warning with the remedy."""
    for file, more in ((tmp_path / ".ray" / "auth_token", {}), (tmp_path / "own", {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "own")})):
        file.parent.mkdir(exist_ok=True)
        for before, cannot, after in ((0o644, "", 0o600), (0o640, "chmod() { return 1; };", 0o640), (0o400, "", 0o400)):
            file.write_text("a token of the test") if not file.exists() else None
            file.chmod(before)
            command = f"source {CLUSTER / 'common.sh'}; {cannot} {way}"
            call = ["bash", "-euc", command, "head.sh"]
            done = subprocess.run(call, env=bare_env(tmp_path) | more, capture_output=True, text=True)
            assert done.returncode == 0 and file.stat().st_mode & 0o777 == after, done.stderr
            warned = f"head.sh: {file} can be read by others (-rw-r-----), who can then run code on the cluster; "
            warned += f"its owner should run: chmod 600 {file}\n"
            assert done.stderr == (warned if cannot else "")
    assert "protect_token" in (CLUSTER / "worker.sh").read_text()


@pytest.mark.ray
def test_the_head_made_a_private_token_and_a_second_head_is_refused(cluster):
    _, env, _ = cluster
    token = Path(env["HOME"]) / ".ray" / "auth_token"
    assert len(token.read_text()) >= 32 and token.stat().st_mode & 0o077 == 0
    second = script("head.sh", *RAY_OPTIONS, env=env)
    assert second.returncode == 2 and "already running" in second.stderr


# --- jobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_job_gets_code_recipe_and_data_runs_on_both_nodes_and_gives_its_exit_status(
    cluster, as_user, entry, tmp_path, monkeypatch, capfd
):
    entry("""
        import os, sys, pathlib, ray, yaml, rlhf_ray
        print("arguments", sys.argv[1:])
        print("package", rlhf_ray.__path__[0])
        recipe = yaml.safe_load(open(sys.argv[1]))
        print("row", pathlib.Path(recipe["data"]["sft"][0]["path"]).read_text().strip())
        from rlhf_ray.actors.session import ray_session

        @ray.remote(num_cpus=0.1)
        def where():
            import rlhf_ray
            return rlhf_ray.__path__[0], os.environ["HF_HOME"]

        with ray_session("auto"):
            print("nodes", sum(node["Alive"] for node in ray.nodes()))
            print("actors'", *ray.get(where.remote(), timeout=60))
        sys.exit(3)
    """)
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "good"}\n')
    run_dir = tmp_path / "runs" / "tiny"
    said = []
    job_id = jobs.submit(
        recipe(data={"sft": [{"path": "rows.jsonl"}]}),
        str(run_dir),
        address=as_user,
        data=[Path("rows.jsonl")],
        env={"HF_HOME": "/given"},
        echo=said.append,
    )
    assert job_id == "tiny-1"
    assert any("code" in line for line in said) and any("rows.jsonl" in line for line in said)
    assert jobs.logs(job_id, address=as_user) == 3
    log = capfd.readouterr().out
    assert f"'--address', 'auto', '--run-dir', '{run_dir}'" in log
    assert 'row {"text": "good"}' in log and "nodes 2" in log
    assert next(text for text in log.splitlines() if text.startswith("actors'")).endswith(" /given")
    for line in ("package", "actors'"):
        path = next(text for text in log.splitlines() if text.startswith(line)).split()[1]
        assert "runtime_resources" in path, "the uploaded package runs, not one that happens to be installed"
    assert (run_dir / "uploads" / "rows.jsonl").is_file(), "data lies where a later submission finds it"
    assert jobs.logs(job_id, address=as_user, follow=False) == 3


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_folder_has_one_run_at_a_time_and_stop_lets_it_finish_its_step(cluster, as_user, entry, tmp_path, capfd):
    entry("""
        import pathlib, signal, sys, time
        folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        def finish(*_):
            time.sleep(1)                       # the rest of the step
            (folder / "checkpoint").write_text("written")
            sys.exit(130)
        signal.signal(signal.SIGINT, finish)
        print("resumed" if (folder / "checkpoint").exists() else "new", flush=True)
        (folder / "up").touch()
        if not (folder / "checkpoint").exists():
            time.sleep(120)
    """)
    run_dir = str(tmp_path / "run")
    first = jobs.submit(recipe("stopped"), run_dir, address=as_user, stop_wait_s=30)
    with pytest.raises(UserError, match=rf"{first} is still running in {run_dir}.*rlhf-ray stop {first}"):
        jobs.submit(recipe("stopped"), run_dir + "/", address=as_user)
    deadline = time.monotonic() + 60
    while not Path(run_dir, "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)

    # Ctrl-C of a person who follows: the job goes on
    follower = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; from rlhf_ray.actors import jobs; sys.exit(jobs.logs({first!r}, address={as_user!r}))",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=cluster[1],
        cwd=REPO,
    )
    assert any(line.strip() == "new" for line in iter(follower.stdout.readline, ""))
    follower.send_signal(signal.SIGINT)
    rest = follower.communicate(timeout=30)[0]
    assert follower.returncode == 130 and "detached" in rest and f"rlhf-ray logs {first}" in rest
    assert connect(as_user).get_job_status(first).value == "RUNNING"

    assert jobs.stop(first, address=as_user) == 0
    assert Path(run_dir, "checkpoint").read_text() == "written"
    assert jobs.logs(first, address=as_user) == 130
    capfd.readouterr()

    again = jobs.submit(recipe("stopped"), run_dir, address=as_user)
    assert again == "stopped-2"
    assert jobs.logs(again, address=as_user) == 0
    assert "resumed" in capfd.readouterr().out


@pytest.mark.ray
def test_a_wrong_token_and_unknown_jobs_are_refused_in_words(cluster, as_user, monkeypatch):
    with pytest.raises(UserError, match="there is no job 'ghost-1'"):
        jobs.logs("ghost-1", address=as_user)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(UserError, match="refused this machine's token"):
        jobs.submit(recipe(), "/shared/runs/tiny", address=as_user)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nonexistent")
    with pytest.raises(UserError, match="refused this machine's token"):
        jobs.stop("tiny-1", address=as_user)


@pytest.mark.ray
@pytest.mark.slow
def test_plain_ray_job_submit_reaches_our_command(cluster, tmp_path):
    """With a misspelt key, so that it ends at once: the sentence and exit code 2 come back through Ray."""
    address, env, _ = cluster
    (tmp_path / "recipe.yaml").write_text("name: tiny\nsead: 1\n")
    result = subprocess.run(
        [
            "ray",
            "job",
            "submit",
            "--address",
            address,
            "--working-dir",
            str(tmp_path),
            "--",
            "rlhf-ray",
            "run",
            "recipe.yaml",
            "--address",
            "auto",
            "--run-dir",
            str(tmp_path / "run"),
        ],
        env=env | {"RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    said = result.stdout + result.stderr
    assert result.returncode != 0 and "sead" in said and "seed" in said and "exit code 2" in said, said


@pytest.mark.ray
@pytest.mark.slow
def test_the_slurm_script_builds_a_cluster_and_runs_on_it(short_tmp, tmp_path):
    """`srun` and `rlhf-ray` are stand-ins: the first runs its command here, the second says what it got."""
    (tmp_path / "bin").mkdir()
    tools = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "rlhf-ray": 'echo got "$@"; exec python "$(dirname "$0")/run.py" "$4"',
    }
    (tmp_path / "bin" / "run.py").write_text(
        textwrap.dedent("""
        import ray, sys
        ray.init(address=sys.argv[1], logging_level="error")
        print("cpus", int(ray.cluster_resources()["CPU"]))
        sys.exit(7)
    """)
    )
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    home = short_tmp / "slurm"
    home.mkdir()
    env = bare_env(home)
    number = os.getpid()
    env |= {
        "PATH": f"{tmp_path / 'bin'}:{env['PATH']}",
        "SLURM_SUBMIT_DIR": str(REPO),
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "TMPDIR": str(short_tmp),
    }
    result = script("slurm.sh", "demo", "/shared/runs/demo", "--set", "ppo.steps=2", env=env, timeout=150)
    assert result.returncode == 7, result.stdout + result.stderr
    for words in (
        "got run demo --address ",
        "--run-dir /shared/runs/demo --set ppo.steps=2",
        "cpus 2",
        "stopped the head",
    ):
        assert words in result.stdout
    refused = script("slurm.sh", "demo", "runs/demo", env=env)
    assert refused.returncode == 2 and "relative" in refused.stderr


# --- without a cluster --------------------------------------------------------------------------------------------


def test_a_relative_run_folder_is_refused():
    with pytest.raises(UserError, match="'runs/demo' is relative.*absolute"):
        jobs.submit(recipe(), "runs/demo", address="http://127.0.0.1:9")
    assert jobs.cluster_path("/a/b/../c/") == "/a/c"
    assert jobs.cluster_path("s3://bucket/run/") == "s3://bucket/run"


def test_no_dashboard_is_said_in_words():
    [port] = free_ports(1)
    with pytest.raises(UserError, match=f"no Ray dashboard answers at http://127.0.0.1:{port}"):
        jobs.submit(recipe(), "/shared/run", address=f"127.0.0.1:{port}")
    with pytest.raises(UserError, match="not a dashboard address"):
        jobs.submit(recipe(), "/shared/run", address="ray://127.0.0.1:10001")


def test_the_entrypoint_is_one_run_with_its_arguments_quoted():
    assert jobs.entrypoint("/shared/my runs/a") == (
        "exec python -m rlhf_ray.cli.main run recipe.yaml --address auto --run-dir '/shared/my runs/a'"
    )
    assert jobs.entrypoint("/r", has_data=True).startswith(
        "mkdir -p /r/uploads && cp -R uploads/. /r/uploads/ && exec python"
    )

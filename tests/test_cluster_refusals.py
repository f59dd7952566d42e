"""The cluster scripts and the job commands where no cluster is needed, or none is there."""

import subprocess

import pytest
from clusters import CLUSTER, bare_env, free_ports, recipe, script

from rlhf_ray.actors import jobs
from rlhf_ray.errors import UserError

SCRIPTS = sorted(path.name for path in CLUSTER.glob("*.sh"))


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

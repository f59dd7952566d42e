"""A run's metrics as Ray's nodes export them, the dashboard file that shows them, and what a local Ray listens on."""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml
from loops import loop_folder, run_real  # noqa: F401 - a fixture
from tiny import tiny_recipe

from rlhf_ray.actors.run_metrics import RunMetrics, exported_names
from rlhf_ray.actors.session import ray_session
from rlhf_ray.runs.status_file import Written

CLUSTER = Path(__file__).parents[1] / "cluster"
#: Debian's package `prometheus` has it; it is enough to unpack that (apt-get download prometheus; dpkg -x ...)
PROMETHEUS = os.environ.get("RLHF_RAY_PROMETHEUS") or shutil.which("prometheus")
WAIT_S = 120.0


def on_ray(test):
    return pytest.mark.ray(pytest.mark.thorough(test))
SAMPLE = re.compile(r"(\w+)\{(.*)\} (\S+)")


def written(**values):
    now = time.time()
    return Written(state="running", host="here", process=1, process_started=1, started=now, written=now, **values)


@pytest.fixture(scope="module")
def ray_alone():
    with ray_session(None, stages=()):
        yield


@pytest.fixture(scope="module")
def address(ray_alone, folder):
    """Where the metrics of a run are read that has told of real steps of PPO and of a step of SFT."""
    _, diary = run_real(tiny_recipe(ppo={"steps": 2}), folder)
    metrics = RunMetrics("tiny run")
    with metrics.exported() as found:
        metrics.hear({"stage": "sft", "step": 7, "loss": 2.5})
        metrics.tell(written(stage="sft", step=7, total=9, tokens_per_s=800.0), None)
        for step, figures in diary.records:
            actors = {"busy/reward_s": 1.25, "bytes/policy_sync": 4096.0, "failures/reward": float(step)}
            metrics.hear({"stage": "ppo", "step": step, "metrics": figures | actors})
        now = {"stage": "ppo", "step": 2, "total": 4, "seconds_per_step": 1.5, "left_s": 3.0, "samples_per_s": 5.0}
        metrics.tell(written(**now, waiting_for="critic rank 0 (update)", waiting_since=time.time()), 12.0)
        metrics.tell(written(**now, waiting_for="reward actor 1 (chunk 3)", waiting_since=time.time() - 40), 12.0)
        yield found


def scrape(address):
    with urllib.request.urlopen(address, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return [(found[1], dict(re.findall(r'(\w+)="([^"]*)"', found[2])), float(found[3]))
            for found in map(SAMPLE.fullmatch, lines) if found]  # fmt: skip


@pytest.fixture(scope="module")
def samples(address):
    deadline = time.monotonic() + WAIT_S
    while True:
        found = scrape(address)
        missing = exported_names() - {name for name, _, _ in found}
        if not missing:
            return found
        assert time.monotonic() < deadline, f"not exported after {WAIT_S} s: {sorted(missing)}"
        time.sleep(1)


def value(samples, name, **tags):
    (found,) = [number for sample, labels, number in samples if sample == name and tags.items() <= labels.items()]
    return found


@on_ray
def test_the_numbers_are_those_of_the_run(samples):
    ppo = {"run": "tiny run", "stage": "ppo"}
    assert (value(samples, "ray_rlhf_step", **ppo), value(samples, "ray_rlhf_steps", **ppo)) == (2, 4)
    assert (value(samples, "ray_rlhf_step", run="tiny run", stage="sft"), value(samples, "ray_rlhf_loss")) == (7, 2.5)
    assert value(samples, "ray_rlhf_left_seconds", **ppo) == 3 and value(samples, "ray_rlhf_checkpoint_age_seconds") == 12
    assert value(samples, "ray_rlhf_restarts_total", role="reward") == 0 + 1 + 2, "of the steps 0, 1 and 2"
    assert value(samples, "ray_rlhf_samples_total", **ppo) == 2 * 8
    assert value(samples, "ray_rlhf_busy_seconds", role="reward") == 1.25
    assert value(samples, "ray_rlhf_phase_seconds", phase="update", **ppo) > 0
    assert 39 < value(samples, "ray_rlhf_waiting_seconds", actor="reward actor 1") < 60
    assert value(samples, "ray_rlhf_waiting_seconds", actor="critic rank 0") == 0, "it is not waited for any more"


def dashboard():
    return json.loads((CLUSTER / "grafana.json").read_text())


def expressions():
    return [(panel["title"], target["expr"]) for panel in dashboard()["panels"] for target in panel["targets"]]


def test_the_dashboard_is_one_that_grafana_takes():
    board = dashboard()
    assert board["uid"] and board["title"] and board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places) and all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in board["panels"])
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"])))
    assert used == variables == {"datasource", "run"}
    for panel in board["panels"]:
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) and panel["datasource"]["uid"] == "${datasource}"


@on_ray
def test_the_dashboard_shows_every_metric_and_none_that_is_not_there(samples):
    shown = {name for _, expression in expressions() for name in re.findall(r"ray_\w+", expression)}
    assert shown == exported_names()
    assert shown <= {name for name, _, _ in samples}


@on_ray
@pytest.mark.skipif(PROMETHEUS is None, reason="needs Prometheus: Debian's package, or RLHF_RAY_PROMETHEUS=FILE")
def test_prometheus_reads_them_and_answers_every_panel(samples, address, tmp_path):
    config = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())
    found = tmp_path / "found.json"
    found.write_text(json.dumps([{"targets": [urllib.parse.urlsplit(address).netloc]}]))
    config["global"]["scrape_interval"] = "1s"
    (source,) = config["scrape_configs"]
    assert source["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    source["file_sd_configs"][0]["files"] = [str(found)]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = 19090
    server = subprocess.Popen(
        [PROMETHEUS, f"--config.file={tmp_path}/prometheus.yml", f"--web.listen-address=127.0.0.1:{port}",
         f"--storage.tsdb.path={tmp_path}/data"], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for title, expression in expressions():
            expression = expression.replace("$run", ".*")
            deadline, answer = time.monotonic() + WAIT_S, None
            while not (answer and answer["data"]["result"]):
                assert time.monotonic() < deadline and server.poll() is None, f"{title}: {expression}: {answer}"
                answer = asked(port, expression)
            assert all(result["metric"].get("run") == "tiny run" for result in answer["data"]["result"]), (title, answer)
    finally:
        server.terminate()
        server.wait(30)


def asked(port, expression):
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=10) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code == 400:  # an expression that Prometheus can't parse
            return pytest.fail(f"{expression}: {error.read().decode()}")
        time.sleep(0.5)
    except OSError:
        time.sleep(0.5)
    return None


def test_without_ray_nothing_is_exported_and_nothing_fails():
    metrics = RunMetrics("none")
    metrics.hear({"stage": "ppo", "step": 1, "metrics": {"objective/score": 1.0}})
    metrics.tell(written(stage="ppo", step=1), 1.0)


@on_ray
def test_a_local_run_listens_on_loopback_alone(ray_alone):
    """Ray's own ports, the metrics and this process."""
    listening = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        for one in process.net_connections("inet"):
            if one.status == psutil.CONN_LISTEN:
                listening[(process.name(), one.laddr.port)] = one.laddr.ip.removeprefix("::ffff:")
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}
    assert set(listening.values()) == {"127.0.0.1"}, listening

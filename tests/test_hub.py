"""A model or data set that is no folder here: the hub is asked once, with a deadline of seconds; real sockets stand for it."""

import http.server
import json
import os
import socket
import threading
import time
from contextlib import contextmanager, suppress

import datasets
import pytest
from command import rlhf_ray
from huggingface_hub import constants
from processes import wait_for

from rlhf_ray.config import Recipe, SourceConfig
from rlhf_ray.data.sources import _from_hub, columns_of, load_source
from rlhf_ray.errors import UserError
from rlhf_ray.models import hub
from rlhf_ray.models import load as loading
from rlhf_ray.models.load import load_causal_lm, load_config
from rlhf_ray.models.model_problems import check_model
from rlhf_ray.models.size import parameters
from rlhf_ray.models.tokenizer import load_tokenizer

NAME = "some-org/SmolLM2-135M-Instrct"


@pytest.fixture
def asks(tmp_path, monkeypatch):
    """asks(address): from now on that is the hub, which nobody has asked anything yet; an empty cache; an empty folder."""

    def use(address, offline=False):
        monkeypatch.chdir(tmp_path)
        for name in hub.OFFLINE:
            monkeypatch.delenv(name, raising=False)
        home = str(tmp_path / "hf")
        for name, value in {
            "ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HOME": home, "HF_HUB_CACHE": f"{home}/hub", "HF_HUB_ETAG_TIMEOUT": 5, "HF_HUB_OFFLINE": offline,
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", f"{home}/datasets")
        monkeypatch.setattr(hub, "_ASKED", hub._Asked())
        loading._hub_config.cache_clear()

    yield use
    loading._hub_config.cache_clear()


def look_everywhere():
    """What is told of two models that are nowhere; the seconds of it all."""
    started = time.monotonic()
    recipe = Recipe(name="r", model={"name_or_path": NAME}, reward={"base": f"{NAME}-other"})
    told = check_model(recipe)
    for load in (load_config, load_tokenizer, load_causal_lm):
        with pytest.raises(UserError, match="there is no folder"):
            load(NAME)
    assert parameters(recipe) == 0
    return told, time.monotonic() - started


@contextmanager
def silent_hub():
    """Takes requests and answers none. Yields (its address, what was asked about models and data sets)."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        asked, kept = [], []

        def listen(connection):
            with suppress(OSError):
                line = connection.recv(4096).split(b"\r\n")[0].decode()
                if about_a_repository(line):
                    asked.append(line)

        def accept():
            with suppress(OSError):
                while True:
                    kept.append(listener.accept()[0])
                    threading.Thread(target=listen, args=(kept[-1],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked


def about_a_repository(path):
    """The hub's client also asks which programs use it, once a day."""
    return "/api/models/" in path or "/api/datasets/" in path or "/resolve/" in path


@contextmanager
def answering_hub(*statuses):
    """The last one again and again, after those before it. 200: it has the model."""
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = statuses[min(len(asked), len(statuses) - 1)], b'{"id": "some-org/model"}'
            if about_a_repository(self.path):
                asked.append(self.path)
            self.send_response(status)
            self.send_header("X-Error-Code", "RepoNotFound" if status == 404 else "")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()


def test_a_hub_that_does_not_answer_is_asked_once_per_name(tmp_path, asks, monkeypatch):
    monkeypatch.setattr(hub, "LOOK_UP_S", 1.0)
    (tmp_path / "some-org" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    with silent_hub() as (address, asked):
        asks(address)
        told, seconds = look_everywhere()
        wait_for(lambda: len(asked) == 2)  # one look-up for each of the two names
        time.sleep(0.1)
    assert len(told) == 2 and told[0].startswith("reward.base: there is no folder")
    assert told[1].startswith(f"model.name_or_path: there is no folder '{NAME}' here, and the hub ")
    assert told[1].endswith("did you mean 'some-org/SmolLM2-135M-Instruct'?") and seconds < 60 and len(asked) == 2


@pytest.mark.parametrize(("status", "says"), [(404, "the hub has no model of that name"), (503, "the hub answered 503")])
def test_what_the_hub_answers_is_told(asks, status, says):
    with answering_hub(status) as (address, asked):
        asks(address)
        told, _ = look_everywhere()
    assert f"there is no folder '{NAME}' here, and {says}" in told[1] and "check the name" in told[1]
    assert len(asked) == 2, asked


def found(name):
    """"found", or what is told."""
    try:
        hub.look_up(name)
    except UserError as error:
        return str(error)
    return "found"


def test_a_failure_of_the_hub_is_not_for_ever(asks, monkeypatch):
    """Two asks within the time make one request; the third, after it, finds the model; it is not asked for again."""
    monkeypatch.setattr(hub, "AGAIN_S", 1e9)
    with answering_hub(503, 200) as (address, asked):
        asks(address)
        said = [found("some-org/model") for _ in range(2)]
        monkeypatch.setattr(hub, "AGAIN_S", -1)
        assert [found("some-org/model") for _ in range(2)] == ["found", "found"]
    assert len(asked) == 2 and all("the hub answered 503" in line for line in said)


def cached_model(tmp_path):
    snapshot = tmp_path / "hf" / "hub" / "models--some-org--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 3}))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")


def test_a_name_without_a_copy_is_not_told_that_a_variable_is_set_which_nobody_set(tmp_path, asks, monkeypatch):
    """The hub does not answer about a model with a copy, so the process goes offline. Then comes one without a copy; later the hub
    is asked about that one, and has it, and the process is as it was."""
    cached_model(tmp_path)
    monkeypatch.setattr(hub, "AGAIN_S", 1e9)
    with answering_hub(503, 200) as (address, asked):
        asks(address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        assert found("some-org/tiny") == "found" and os.environ["HF_HUB_OFFLINE"] == "1" and constants.HF_HUB_OFFLINE
        said = found("some-org/model")
        monkeypatch.setattr(hub, "AGAIN_S", -1)
        assert found("some-org/model") == "found" and os.environ["HF_HUB_OFFLINE"] == "0" and not constants.HF_HUB_OFFLINE
    assert len(asked) == 2 and "there is no folder 'some-org/model' here, and the hub answered 503" in said
    assert "HF_HUB_OFFLINE" not in said and str(tmp_path / "hf" / "hub") in said


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_the_variable_that_is_set_is_named_with_its_remedy(tmp_path, asks, monkeypatch, variable):
    cached_model(tmp_path)
    with answering_hub(200) as (address, asked):
        asks(address, offline=True)
        monkeypatch.setenv(variable, "1")
        assert found("some-org/tiny") == "found"
        said = found("some-org/model")
    assert asked == []
    assert f"the hub is not asked, because {variable} is set" in said and f"; unset {variable}, or check the name" in said


def test_a_copy_in_the_cache_is_used_where_the_hub_is_out_of_reach(tmp_path, asks, monkeypatch):
    cached_model(tmp_path)
    monkeypatch.setattr(hub, "LOOK_UP_S", 1.0)
    with silent_hub() as (address, asked):
        asks(address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        started = time.monotonic()
        assert [load_config("some-org/tiny").n_layer for _ in range(2)] == [3, 3]
        assert len(asked) == 1 and time.monotonic() - started < 60


def test_a_data_set_that_is_nowhere_is_told_in_seconds(asks, monkeypatch):
    monkeypatch.setattr(hub, "LOOK_UP_S", 1.0)
    source, where = SourceConfig(path="nobody/nothing"), "data.sft[0]"
    with silent_hub() as (address, asked):
        asks(address)
        for load in (lambda: columns_of(source, None, where, "sft"), lambda: load_source(source, None, 0, where, "sft")):
            with pytest.raises(UserError, match=r"^data.sft\[0\]: the data set 'nobody/nothing': the hub .*data.root"):
                load()
    assert len(asked) == 1


def test_csv_on_the_hub_is_text_too(tmp_path, asks):
    """A folder stands for the hub's repository: both are read by the same reader of `datasets`."""
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "train.csv").write_text("prompt,response\nq,NA\n00501,2\n")
    asks("http://127.0.0.1:1", offline=True)
    rows = _from_hub("./repository", SourceConfig(path="x"))
    assert rows.to_list() == [{"prompt": "q", "response": "NA"}, {"prompt": "00501", "response": "2"}]


def test_doctor_prints_no_plan_of_a_model_that_is_nowhere(tmp_path, asks, monkeypatch):
    monkeypatch.setattr(hub, "LOOK_UP_S", 1.0)
    rows = "".join(json.dumps({"prompt": f"q{i}", "chosen": f"g{i}", "rejected": "b"}) + "\n" for i in range(40))
    (tmp_path / "pairs.jsonl").write_text(rows)
    source = [{"path": "pairs.jsonl"}]
    (tmp_path / "r.yaml").write_text(json.dumps({
        "name": "r", "model": {"name_or_path": NAME}, "data": {"sft": source, "preferences": source},
    }))  # fmt: skip
    with silent_hub() as (address, asked):
        asks(address)
        answer = rlhf_ray("doctor", "r.yaml")
    assert answer.returncode == 2 and len(asked) == 1
    assert answer.stderr.count(NAME) == 1 and "parameters" not in answer.stdout and "memory" not in answer.stdout

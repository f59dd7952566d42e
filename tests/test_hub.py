"""A model or data set that is no folder here: the hub is asked once, with a deadline of seconds; real sockets stand for it."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import pytest

NAME = "some-org/SmolLM2-135M-Instrct"
LOOK = """
import sys, time
from rlhf_ray.config import Recipe
from rlhf_ray.errors import UserError
from rlhf_ray.models.model_problems import check_model
from rlhf_ray.models.load import load_causal_lm, load_config
from rlhf_ray.models.size import parameters
from rlhf_ray.models.tokenizer import load_tokenizer
started = time.monotonic()
recipe = Recipe(name="r", model={"name_or_path": sys.argv[1]}, reward={"base": sys.argv[1] + "-other"})
print(*check_model(recipe), sep="\\n")
for load in (load_config, load_tokenizer, load_causal_lm):
    try:
        load(sys.argv[1])
    except UserError as error:
        assert "there is no folder" in str(error), error
print("parameters", parameters(recipe), "seconds", time.monotonic() - started)
"""


QUICK = "from rlhf_ray.models import hub; hub.LOOK_UP_S = 1.0\n"  # for a hub that does not answer


def in_a_process(code, *arguments, cwd, **environment):
    """huggingface_hub reads its variables once, when it is imported."""
    own = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment = own | {"HF_HOME": str(cwd / "hf"), "HF_HUB_ETAG_TIMEOUT": "5"} | environment
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def test_a_hub_that_does_not_answer_is_asked_once_per_name(tmp_path):
    (tmp_path / "some-org" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    with silent_hub() as (address, asked):
        said = in_a_process(QUICK + LOOK, NAME, cwd=tmp_path, HF_ENDPOINT=address)
    lines = said.splitlines()
    assert lines[0].startswith("reward.base: there is no folder")
    assert lines[1].startswith(f"model.name_or_path: there is no folder '{NAME}' here, and the hub ")
    assert lines[1].endswith("did you mean 'some-org/SmolLM2-135M-Instruct'?") and len(lines) == 3
    assert lines[2].startswith("parameters 0 ") and float(lines[2].split()[-1]) < 60
    assert len(asked) == 2, "one look-up for each of the two names"


@pytest.mark.parametrize(("status", "says"), [(404, "the hub has no model of that name"), (503, "the hub answered 503")])
def test_what_the_hub_answers_is_told(tmp_path, status, says):
    with answering_hub(status) as (address, asked):
        said = in_a_process(LOOK, NAME, cwd=tmp_path, HF_ENDPOINT=address)
    assert f"there is no folder '{NAME}' here, and {says}" in said and "check the name" in said
    assert len(asked) == 2, asked


AGAIN = """
import os
from rlhf_ray.errors import UserError
from rlhf_ray.models import hub
hub.AGAIN_S = 1e9
def look(name):
    try:
        hub.look_up(name)
        print("found")
    except UserError as error:
        print(error)
"""


def test_a_failure_of_the_hub_is_not_for_ever(tmp_path):
    """Two asks within the time make one request; the third, after it, finds the model; it is not asked for again."""
    asks = "look('some-org/model'); look('some-org/model'); hub.AGAIN_S = -1; look('some-org/model'); look('some-org/model')"
    with answering_hub(503, 200) as (address, asked):
        said = in_a_process(AGAIN + asks, cwd=tmp_path, HF_ENDPOINT=address).splitlines()
    assert len(asked) == 2 and said[2:] == ["found", "found"]
    assert all("the hub answered 503" in line for line in said[:2])


def cached_model(tmp_path):
    snapshot = tmp_path / "hf" / "hub" / "models--some-org--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 3}))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")


def test_a_name_without_a_copy_is_not_told_that_a_variable_is_set_which_nobody_set(tmp_path):
    """The hub does not answer about a model with a copy, so the process goes offline. Then comes one without a copy; later the hub
    is asked about that one, and has it, and the process is as it was."""
    cached_model(tmp_path)
    asks = ("look('some-org/tiny'); print(os.environ.get('HF_HUB_OFFLINE')); look('some-org/model'); hub.AGAIN_S = -1\n"
            "look('some-org/model'); print(os.environ.get('HF_HUB_OFFLINE'))")  # fmt: skip
    with answering_hub(503, 200) as (address, asked):
        said = in_a_process(AGAIN + asks, cwd=tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="0").splitlines()
    assert said[:2] == ["found", "1"] and said[3:] == ["found", "0"] and len(asked) == 2
    assert "there is no folder 'some-org/model' here, and the hub answered 503" in said[2]
    assert "HF_HUB_OFFLINE" not in said[2] and str(tmp_path / "hf" / "hub") in said[2]


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_the_variable_that_is_set_is_named_with_its_remedy(tmp_path, variable):
    cached_model(tmp_path)
    with answering_hub(200) as (address, asked):
        said = in_a_process(AGAIN + "look('some-org/tiny'); look('some-org/model')", cwd=tmp_path, HF_ENDPOINT=address,
                            **{variable: "1"}).splitlines()  # fmt: skip
    assert asked == [] and said[0] == "found"
    assert f"the hub is not asked, because {variable} is set" in said[1] and f"; unset {variable}, or check the name" in said[1]


def test_a_copy_in_the_cache_is_used_where_the_hub_is_out_of_reach(tmp_path):
    cached_model(tmp_path)
    code = (
        "import time; from rlhf_ray.models.load import load_config; started = time.monotonic()\n"
        "layers = [load_config('some-org/tiny').n_layer for _ in range(2)]; print(*layers, time.monotonic() - started)"
    )
    with silent_hub() as (address, asked):
        first, second, seconds = in_a_process(QUICK + code, cwd=tmp_path, HF_ENDPOINT=address).split()
    assert (first, second, len(asked)) == ("3", "3", 1) and float(seconds) < 60


def test_a_data_set_that_is_nowhere_is_told_in_seconds(tmp_path):
    code = (
        "from rlhf_ray.config import SourceConfig; from rlhf_ray.data.sources import columns_of, load_source\n"
        "from rlhf_ray.errors import UserError\n"
        "source, where = SourceConfig(path='nobody/nothing'), 'data.sft[0]'\n"
        "for load in (lambda: columns_of(source, None, where, 'sft'), lambda: load_source(source, None, 0, where, 'sft')):\n"
        "    try: load()\n"
        "    except UserError as error: print(error)\n"
    )
    with silent_hub() as (address, asked):
        said = in_a_process(QUICK + code, cwd=tmp_path, HF_ENDPOINT=address).splitlines()
    assert len(said) == 2 and len(asked) == 1
    assert all(line.startswith("data.sft[0]: the data set 'nobody/nothing': the hub ") and "data.root" in line for line in said)


def test_csv_on_the_hub_is_text_too(tmp_path):
    """A folder stands for the hub's repository: both are read by the same reader of `datasets`."""
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "train.csv").write_text("prompt,response\nq,NA\n00501,2\n")
    code = ("from rlhf_ray.config import SourceConfig; from rlhf_ray.data.sources import _from_hub\n"
            "print(_from_hub('./repository', SourceConfig(path='x')).to_list())")  # fmt: skip
    said = in_a_process(code, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert said.strip().splitlines()[-1] == str([{"prompt": "q", "response": "NA"}, {"prompt": "00501", "response": "2"}])


def test_doctor_prints_no_plan_of_a_model_that_is_nowhere(tmp_path):
    rows = "".join(json.dumps({"prompt": f"q{i}", "chosen": f"g{i}", "rejected": "b"}) + "\n" for i in range(40))
    (tmp_path / "pairs.jsonl").write_text(rows)
    source = [{"path": "pairs.jsonl"}]
    (tmp_path / "r.yaml").write_text(json.dumps({
        "name": "r", "model": {"name_or_path": NAME}, "data": {"sft": source, "preferences": source},
    }))  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {"HF_HOME": str(tmp_path)}
    with silent_hub() as (address, asked):
        code, environment = QUICK + "from rlhf_ray.cli.main import app; app()", environment | {"HF_ENDPOINT": address}
        command = [sys.executable, "-c", code, "doctor", "r.yaml"]
        answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert answer.returncode == 2 and len(asked) == 1
    assert answer.stderr.count(NAME) == 1 and "Traceback" not in answer.stderr
    assert "parameters" not in answer.stdout and "memory" not in answer.stdout

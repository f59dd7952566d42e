"""A URL where a command takes a path: read from the store, or refused in a sentence. As a path it would name a folder "s3:"."""

from pathlib import Path

import pytest
import yaml
from command import rlhf_ray
from served_app import save_tiny

from rlhf_ray.cli.publish import _shelf_of, _version
from rlhf_ray.runs.contents import to_export
from rlhf_ray.runs.remote import in_store, local_copy
from rlhf_ray.runs.run_folder import COPIES, RunFolder, working_copy

REFUSED = [
    ("submit demo --run-dir /runs/x --address http://127.0.0.1:1 --data s3://b/rows.jsonl", "name the URL in the recipe instead"),
    ("export runs/x s3://b/model", "the folder to write is 's3://b/model', a URL, and a path on this machine is needed"),
    ("import gs://b/model.gguf out", "the GGUF file is 'gs://b/model.gguf', a URL"),
    ("import model.gguf file:///out", "the folder to write is 'file:///out', a URL"),
    ("votes export votes.db memory://rows.jsonl", "the file to write is 'memory://rows.jsonl', a URL"),
    ("votes summary s3://b/votes.db", "votes are kept in a SQLite file (a path, or sqlite:///FILE) or in PostgreSQL"),
    ("round s3://b/run", "RUN 's3://b/run' is a URL; here a folder of this machine is needed"),
]


@pytest.mark.parametrize(("command", "words"), REFUSED)
def test_what_works_on_this_machine_alone_refuses_a_url_in_a_sentence(command, words, tmp_path):
    answer = rlhf_ray(*command.split(), cwd=tmp_path)
    assert answer.returncode == 2 and words in " ".join(answer.stderr.split()), answer.stderr
    assert "Traceback" not in answer.stderr and len(answer.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [], "nothing was made of it"


def test_a_version_is_published_from_a_store_and_stays_when_the_copy_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv(COPIES, str(tmp_path / "copies"))
    url = f"file://{tmp_path}/store/run"
    run = RunFolder(working_copy(url), url)
    with in_store(run, 20):
        save_tiny(run.stage("ppo").path / "model")
        (run.path / "recipe.yaml").write_text(yaml.safe_dump({"name": "x"}))
    version = _version(local_copy(url, to_export("ppo")), {}, _shelf_of(url))
    local_copy(url)  # which removes what the store does not hold
    weights = [(folder / "model.safetensors").read_bytes() for folder in (Path(version.folder), run.stage("ppo").path / "model")]
    assert weights[0] == weights[1]
    assert not list(local_copy(url).glob("published"))

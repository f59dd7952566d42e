"""Files that somebody cut off, emptied or edited end in a sentence that names them. Those of a report: test_report.py."""

import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crossed import crossed
from tiny import TEXTS, tiny_recipe, write_start

from rlhf_ray.actors.supervised import _last_row
from rlhf_ray.config import RewardConfig
from rlhf_ray.data.role_files import (
    count_rows,
    prompt_columns,
    read_prompt_columns,
    read_prompts,
    read_role,
    write_role,
)
from rlhf_ray.errors import UserError
from rlhf_ray.models.load import load_causal_lm, load_config, load_reward_model, reward_normalisation
from rlhf_ray.models.model_problems import check_model
from rlhf_ray.models.size import shape_of_model, shape_of_other
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.checkpoints import newest_complete
from rlhf_ray.supervised.ensemble import ensemble_summary, save_scores
from rlhf_ray.votes.database import Database
from rlhf_ray.votes.reading import Filters, read_judgements


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = write_start(tiny_recipe(), RunFolder(tmp_path_factory.mktemp("whole")))
    rows = [{"prompt": text, "chosen": " yes", "rejected": " no"} for text in TEXTS]
    write_role(folder, "reward_train", rows, ("prompt", "chosen", "rejected"))
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


# -- data -------------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(os.urandom(500))


READ = (read_role, read_prompts, read_prompt_columns, prompt_columns, count_rows)


@crossed("spoil, read", [cut, empty, garbage], READ)
def test_a_damaged_file_of_rows(folder, read, spoil):
    path = folder.data("prompts")
    spoil(path)
    with pytest.raises(UserError, match=rf"^{path} is damaged \(.*\); delete the folder {path.parent}, and the next run prepares"):
        read(folder, "prompts")


@pytest.mark.parametrize(
    ("role", "columns", "problem"),
    [
        ("prompts", {"text": ["a"]}, "no column 'prompt'"),
        ("prompts", {"prompt": [3]}, "column 'prompt' holds something else than text"),
        ("prompts", {"prompt": ["a", None]}, "column 'prompt' holds something else than text"),
        ("reward_train", {"prompt": ["a"], "chosen": ["b"]}, "no column 'rejected'"),
        ("reward_train", {"prompt": ["a"], "response": ["b"], "score": ["c"]}, "no column 'chosen'"),
    ],
)
def test_rows_that_were_edited(folder, role, columns, problem):
    pq.write_table(pa.table(columns), folder.data(role))
    with pytest.raises(UserError, match=f"{folder.data(role)} is damaged .its? .*{problem}"):
        read_role(folder, role)


def test_rows_of_either_objective_are_read(folder):
    assert read_role(folder, "reward_train").column_names == ["prompt", "chosen", "rejected"]
    pq.write_table(pa.table({"prompt": ["a"], "response": ["b"], "score": [0.5]}), folder.data("reward_train"))
    assert read_role(folder, "reward_train")["score"] == [0.5]
    large = pa.table({"prompt": pa.array(["a"], pa.large_string())})
    pq.write_table(large, folder.data("prompts"))
    assert read_prompts(folder) == ["a"]


# -- models -----------------------------------------------------------------------------------------------------------


def edited(**values):
    def edit(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


@pytest.mark.parametrize("spoil", [cut, empty, garbage])
def test_damaged_weights(folder, spoil):
    model = folder.stage("sft").model
    spoil(model / "model.safetensors")
    with pytest.raises(UserError, match=f"no model could be loaded from '{model}'"):
        load_causal_lm(model)


@pytest.mark.parametrize(
    "spoil", [empty, garbage, edited(n_embd=48), edited(n_head=0), edited(n_layer="two"), edited(architectures=5, vocab_size=None)]
)
def test_a_damaged_config(folder, spoil):
    model = folder.stage("sft").model
    spoil(model / "config.json")
    with pytest.raises(UserError, match=f"no model could be loaded from '{model}'"):
        load_causal_lm(model)
    recipe = tiny_recipe(model={"name_or_path": str(model)})
    assert isinstance(check_model(recipe), list) and shape_of_model(recipe).layers in (0, 2)  # doctor goes on, with what it can see


def test_damaged_tokenizers(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for spoil in (empty, garbage):
            target = folder.path / f"{name}-{spoil.__name__}"
            shutil.copytree(folder.stage("sft").model, target)
            spoil(target / name)
            with pytest.raises(UserError, match=f"the tokenizer of '{target}'|no tokenizer could be loaded from '{target}'"):
                load_tokenizer(target)


@pytest.mark.parametrize("length", [2**63, 2**40, 3])
def test_the_size_of_damaged_weights_is_unknown(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"[1]")
    assert shape_of_other(tiny_recipe(), str(tmp_path)).parameters == 0


@pytest.mark.parametrize(
    "moments",
    [{"reward_std": None}, {"reward_std": 0}, {"reward_mean": "high"}, {"reward_mean": None}, {"reward_std": float("inf")}],
)
def test_a_reward_model_whose_moments_were_edited(folder, moments):
    model = folder.stage("reward").model
    edited(**moments)(model / "config.json")
    with pytest.raises(UserError, match="reward_mean .* and reward_std .*, which normalise no score"):
        reward_normalisation(load_reward_model(model).config)


def test_moments_are_read_as_they_stand_and_none_are_needed(folder):
    model = folder.stage("reward").model
    assert reward_normalisation(load_config(model)) == (0.1, 0.5)  # as tiny.write_start writes them
    assert reward_normalisation(load_config(folder.stage("sft").model)) == (0.0, 1.0)


# -- supervised stages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [cut, empty, garbage, os.remove])
def test_scores_of_a_member(tmp_path, spoil):
    stage = RunFolder(tmp_path).stage("reward")
    for number in (0, 1):
        stage.member(number).path.mkdir(parents=True, exist_ok=True)
        save_scores(stage.member(number), {"chosen": np.ones(3), "rejected": np.zeros(3)}, seed=0)
    spoil(stage.member(1).path / "heldout.npz")
    each = [{"seconds": 1.0}, {"seconds": 2.0}]
    with pytest.raises(UserError, match=r"member_1/heldout.npz is damaged or gone .*; delete .*member_1/DONE, and the next run"):
        ensemble_summary(each, stage, RewardConfig(members=2))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state.json": 1}', '{"state.json": "0"}'])
def test_the_mark_of_a_checkpoint(tmp_path, text):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "MANIFEST.json").write_text(text)
    with pytest.raises(UserError, match="checkpoint-3"):
        newest_complete(tmp_path)


def test_a_line_of_metrics_that_is_none_does_not_end_the_look_at_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nspoilt\n')
    assert _last_row(path) is None
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert _last_row(path) == {"step": 2}


# -- texts, whatever the locale ---------------------------------------------------------------------------------------

WRITES = """
import sys
from pathlib import Path
from rlhf_ray.config import Recipe
from rlhf_ray.runs.resume import recorded_recipe, write_recipe
from rlhf_ray.runs.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
recipe = Recipe.model_validate({"name": "r", "generation": {"stop": ["\\u00e9", "\\u6f22"]}})
write_recipe(recipe, folder.recipe)
assert recorded_recipe(folder).generation.stop == ("\\u00e9", "\\u6f22")
"""


def test_files_are_utf8_where_the_locale_is_not(tmp_path):
    """The "C" locale without Python's own UTF-8 mode has ASCII only."""
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", WRITES, str(tmp_path)], env=plain, capture_output=True, text=True, timeout=240,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "漢" in (tmp_path / "recipe.yaml").read_text(encoding="utf-8")


# -- votes ------------------------------------------------------------------------------------------------------------


def test_votes_of_somebody_who_is_not_here():
    with pytest.raises(UserError, match="'~nobody-of-that-name/votes.db' names the home folder of a user who is not known"):
        Database("~nobody-of-that-name/votes.db")


def test_votes_up_to_the_last_day_that_there_is(tmp_path):
    import datetime

    database = Database(str(tmp_path / "votes.db"), create=True)
    assert read_judgements(database, Filters(since=datetime.date.min, until=datetime.date.max)) == []

"""A checkpoint with a part missing is refused in words: which part, what to do. Never a raw KeyError."""

import json
import math
import random

import numpy as np
import pytest
import torch
from checkpoints import write_rank
from safetensors.torch import load_file, save_file
from test_checkpoint import begin, save, tensors

from rlhf_ray.errors import NotFinite, UserError
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tensor_file import write_tensors
from rlhf_ray.ppo import checkpoint
from rlhf_ray.ppo.loop import LoopState
from rlhf_ray.runs.sealed import MANIFEST, new_folder, seal
from rlhf_ray.supervised import checkpoints as supervised_checkpoints
from rlhf_ray.supervised.checkpoints import Checkpoint, newest_complete, random_state

STATE = {"step": 4, "kl_coef": 0.1, "best_score": None, "best_step": -1, "worse_since": 0, "moved": True}


def rewrite(file, keep, metadata=None):
    state = {name: tensor for name, tensor in load_file(file).items() if keep(name)}
    save_file(state, file, metadata={"steps_taken": "40"} if metadata is None else metadata)


# -- PPO's ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["policy", "critic"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_file_of_a_rank(tmp_path, role, rank):
    folder = save(tmp_path, 4)
    (folder / f"{role}-0{rank}-of-02.safetensors").unlink()
    with pytest.raises(UserError, match=rf"step_000004 has no {role}-0{rank}-of-02.safetensors.*delete this folder"):
        checkpoint.read_role(folder, role)


def test_a_role_without_any_file(tmp_path):
    folder = save(tmp_path, 4)
    for file in folder.glob("critic-*"):
        file.unlink()
    with pytest.raises(UserError, match="has no critic-00-of-01.safetensors, so the critic can't go on"):
        checkpoint.read_role(folder, "critic")
    assert checkpoint.read_role(folder, "policy")[1] == 40


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"steps_taken": "many"}])
def test_a_file_without_the_count_of_steps(tmp_path, metadata):
    folder = save(tmp_path, 4)
    rewrite(folder / "policy-00-of-02.safetensors", lambda name: True, metadata)
    with pytest.raises(UserError, match="does not say how many optimiser steps were taken"):
        checkpoint.read_role(folder, "policy")


def test_a_file_that_is_not_safetensors(tmp_path):
    folder = save(tmp_path, 4)
    (folder / "policy-01-of-02.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match="a file of the policy that can't be read"):
        checkpoint.read_role(folder, "policy")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"step": 4}', "null", '{"kl_coef": 0.1, "best_score": 1, "best_step": 2}'])
def test_a_state_that_lacks_something(tmp_path, content):
    folder = save(tmp_path, 4)
    (folder / "state.json").write_text(content)
    with pytest.raises(UserError, match="state.json (can't be read|has no ).*delete this folder"):
        checkpoint.read_state(folder)


def test_a_state_that_is_gone(tmp_path):
    folder = save(tmp_path, 4)
    (folder / "state.json").unlink()
    with pytest.raises(UserError, match="state.json can't be read"):
        checkpoint.read_state(folder)


@pytest.mark.parametrize("content", ["[]", "{}", "null", '"text"', '{"policy-00-of-02.safetensors": "x"}'])
def test_a_manifest_that_names_no_state_is_damage(tmp_path, content):
    save(tmp_path, 2)
    (save(tmp_path, 4) / MANIFEST).write_text(content)
    told = []
    assert checkpoint.last_good(tmp_path, told.append).name == "step_000002" and "MANIFEST.json" in told[0]


@pytest.mark.parametrize(
    "changed, says",
    [({"step": "4"}, "step = '4'"), ({"kl_coef": math.nan}, "kl_coef = nan"), ({"worse_since": None}, "worse_since = None"),
     ({"best_score": "high"}, "best_score = 'high'"), ({"best_score": math.inf}, "best_score = inf"),
     ({"price": 1}, "unknown key 'price'")],
)  # fmt: skip
def test_a_state_with_other_values(changed, says):
    with pytest.raises(UserError, match=says):
        LoopState.from_json(STATE | changed)


def test_states_of_earlier_versions_are_read():
    assert LoopState.from_json(STATE).moved is True
    old = {key: value for key, value in STATE.items() if key not in ("moved", "worse_since")}
    assert LoopState.from_json(old).moved is True and LoopState.from_json(old | {"step": 0}).moved is False


# -- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["weight/b", "exp_avg/b", "exp_avg_sq/b"])
def test_nothing_that_is_not_finite_is_written_or_read(tmp_path, name, bad):
    state = tensors(1)
    state[name][1, 0] = bad
    with pytest.raises(NotFinite, match=f"no checkpoint is written.*policy.*{name}"):
        write_rank(tmp_path, "policy", 0, 1, state.items(), 1)
    assert list(tmp_path.iterdir()) == []
    save_file(state, tmp_path / "policy-00-of-01.safetensors", metadata={"steps_taken": "1"})  # an earlier version wrote it
    with pytest.raises(UserError, match=f"not finite .the policy's {name}.*delete this folder"):
        checkpoint.read_role(tmp_path, "policy")


def test_large_weights_are_finite_though_their_sum_is_not(tmp_path):
    write_rank(tmp_path, "policy", 0, 1, [("weight/a", torch.full((9,), 3e38))], 1)
    assert checkpoint.read_role(tmp_path, "policy")[0]["weight/a"].max() == pytest.approx(3e38)


def test_a_model_folder_is_not_written_either(tmp_path):
    from test_generation import build

    model = build("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[3, 4] = math.nan
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "before").write_text("stays")
    with pytest.raises(NotFinite, match="model is not written: its tensor transformer.wpe.weight"):
        save_model(model, None, tmp_path / "model", "card")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (tmp_path / "model" / "before").exists()


def test_an_unpublished_checkpoint_leaves_the_last_good_one(tmp_path):
    save(tmp_path, 2)
    begin(tmp_path, 4)  # its second rank found a NaN, so nobody publishes it
    assert checkpoint.last_good(tmp_path).name == "step_000002"


# -- the supervised stages' -------------------------------------------------------------------------------------------

FILES = ("state.json", "trainer_state.json", "trained-00-of-02.safetensors", "trained-01-of-02.safetensors",
         "random-00-of-02.safetensors")  # fmt: skip


def supervised(checkpoints, step):
    temporary = supervised_checkpoints.temporary_folder(checkpoints, step)
    new_folder(temporary)
    digests = {}
    for rank in range(2):
        share = {name: tensor for i, (name, tensor) in enumerate(tensors(step).items()) if i % 2 == rank}
        name = supervised_checkpoints.rank_file("trained", rank, 2)
        digests[name] = write_tensors(temporary / name, share, {})
    (temporary / "random-00-of-02.safetensors").write_text("x")
    (temporary / "trainer_state.json").write_text("{}")
    supervised_checkpoints.publish(checkpoints, Checkpoint(step=step, elapsed_s=1.5, rate_step=step), digests, keep=2)
    return supervised_checkpoints.step_folder(checkpoints, step)


def test_a_whole_one_is_read(tmp_path):
    _, newest = supervised(tmp_path, 9), supervised(tmp_path, 10)
    assert newest_complete(tmp_path) == (newest, Checkpoint(step=10, elapsed_s=1.5, rate_step=10))
    (tmp_path / "checkpoint-11").mkdir()  # without its manifest
    assert newest_complete(tmp_path)[1].step == 10 and newest_complete(tmp_path / "nowhere") is None
    state = supervised_checkpoints.read_trained(newest)
    assert state.keys() == tensors(10).keys() and all(torch.equal(state[name], each) for name, each in tensors(10).items())


def test_the_last_two_stay_and_steps_go_by_number(tmp_path):
    for step in (9, 10, 100):
        supervised(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text(""), flip], ids=["gone", "cut", "bit"])
def test_a_damaged_part_is_told_of_and_the_one_before_is_used(tmp_path, name, damage):
    supervised(tmp_path, 3)
    damage(supervised(tmp_path, 6) / name)
    told = []
    assert newest_complete(tmp_path, told.append)[1].step == 3
    assert told == [f"checkpoint checkpoint-6 is damaged ({name}); using the one before it"]
    damage(tmp_path / "checkpoint-3" / name)
    with pytest.raises(UserError, match="every checkpoint in .* is damaged .checkpoint-6, checkpoint-3.*delete them"):
        newest_complete(tmp_path)


def test_one_with_pickles_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "COMPLETE").write_text('{"step": 3, "elapsed_s": 1, "workers": 1, "zero_stage": 0}')
    with pytest.raises(UserError, match=r"checkpoint-3 was written by .*pickles, which can run code.*format 1.*format 2.*delete"):
        newest_complete(tmp_path)


STATE_3 = {"step": 3, "elapsed_s": 1.5, "rate_step": 3, "written_by": {"format": 2, "rlhf_ray": "0.2.0"}}


@pytest.mark.parametrize(
    "change", [{"x": 1}, {"step": None}, {"written_by": {"format": 3, "rlhf_ray": "9.0"}}, {"written_by": None}]
)
def test_a_state_of_another_code_is_refused(tmp_path, change):
    """Sealed, so that its bytes are those that were written."""
    state = {key: value for key, value in (STATE_3 | change).items() if value is not None}
    new_folder(tmp_path / "t")
    (tmp_path / "t" / "state.json").write_text(json.dumps(state))
    seal(tmp_path / "t", tmp_path / "checkpoint-3", {})
    with pytest.raises(UserError, match="is not what the stage has written|was written by rlhf-ray (9.0|an earlier)"):
        newest_complete(tmp_path)


def test_random_numbers_go_on_where_they_were(tmp_path):
    def drawn():
        return [torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1), random.random()]

    np.random.normal(), random.gauss(0, 1)  # each keeps a second number for the next draw
    write_tensors(tmp_path / "random-00-of-01.safetensors", random_state(), {})
    wanted = drawn()
    drawn()
    supervised_checkpoints.read_random(tmp_path, 0)
    assert drawn() == wanted
    supervised_checkpoints.read_random(tmp_path, 5)  # there are more ranks now
    assert drawn() == wanted

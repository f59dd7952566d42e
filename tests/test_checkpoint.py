"""Checkpoints: whole or not at all, checksummed, the last good ones kept, no pickle."""

import hashlib
import json
import pickletools
import zipfile

import pytest
import torch
from checkpoints import write_rank
from safetensors import safe_open
from safetensors.torch import load_file

from rlhf_ray.actors.checkpointing import publish_best
from rlhf_ray.actors.ppo_stage import copy_model
from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import UserError
from rlhf_ray.models.tensor_file import write_tensors
from rlhf_ray.ppo import checkpoint
from rlhf_ray.ppo.loop import LoopState
from rlhf_ray.ppo.stage_end import closing_figures
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.sealed import MANIFEST

STATE = {"step": 0, "kl_coef": 0.1 + 0.2, "best_score": None, "best_step": -1}


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {
        f"{key}/{name}": torch.randn(3, 2, generator=generator)
        for name in ("a", "b", "c")
        for key in ("weight", "exp_avg", "exp_avg_sq")
    }


def begin(folder, step, ranks=2):
    """What the ranks write, without publishing it -> its digests."""
    temporary = checkpoint.temporary_folder(folder, step)
    temporary.mkdir(parents=True)
    digests = {}
    for role in ("policy", "critic"):
        for rank in range(ranks):
            digests |= write_rank(temporary, role, rank, ranks, tensors(step).items(), steps_taken=10 * step)
    return digests


def save(folder, step, keep=2, ranks=2):
    return checkpoint.publish(folder, step, STATE | {"step": step}, keep, begin(folder, step, ranks))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("ranks", [1, 2, 20])
def test_what_was_written_is_read_whole_whatever_the_ranks(tmp_path, ranks):
    folder = save(tmp_path, 4, ranks=ranks)
    assert checkpoint.read_state(folder) == STATE | {"step": 4}
    for role in ("policy", "critic"):
        state, steps_taken = checkpoint.read_role(folder, role)
        files = [load_file(file) for file in folder.glob(f"{role}-*.safetensors")]
        assert len(files) == ranks and sum(map(len, files)) == len(tensors(4)), "each tensor is written once"
        assert steps_taken == 40 and state.keys() == tensors(4).keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors(4).items())


def test_there_is_none_at_first(tmp_path):
    assert checkpoint.last_good(tmp_path) is None
    assert checkpoint.last_good(tmp_path / "nowhere") is None


def test_the_last_ones_go_by_number(tmp_path):
    for step in (2, 9, 10, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ["step_000010", "step_000100"]
    assert checkpoint.last_good(tmp_path).name == "step_000100"


def test_keep_one_and_keep_many(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "one", step, keep=1)
        save(tmp_path / "many", step, keep=5)
    assert names(tmp_path / "one") == ["step_000003"]
    assert names(tmp_path / "many") == ["step_000001", "step_000002", "step_000003"]


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    save(tmp_path, 2)
    begin(tmp_path, 4)
    unpublished = tmp_path / "step_000006"  # as after a crash in a copy that somebody made
    unpublished.mkdir()
    (unpublished / "state.json").write_text("{}")
    assert checkpoint.last_good(tmp_path).name == "step_000002"


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-5])


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / "critic-01-of-02.safetensors"),
    "a cut file": lambda folder: cut(folder / "policy-00-of-02.safetensors"),
    "a lost file": lambda folder: (folder / "policy-01-of-02.safetensors").unlink(),
    "another state": lambda folder: (folder / "state.json").write_text("{}"),
    "a cut manifest": lambda folder: cut(folder / MANIFEST),
    "an empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_told_of_and_passed_over(tmp_path, damage):
    save(tmp_path, 2)
    damage(save(tmp_path, 4))
    told = []
    assert checkpoint.last_good(tmp_path, told.append).name == "step_000002"
    assert len(told) == 1 and "step_000004" in told[0]


def test_when_all_are_damaged_the_run_does_not_silently_start_anew(tmp_path):
    for step in (2, 4):
        flip(save(tmp_path, step) / "state.json")
    with pytest.raises(UserError, match="step_000004, step_000002"):
        checkpoint.last_good(tmp_path)


def test_after_a_damaged_one_the_new_ones_are_kept(tmp_path):
    """Step 8 is damaged, the run goes on from step 4 and saves step 6: that is the newest good one, and must stay."""
    save(tmp_path, 4)
    flip(save(tmp_path, 8) / "state.json")
    assert checkpoint.last_good(tmp_path).name == "step_000004"
    save(tmp_path, 6, keep=1)
    assert checkpoint.last_good(tmp_path).name == "step_000006"


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path):
    flip(save(tmp_path, 4) / "state.json")
    save(tmp_path, 4)
    assert checkpoint.last_good(tmp_path, pytest.fail).name == "step_000004"
    assert names(tmp_path) == ["step_000004"]


def test_there_is_no_pickle_in_it(tmp_path):
    for file in save(tmp_path, 1).iterdir():
        assert file.suffix in (".safetensors", ".json")
        assert not zipfile.is_zipfile(file), "torch.save's format"
        with pytest.raises((ValueError, UnicodeDecodeError, IndexError)):
            list(pickletools.genops(file.read_bytes()))


def test_the_manifest_names_every_file(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert sorted([*manifest, MANIFEST]) == names(folder)
    assert all(len(value) == 64 for value in manifest.values())


def test_a_rank_knows_the_digest_of_what_it_writes_without_reading_it_again(tmp_path):
    """Python's hashlib over the file, and safetensors' own reader on it."""
    digests = begin(tmp_path, 4)
    temporary = checkpoint.temporary_folder(tmp_path, 4)
    assert digests == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in temporary.iterdir()}
    assert len(digests) == 4


def test_tensors_of_every_type_are_written_as_safetensors_reads_them(tmp_path):
    tensors = {
        "a": torch.arange(7, dtype=torch.uint8), "b": torch.randn(3, 5), "c": torch.tensor(2.5, dtype=torch.float64),
        "d": torch.randn(2, 2, dtype=torch.bfloat16), "none": torch.empty(0, 4), "t": torch.arange(6).reshape(2, 3),
    }  # fmt: skip
    write_tensors(tmp_path / "x.safetensors", tensors, {"steps_taken": "3", "ü": "ß"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], each) and found[name].dtype == each.dtype for name, each in tensors.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"steps_taken": "3", "ü": "ß"}


def test_a_file_that_a_rank_should_have_written_and_has_not(tmp_path):
    digests = begin(tmp_path, 4)
    (checkpoint.temporary_folder(tmp_path, 4) / "policy-01-of-02.safetensors").unlink()
    with pytest.raises(OSError, match="has no policy-01-of-02.safetensors, which should have been written"):
        checkpoint.publish(tmp_path, 4, STATE, 2, digests)
    assert checkpoint.last_good(tmp_path) is None


def test_a_byte_that_changes_between_the_rank_and_the_disk_is_found(tmp_path):
    """The digest is that of what the rank meant to write, not of what stands there afterwards."""
    digests = begin(tmp_path, 2)
    checkpoint.publish(tmp_path, 2, STATE, 2, digests)
    digests = begin(tmp_path, 4)
    flip(checkpoint.temporary_folder(tmp_path, 4) / "critic-00-of-02.safetensors")
    checkpoint.publish(tmp_path, 4, STATE | {"step": 4}, 2, digests)
    assert checkpoint.last_good(tmp_path).name == "step_000002"


def test_one_of_another_format_is_refused_in_words(tmp_path):
    folder = save(tmp_path, 4)
    state = json.loads((folder / "state.json").read_text())
    assert state.pop("written_by")["format"] == 1
    (folder / "state.json").write_text(json.dumps(state))  # as earlier versions have written it
    assert checkpoint.read_state(folder) == STATE | {"step": 4}
    (folder / "state.json").write_text(json.dumps(state | {"written_by": {"format": 9, "rlhf_ray": "3.1"}}))
    with pytest.raises(UserError, match=r"step_000004 was written by rlhf-ray 3.1 \(format 9\), and this .*format 1.*go on with"):
        checkpoint.read_state(folder)


def test_bfloat16_state_is_written_as_float32(tmp_path):
    write_rank(tmp_path, "policy", 0, 1, [("weight/a", torch.ones(2, dtype=torch.bfloat16))], 1)
    assert checkpoint.read_role(tmp_path, "policy")[0]["weight/a"].dtype == torch.float32


# -- the best policy --------------------------------------------------------------------------------------------------


def candidate(folder, step):
    path = folder.candidate(step)
    path.mkdir(parents=True)
    (path / "weights").write_text(f"of step {step}")


def test_the_best_policy_is_that_of_the_newest_checkpoint(tmp_path):
    """What was the best one on the way to a checkpoint that was never written is not the best of this run."""
    folder = RunFolder(tmp_path)
    for step in (2, 4):
        candidate(folder, step)
    publish_best(folder, LoopState(kl_coef=0.1, step=6, best_step=4))
    assert (folder.best_model / "weights").read_text() == "of step 4"
    candidate(folder, 8)  # a later step's, while the checkpoint of step 6 was still being written
    publish_best(folder, LoopState(kl_coef=0.1, step=6, best_step=4))
    assert folder.candidate(8).exists()
    # Then the run died, and went on from the checkpoint of step 6.
    publish_best(folder, LoopState(kl_coef=0.1, step=6, best_step=4), only=True)
    assert (folder.best_model / "weights").read_text() == "of step 4"
    assert [path.name for path in folder.stage("ppo").path.iterdir()] == ["best"]
    copy_model(folder.best_model, folder.stage("ppo").model)
    copy_model(folder.best_model, folder.stage("ppo").model)
    assert (folder.stage("ppo").model / "weights").read_text() == "of step 4"
    assert sorted(path.name for path in folder.stage("ppo").path.iterdir()) == ["best", "model"]


def test_closing_figures_say_whose_weights_the_model_has():
    state = LoopState(kl_coef=0.1, step=6, best_score=2.0, best_step=4, worse_since=2)
    back = closing_figures(state, PPOConfig(steps=10, patience=2, roll_back=True))
    assert (back["model_step"], back["ended_by"], back["best_by"]) == (4, "patience", "score")
    stays = closing_figures(state, PPOConfig(steps=6))
    assert (stays["model_step"], stays["ended_by"], stays["best_step"]) == (6, "steps", 4)
    never = LoopState(kl_coef=0.1, step=6)  # no evaluation at all
    assert closing_figures(never, PPOConfig(steps=6, roll_back=True))["model_step"] == 6

"""A run in a store on several hosts without a shared disk. Here a host is a folder of its own."""

import json
import shutil
import uuid
from dataclasses import replace

import pytest
import torch
from checkpoints import write_rank
from stores import Toy, look_until_level, mirror_of, tree
from tiny import tiny_recipe

from rlhf_ray.actors.checkpointing import Checkpoints
from rlhf_ray.errors import RunFailed
from rlhf_ray.ppo import checkpoint
from rlhf_ray.ppo.loop import LoopState
from rlhf_ray.runs import elsewhere
from rlhf_ray.runs.contents import HANDED
from rlhf_ray.runs.elsewhere import arrive, arrive_at, hand_in, handed_over, handing_in, is_elsewhere, take_in, take_up
from rlhf_ray.runs.remote import in_store
from rlhf_ray.runs.remote_store import Store
from rlhf_ray.runs.run_folder import COPIES, RunFolder, working_copy


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run under way on its own host; its folder."""
    monkeypatch.setenv(COPIES, str(tmp_path / "copies"))
    url = f"memory:///{uuid.uuid4().hex}/run"
    with in_store(RunFolder(working_copy(url), url), 20, every_s=0.05) as stored:
        toy = Toy(stored.folder.path)
        toy.model("sft/model", 1)
        (stored.folder.path / "ppo").mkdir()
        toy.step(1)
        stored.finish(20)
        yield stored.folder


@pytest.fixture
def away(run, tmp_path):
    """The same on another host."""
    return replace(run, path=tmp_path / "host")


def test_who_is_elsewhere(run, away, tmp_path):
    assert not is_elsewhere(RunFolder(tmp_path)), "a folder that no store mirrors is shared"
    assert not is_elsewhere(run) and is_elsewhere(away)
    away.path.mkdir()
    shutil.copy(run.path / ".lineage.json", away.path)
    assert not is_elsewhere(away), "the same file: a disk that both see"
    (away.path / ".lineage.json").write_text(json.dumps({"session": "of a run before", "previous": "", "stored": True}))
    assert is_elsewhere(away)


def test_a_process_elsewhere_fetches_models_and_data_and_not_what_it_has_no_use_for(run, away):
    (away.path / "reward/model").mkdir(parents=True)
    (away.path / "reward/model/config.json").write_text("of a run before")
    arrive(away)
    assert sorted(tree(away.path)) == ["recipe.yaml", "sft/model/config.json", "sft/model/model.safetensors"]
    arrive_at(away, away.path / "ppo/checkpoints/step_000001")
    assert {name for name in tree(away.path) if name.startswith("ppo/")} == {
        f"ppo/checkpoints/step_000001/{name}" for name in ("MANIFEST.json", "policy.safetensors", "state.json")
    }
    before = tree(run.path)
    arrive(run)
    assert tree(run.path) == before


def test_what_does_not_come_is_said_at_the_deadline(away, monkeypatch):
    monkeypatch.setattr(elsewhere, "ARRIVE_S", 0.1)
    monkeypatch.setattr(elsewhere, "LOOK_S", 0.02)
    arrive(away)
    with pytest.raises(RunFailed, match="the checkpoint ppo/checkpoints/step_000009 did not come to memory:"):
        arrive_at(away, away.path / "ppo/checkpoints/step_000009")


def test_folders_and_files_handed_in_appear_whole_on_the_host_of_the_run(run, away):
    Toy(away.path).model("ppo/model", 4)
    (away.path / "ppo/one.txt").write_text("one")
    run.stage("ppo").model.mkdir()
    (run.stage("ppo").model / "old.txt").write_text("of a model before")
    hand_in(away, away.path / "ppo/model", away.path / "ppo/one.txt")
    take_in(run, run.path / "ppo/model", run.path / "ppo/one.txt", run.path / "ppo/never.txt")
    assert tree(run.path / "ppo/model") == tree(away.path / "ppo/model")
    assert (run.path / "ppo/one.txt").read_text() == "one"
    assert Store(run.url).names(HANDED) == []
    hand_in(run, run.path / "ppo/model")
    assert Store(run.url).names(HANDED) == [], "from the run's own host nothing goes anywhere"


def test_a_damaged_file_is_not_taken_in(run, away):
    Toy(away.path).model("ppo/model", 4)
    hand_in(away, away.path / "ppo/model")
    (Store(run.url) / HANDED).write("ppo/model/model.safetensors", b"half", 1)
    with pytest.raises(RunFailed, match="is not what the other host has written"):
        take_in(run, run.path / "ppo/model")
    assert not (run.path / "ppo/model").exists()


class Ranks:
    """A group's ranks on several hosts: what `groups.TrainerGroup` is to `Checkpoints`."""

    weight_bytes = 8

    def __init__(self, role, folders):
        self.role, self.folders, self.digests = role, folders, {}

    def call(self, method, *args):
        return [getattr(self, method)(number, folder, *args) for number, folder in enumerate(self.folders)]

    def save(self, number, folder, temporary):
        place = folder.path / temporary.relative_to(self.folders[0].path)
        place.mkdir(parents=True, exist_ok=True)
        state = [(f"weight/{name}", torch.full((2,), float(name))) for name in range(4)]
        self.digests[number] = write_rank(place, self.role, number, len(self.folders), state, 3)
        hand_in(folder, *(place / name for name in self.digests[number]))

    def saved(self, number, folder, wait):
        return self.digests[number]


def test_a_checkpoint_is_put_together_from_the_disks_of_its_ranks(run, away):
    groups = [Ranks("policy", [run, away]), Ranks("critic", [run, run])]
    checkpoints = Checkpoints(tiny_recipe(), run, groups, lambda handles, what: handles, pytest.fail)
    assert checkpoints.save(LoopState(kl_coef=0.1, step=2))
    checkpoints.finish()
    folder = checkpoint.last_good(run.stage("ppo").checkpoints, pytest.fail)
    assert folder.name == "step_000002"
    state, steps = checkpoint.read_role(folder, "policy")
    assert steps == 3
    assert {name: each.tolist() for name, each in state.items()} == {f"weight/{n}": [float(n)] * 2 for n in range(4)}


def test_the_folder_of_a_stage_grows_on_the_host_of_the_run_and_its_stop_goes_the_other_way(run, away, monkeypatch):
    monkeypatch.setattr(elsewhere, "EVERY_S", 0.05)
    there = Toy(away.path)
    with handing_in(away, "ppo"):
        there.step(2)
        there.step(3)
        run.stage("ppo").stop_file.touch()
        for _ in range(400):
            take_up(run, "ppo")
            if away.stage("ppo").stop_file.exists():
                break
        assert away.stage("ppo").stop_file.exists()
    run.stage("ppo").stop_file.unlink()
    take_up(run, "ppo")
    assert tree(run.path / "ppo/checkpoints") == tree(away.path / "ppo/checkpoints")
    assert (run.path / "ppo/metrics.jsonl").read_text() == (away.path / "ppo/metrics.jsonl").read_text()
    handed_over(run, "ppo")
    assert Store(run.url).names(HANDED) == []


def test_what_is_on_its_way_is_not_swept(run, away, tmp_path):
    there = Toy(away.path)
    (away.path / "ppo").mkdir()
    there.step(5)
    hand_in(away, away.path / "ppo/checkpoints/step_000005")
    look_until_level(mirror_of(Toy(tmp_path / "third").path, Store(run.url)))
    assert len(Store(run.url).names(HANDED)) == 4

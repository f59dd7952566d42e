"""A supervised stage that goes on from its checkpoint: the same bits, other numbers of ranks, damage, pickles, a full disk."""

import builtins
import math
import os
import pickle
import shutil
import signal
from collections import namedtuple

import pytest
import torch
from cats import STAGE, cats_folder, cats_tokenizer, plain_sft, recipe_of  # noqa: F401 - fixtures
from processes import wait_for
from ranks import on_ranks, train
from safetensors.torch import load_file, save_file

from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.sealed import MANIFEST, seal
from rlhf_ray.supervised.checkpoints import newest_complete, read_trained

STEPS = 8
SFT = STAGE | {"max_steps": STEPS, "learning_rate": 1e-2, "threads": 1}


def new_run(folder, path):
    path.mkdir()
    run = RunFolder(path / "run")
    run.path.mkdir()
    os.symlink(folder.path / "data", run.path / "data")
    return run


def stopped(run, recipe, world=1):
    """Trained for a step, then asked to stop."""
    stage = run.stage("sft")
    stage.path.mkdir(exist_ok=True)
    stage.stop_file.touch()
    train((recipe, run, ("sft",)), world=world)
    stage.stop_file.unlink()
    return stage


def copied(run, path):
    return RunFolder(shutil.copytree(run.path, path / "run", symlinks=True))


@pytest.fixture(scope="module")
def once(folder, tmp_path_factory):
    """A run that was stopped after a step; tests go on with copies."""
    run = new_run(folder, tmp_path_factory.mktemp("once") / "a")
    stopped(run, recipe_of(sft=SFT))
    return run


@pytest.fixture(scope="module")
def twice(once, tmp_path_factory):
    """The same, stopped again after its second step."""
    run = copied(once, tmp_path_factory.mktemp("twice"))
    stopped(run, recipe_of(sft=SFT))
    return run


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    run = new_run(folder, tmp_path_factory.mktemp("undisturbed") / "run")
    train((recipe_of(sft=SFT), run, ("sft",)))
    return run.stage("sft")


def weights(stage):
    return load_file(stage.model / "model.safetensors")


class Bomb:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return builtins.open, (str(self.path), "w")


def test_stopped_twice_it_ends_in_the_undisturbed_bits_and_reads_no_pickle(once, twice, undisturbed, tmp_path):
    """Between the two, what an attacker would put there: files that earlier versions and Trainer itself would have unpickled."""
    (checkpoint,) = once.stage("sft").checkpoints.iterdir()
    assert {file.suffix for file in checkpoint.iterdir()} == {".json", ".safetensors"}
    run, recipe = copied(twice, tmp_path), recipe_of(sft=SFT)
    stage = run.stage("sft")
    newest, found = newest_complete(stage.checkpoints)
    assert found.step == 2 and len(list(stage.checkpoints.iterdir())) == 2
    exploded = tmp_path / "exploded"
    for name in ("rng_state.pth", "scheduler.pt", "optimizer.pt", "training_args.bin", "latest", "global_step2/states.pt"):
        (newest / name).parent.mkdir(exist_ok=True)
        (newest / name).write_bytes(pickle.dumps(Bomb(exploded)))
    train((recipe, run, ("sft",)))
    assert stage.summary()["steps"] == STEPS and not exploded.exists()
    assert [row["step"] for row in read_metrics(stage.metrics)] == list(range(1, STEPS + 1))
    assert all(torch.equal(weights(stage)[name], each) for name, each in weights(undisturbed).items())


@pytest.mark.parametrize(("before", "after"), [((2, 3), (1, 0)), pytest.param((1, 0), (2, 2), marks=pytest.mark.thorough)])
def test_it_goes_on_with_other_workers_and_another_zero_stage(folder, undisturbed, tmp_path, before, after):
    run = new_run(folder, tmp_path / "a")

    def recipe(ranks, zero_stage):
        return recipe_of(sft=SFT | {"workers": ranks, "microbatch_size": 8 // ranks, "zero_stage": zero_stage})

    stage = stopped(run, recipe(*before), world=before[0])
    names = [file.name for file in (stage.checkpoints / "checkpoint-1").glob("trained-*")]
    assert len(names) == before[0]
    train((recipe(*after), run, ("sft",)), world=after[0])
    assert stage.summary()["steps"] == STEPS
    model = plain_sft(recipe(*after), run, STEPS)[0]
    trained = dict(load_causal_lm(stage.model).named_parameters())
    assert max(float((each - trained[name]).detach().abs().max()) for name, each in model.named_parameters()) < 2e-3
    other = weights(undisturbed)
    assert max(float((each - other[name]).abs().max()) for name, each in weights(stage).items()) < 2e-3


def test_after_a_flipped_byte_it_goes_on_from_the_one_before_to_the_same_bits(twice, undisturbed, tmp_path):
    run, recipe = copied(twice, tmp_path), recipe_of(sft=SFT)
    stage = run.stage("sft")
    file = stage.checkpoints / "checkpoint-2" / "trained-00-of-01.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train((recipe, run, ("sft",)))
    assert [row["step"] for row in read_metrics(stage.metrics)] == list(range(1, STEPS + 1))
    assert all(torch.equal(weights(stage)[name], each) for name, each in weights(undisturbed).items())


def _on_a_slow_disk(rank, world, values, path):
    """On a rank: checkpoints of steps 1 and 5. The disk takes each two steps later, and the process is killed in the second."""
    from rlhf_ray.config import Recipe
    from rlhf_ray.supervised import resumable
    from rlhf_ray.supervised.sft import train_sft
    from rlhf_ray.supervised.stage_trainer import StageCallback

    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    run, step_ends, writes = RunFolder(path), StageCallback.on_step_end, resumable.write_tensors

    def on_step_end(callback, args, state, control, **more):
        callback.saved_s = -math.inf if state.global_step in (1, 5) else math.inf
        step_ends(callback, args, state, control, **more)

    def write(file, tensors, metadata):
        step = int(file.parent.name.removeprefix(".checkpoint-").removesuffix(".tmp"))
        wait_for(lambda: len(read_metrics(run.stage("sft").metrics)) >= step + 2, seconds=60)
        digest = writes(file, tensors, metadata)
        if step == 5:
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return digest

    StageCallback.on_step_end, resumable.write_tensors = on_step_end, write
    return train_sft(Recipe.model_validate(values), run, "sft")


def test_steps_go_on_while_a_checkpoint_is_written_and_one_that_was_cut_off_is_not_used(folder, undisturbed, tmp_path):
    run, recipe = new_run(folder, tmp_path / "a"), recipe_of(sft=SFT)
    stage = run.stage("sft")
    stage.path.mkdir()
    with pytest.raises(Exception, match="SIGKILL"):
        on_ranks(_on_a_slow_disk, 1, recipe.model_dump(mode="json"), run.path)
    assert len(read_metrics(stage.metrics)) >= 7, "the steps after it did not wait for the disk"
    assert (stage.checkpoints / ".checkpoint-5.tmp" / "trained-00-of-01.safetensors").exists()
    assert newest_complete(stage.checkpoints)[1].step == 1
    train((recipe, run, ("sft",)))  # so what was written late was the state of its step
    assert [row["step"] for row in read_metrics(stage.metrics)] == list(range(1, STEPS + 1))
    assert all(torch.equal(weights(stage)[name], each) for name, each in weights(undisturbed).items())


def test_without_its_optimiser_part_it_is_refused(once, tmp_path):
    """Sealed anew, so that only what is in it speaks against it."""
    run, recipe = copied(once, tmp_path), recipe_of(sft=SFT)
    checkpoint = run.stage("sft").checkpoints / "checkpoint-1"
    state = read_trained(checkpoint)
    assert {name.partition("/")[0] for name in state} == {"weight", "exp_avg", "exp_avg_sq"}
    weights = {name: each for name, each in state.items() if not name.startswith("exp_avg_sq")}
    save_file(weights, checkpoint / "trained-00-of-01.safetensors")
    (checkpoint / MANIFEST).unlink()
    checkpoint.rename(checkpoint.with_name("t"))
    seal(checkpoint.with_name("t"), checkpoint, {})
    with pytest.raises(Exception, match=r"checkpoint-1 has no optimiser moments \(exp_avg_sq\) for .*delete it to go on"):
        train((recipe, run, ("sft",)))


Usage = namedtuple("Usage", "total used free")


def _full_disk(rank, world, values, path, free):
    """On a rank: the stage with a disk that has that many bytes free."""
    from rlhf_ray.config import Recipe
    from rlhf_ray.runs import disk
    from rlhf_ray.supervised.sft import train_sft

    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    disk.shutil = shutil_with(free)
    return train_sft(Recipe.model_validate(values), RunFolder(path), "sft")


class shutil_with:
    def __init__(self, free):
        self.disk_usage = lambda folder: Usage(10**12, 10**12 - free, free)
        self.rmtree = shutil.rmtree


def test_without_room_it_says_so_and_trains_on(once, undisturbed, tmp_path):
    run, recipe = copied(once, tmp_path), recipe_of(sft=SFT | {"checkpoint_minutes": 1e-6})
    stage = run.stage("sft")
    (summary,) = on_ranks(_full_disk, 1, recipe.model_dump(mode="json"), run.path, 10_000)
    assert summary["steps"] == STEPS
    assert newest_complete(stage.checkpoints)[1].step == 1, "the last good one stays"
    events = EventLog(run.events).read()
    assert [event["step"] for event in events] == list(range(2, STEPS + 1))
    assert "no checkpoint of step 2 is written: the file system of" in events[0]["what"] and "10 kB free" in events[0]["what"]
    assert events[0]["done"] == "sft goes on; the last good one is of step 1"
    assert all(torch.equal(weights(stage)[name], each) for name, each in weights(undisturbed).items())

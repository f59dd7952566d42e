"""Actors of the PPO stage die at named points, and the run ends in the undisturbed run's bits. Real actors, real SIGKILLs."""

import hashlib
import json
import os
import shutil
from collections import Counter

import pytest
from safetensors.torch import load_file
from tiny import tiny_recipe, write_start

from rlhf_ray.actors import faults
from rlhf_ray.actors.groups import PolicyGroup
from rlhf_ray.actors.ppo_stage import run_ppo
from rlhf_ray.actors.session import ray_session
from rlhf_ray.errors import RunFailed
from rlhf_ray.ppo.checkpoint import last_good, read_role
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder

pytestmark = pytest.mark.ray

STEPS, PROMPTS, BATCH = 4, 16, 8  # of tiny_recipe
UPDATES = STEPS * 2 * 2  # epochs, minibatches


@pytest.fixture(scope="module")
def faults_file(tmp_path_factory):
    return tmp_path_factory.mktemp("faults") / "faults.json"


@pytest.fixture(scope="module")
def session(faults_file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faults.VARIABLE, str(faults_file))
        with ray_session(None):
            yield


@pytest.fixture(scope="module")
def run_with(session, faults_file, tmp_path_factory):
    """Run the tiny recipe with faults -> what there is to look at."""

    def run(listed, **sections):
        folder = write_start(tiny_recipe(), RunFolder(tmp_path_factory.mktemp("run")))
        for kind in ("calls", "processes"):
            shutil.rmtree(faults_file.with_name(f"{faults_file.name}.{kind}"), ignore_errors=True)
        faults_file.write_text(json.dumps(listed))
        with pytest.MonkeyPatch.context() as patch:
            return Ended(folder, tiny_recipe(**sections), patch)

    return run


class Ended:
    """A finished run: its events, its words, its tensors, and which samples each step trained on."""

    def __init__(self, folder, recipe, patch):
        self.folder, self.said, self.trained = folder, [], {}
        update = PolicyGroup.update

        def audited(group, shards, *rates):
            chunks = shards[0].call.chunks()
            samples = [each for c in chunks for each in zip(c.prompt_indices, c.sample_indices, strict=True)]
            self.trained[chunks[0].step] = samples  # a step that is given up is trained again: the last one counts
            return update(group, shards, *rates)

        patch.setattr(PolicyGroup, "update", audited)
        run_ppo(recipe, folder, lambda progress: self.said.append(progress.get("say", "")))

    @property
    def events(self):
        return EventLog(self.folder.events).read()

    def digest(self):
        """SHA-256 of the final model, and of policy and critic with their optimisers."""
        stage, found = self.folder.stage("ppo"), hashlib.sha256()
        tensors = load_file(stage.model / "model.safetensors")
        for role in ("policy", "critic"):
            state, steps = read_role(last_good(stage.checkpoints), role)
            assert steps == UPDATES
            tensors |= {f"{role}/{name}": tensor for name, tensor in state.items()}
        for name in sorted(tensors):
            found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
        return found.hexdigest()

    def metrics(self):
        """What does not depend on the machine's speed."""
        return [{name: value for name, value in row.items() if name.startswith(("objective/", "policy/", "value/", "eval/", "step"))}
                for row in read_metrics(self.folder.stage("ppo").metrics)]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(run_with):
    ended = run_with([])
    assert not ended.events
    return ended


def same(ended, undisturbed):
    """The same bits and figures, and every sample once per epoch."""
    assert ended.digest() == undisturbed.digest()
    assert ended.metrics() == undisturbed.metrics()
    assert ended.folder.stage("ppo").summary() == undisturbed.folder.stage("ppo").summary()
    assert sorted(ended.trained) == list(range(STEPS))
    for epoch in range(STEPS * BATCH // PROMPTS):
        steps = range(epoch * PROMPTS // BATCH, (epoch + 1) * PROMPTS // BATCH)
        assert Counter(each for step in steps for each in ended.trained[step]) == Counter((prompt, 0) for prompt in range(PROMPTS))


def kill(role, method, call, when="before", rank=0, **more):
    return {"role": role, "rank": rank, "method": method, "call": call, "when": when, "kind": "kill", **more}


def test_each_stateless_role_dies_once(run_with, undisturbed):
    # Calls of the evaluation at the start: two of a role that works on chunks, then two per step.
    ended = run_with([
        kill("generation", "generate", 4), kill("generation", "load_weights", 3), kill("reward", "score", 6, "after"),
        kill("reference", "logprobs", 1), kill("experience", "assemble", 3), 
    ])  # fmt: skip
    same(ended, undisturbed)
    print(*ended.said, sep="\n")
    for e in ended.events: print(e)


def test_ranks_of_policy_and_critic_die(run_with, undisturbed):
    ended = run_with([kill("policy", "update", 2, "after"), kill("critic", "update", 3), kill("policy", "save", 2)])
    same(ended, undisturbed)
    print(*ended.said, sep="\n")
    for e in ended.events: print(e)

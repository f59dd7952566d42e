"""Actors of the PPO stage die at named points, and the run ends in the undisturbed run's bits. Real actors, real SIGKILLs."""

import hashlib
import json
import re
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
        kinds = ("objective/", "policy/", "value/", "eval/", "step")
        rows = read_metrics(self.folder.stage("ppo").metrics)
        return [{name: value for name, value in row.items() if name.startswith(kinds)} for row in rows]


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
    each_once(ended)


def each_once(ended):
    """Each sample, once per epoch."""
    assert sorted(ended.trained) == list(range(STEPS))
    for epoch in range(STEPS * BATCH // PROMPTS):
        steps = range(epoch * PROMPTS // BATCH, (epoch + 1) * PROMPTS // BATCH)
        assert Counter(each for step in steps for each in ended.trained[step]) == Counter((prompt, 0) for prompt in range(PROMPTS))


def kill(role, method, call, when="before", rank=0, **more):
    return {"role": role, "rank": rank, "method": method, "call": call, "when": when, "kind": "kill", **more}


STATELESS = [
    # Of the evaluation before the first step there are two calls of a role that works on chunks; of each step two more.
    kill("generation", "generate", 4), kill("generation", "load_weights", 3), kill("reward", "score", 6, "after"),
    kill("reference", "logprobs", 1), kill("experience", "assemble", 3),
]  # fmt: skip
TRAINED = [kill("policy", "update", 2, "after"), kill("critic", "update", 4), kill("policy", "save", 2)]


def test_an_actor_of_each_stateless_role_dies(run_with, undisturbed):
    ended = run_with(STATELESS)
    same(ended, undisturbed)
    roles = [event["role"] for event in ended.events]
    assert sorted(roles) == ["experience", "generation", "generation", "reference", "reward"]
    for event in ended.events:
        assert event["what"] == f"{event['role']} actor 0 was lost" and event["done"].startswith("made again, ")
        assert event["steps_lost"] == 0 and event["cost_s"] > 0 and "died" in event["seen"]
    where = {(event["role"], event["step"], event["phase"]) for event in ended.events}
    assert {("generation", 0, "generation (step 0)"), ("experience", 2, "assembling (step 2)")} <= where
    assert sum("actor 0 was lost after step" in line for line in ended.said) == 5


def test_ranks_of_policy_and_critic_die(run_with, undisturbed):
    """After an update, in a checkpoint, in an update: only what came after the newest snapshot is done again."""
    ended = run_with(TRAINED)
    same(ended, undisturbed)
    # The first save is that of the restored state, so that a lost rank never leaves a run without a checkpoint on disk.
    assert [(event["what"], event["step"], event["steps_lost"]) for event in ended.events] == [
        ("policy rank 0 was lost", 1, 0), ("policy rank 0 was lost", 2, 0), ("critic rank 0 was lost", 2, 0),
    ]  # fmt: skip
    assert [event["done"][-12:] for event in ended.events] == [f"{step} (snapshot)" for step in (1, 2, 2)]


def test_a_call_that_ends_two_actors_stops_the_run_and_names_its_samples(run_with):
    with pytest.raises(RunFailed, match="reward actor 0 died 2 times at the same call, score .*no third try") as told:
        run_with([kill("reward", "score", call) for call in (3, 4)])
    assert re.search(r"Its samples: step 0, prompt \d+, sample 0; step 0, prompt \d+, sample 0; ", str(told.value))


# -- the whole matrix ------------------------------------------------------------------------------------------------

VICTIMS = ("generation", "reward", "reference", "experience", "policy", "critic")
POINTS = {
    "generate": ("generation", "generate", 5),
    "score": ("reward", "score", 6),
    "assemble": ("experience", "assemble", 2),
    "update": ("policy", "update", 3),
    "sync": ("policy", "weights", 3),
    "evaluate": ("experience", "evaluate", 2),
    "checkpoint": ("critic", "save", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("phase", POINTS)
@pytest.mark.parametrize("victim", VICTIMS)
def test_any_actor_dies_in_any_phase(run_with, undisturbed, victim, phase, when):
    ended = run_with([kill(*POINTS[phase], when, victim=f"{victim}-0")])
    same(ended, undisturbed)
    # After the last call to a role nobody misses it.
    assert all(event["role"] == victim for event in ended.events) and len(ended.events) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_stopped_process_is_a_dead_one(run_with, undisturbed, victim):
    """SIGSTOP: it is there, and never answers."""
    role, method, call = {"policy": POINTS["update"], "critic": ("critic", "update", 2), "reference": ("reference", "logprobs", 5)
                          }.get(victim) or next(point for point in POINTS.values() if point[0] == victim)  # fmt: skip
    ended = run_with([kill(role, method, call) | {"kind": "stop"}], resources={"call_timeout_s": 20})
    same(ended, undisturbed)
    assert victim in {event["role"] for event in ended.events} and any("waited" in event["seen"] for event in ended.events)


@pytest.mark.slow
def test_without_snapshots_the_last_checkpoint_serves(run_with, undisturbed):
    ended = run_with([kill("critic", "update", 2), kill("critic", "update", 6)], resources={"snapshot_gb": 0})
    same(ended, undisturbed)
    # Of the second step there is nothing yet; of the fourth there is the checkpoint of the second.
    assert [event["done"].partition("state of ")[2] for event in ended.events] == ["step 0 (the start)", "step 2 (step_000002)"]
    assert [event["steps_lost"] for event in ended.events] == [1, 1]


@pytest.mark.slow
def test_a_snapshot_every_three_steps(run_with, undisturbed):
    ended = run_with([kill("policy", "update", 3)], resources={"snapshot_every": 3}, ppo={"checkpoint_every": 4})
    assert ended.digest() == undisturbed.digest() and ended.metrics() == undisturbed.metrics()
    assert [event["steps_lost"] for event in ended.events] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("method", ["update", "weights", "save"])
def test_one_of_two_ranks_dies(run_with, zero_stage, method):
    """The other one waits for it in a collective, or its connection breaks."""
    group = {"actors": 2, "zero_stage": zero_stage}
    sections = {"resources": {"policy": group, "critic": group}}
    ended = run_with([kill("policy", method, 2, rank=1)], **sections)
    same(ended, run_with([], **sections))
    assert [event["role"] for event in ended.events] == ["policy"]


@pytest.mark.slow
def test_over_a_channel_generators_and_policy_go_together(run_with, undisturbed):
    ended = run_with([kill("generation", "generate", 5), kill("policy", "update", 3)], resources={"weight_transport": "collective"})
    same(ended, undisturbed)
    assert len(ended.events) == 2


@pytest.mark.slow
def test_adapters_have_no_reference_actor(run_with):
    sections = {"ppo": {"lora": {"rank": 2}}}
    ended = run_with([kill("policy", "reference_logprobs", 5), kill("generation", "generate", 6)], **sections)
    same(ended, run_with([], **sections))
    assert len(ended.events) == 2


@pytest.mark.slow
def test_one_step_ahead_each_sample_is_trained_once(run_with):
    """Not bit for bit: which version draws a sample depends on time."""
    faults_ = [kill("generation", "generate", 5), kill("policy", "update", 2), kill("reward", "score", 7)]
    ended = run_with(faults_, ppo={"steps_ahead": 1})
    each_once(ended)
    assert len(ended.events) == 3 and [row["step"] for row in ended.metrics()] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_an_error_of_the_roles_own_code_is_no_death(run_with):
    with pytest.raises(RuntimeError, match="a fault for tests"):
        run_with([kill("reference", "logprobs", 2) | {"kind": "exception"}])

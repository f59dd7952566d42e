"""Generation ahead of training: the order of things."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
from loops import Diary, ScriptedRoles, scripted_loop

from rlhf_ray.config import PPOConfig
from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.errors import UserError
from rlhf_ray.ppo.gates import MismatchError
from rlhf_ray.ppo.loop import LoopState

NAN = float("nan")


@dataclass
class QueueingRoles(ScriptedRoles):
    """Generators that do what they are asked in order: a rollout is (its chunk, the version that was sent before it)."""

    version: int = 0
    trained: list[tuple] = field(default_factory=list)  # (chunk, version) of each update
    own_gap: float = 0.0
    importance: float = 1.0
    causes: list[tuple] = field(default_factory=list)  # (handle, those that it needs)
    synced: list = field(default_factory=list)

    def generate(self, chunks):
        self._log("generate", chunks[0].step, "evaluation" if chunks[0].evaluation else "training")
        rollouts = self._answer("generate", *((chunk, self.version) for chunk in chunks))
        self.causes += [(rollout, self.synced) for rollout in rollouts]
        return rollouts

    def load_weights(self, weights, policy_version):
        self.version = policy_version
        self.synced = super().load_weights(weights, policy_version)
        self.causes += [(handle, weights) for handle in self.synced]
        return self.synced

    def assemble(self, rollouts, *rest):
        handle, *shards = super().assemble(rollouts, *rest)
        self.causes.append((handle, [*rollouts, *(each for part in rest[:-1] for each in part)]))
        drawn = [rollout.value for rollout in rollouts]
        self.trained += drawn
        ages = [chunk.step - version for chunk, version in drawn]
        handle.value |= {"rollout/age_max": float(max(ages)), "rollout/importance_mean": self.importance}
        if max(ages) > 0:
            for name in ("p99", "kl"):
                del handle.value[f"policy/mismatch_{name}"]
        return handle, *shards

    def own_mismatch(self, rollouts, logprobs):
        self._log("own_mismatch")
        assert {handle.verb for handle in logprobs} == {"logprobs"}
        assert all(chunk.evaluation and version == chunk.step for chunk, version in (each.value for each in rollouts))
        return self._answer("own_mismatch", {"policy/mismatch_p99": self.own_gap, "policy/mismatch_kl": 0.0})[0]


def run_queueing(diary=None, state=None, **options):
    roles, diary = QueueingRoles(kl=3.0), diary or Diary()
    finished = scripted_loop(roles, diary, state, **{"steps_ahead": 1, **options}).run()
    return roles, diary, finished


def test_a_later_step_is_asked_for_before_an_earlier_one_is_trained_on():
    roles, _, _ = run_queueing(steps=3, eval_every=3)
    told = [event for event in roles.events if event[0] in ("generate", "load_weights", "update", "evaluate")]
    assert [(verb, *what[:2]) for verb, *what in told] == [
        ("load_weights", 0), ("generate", 0, "evaluation"), ("evaluate",),
        ("generate", 0, "training"), ("generate", 1, "training"),
        ("update", "policy shard", pytest.approx(1e-5)), ("update", "critic shard", pytest.approx(1e-5)),
        ("load_weights", 1), ("generate", 2, "training"),
        ("update", "policy shard", pytest.approx(1e-5 * 2 / 3)), ("update", "critic shard", pytest.approx(1e-5 * 2 / 3)),
        ("load_weights", 2),
        ("update", "policy shard", pytest.approx(1e-5 / 3)), ("update", "critic shard", pytest.approx(1e-5 / 3)),
        ("load_weights", 3), ("generate", 3, "evaluation"), ("evaluate",),
    ]  # fmt: skip


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("steps_ahead", [1, 2, 5, 9])
def test_no_sample_is_older_than_the_steps_ahead_and_none_is_left_out(steps_ahead, in_flight):
    """7 steps of 4 of 10 prompts, an epoch of 8. All of a step are drawn by weights that were sent steps_ahead before."""
    roles, diary, finished = run_queueing(steps_ahead=steps_ahead, weights_in_flight=in_flight)
    assert finished and diary.steps() == list(range(8))
    assert [version for chunk, version in roles.trained] == [
        max(0, chunk.step - steps_ahead) for chunk, _ in roles.trained
    ]
    ages = [metrics["rollout/age_max"] for _, metrics in diary.records[1:]]
    assert ages == [min(step, steps_ahead) for step in range(7)]
    counts = Counter((chunk.step, prompt) for chunk, _ in roles.trained for prompt in chunk.prompt_indices)
    assert len(counts) == 28 and set(counts.values()) == {1}
    synchronous = ScriptedRoles()
    scripted_loop(synchronous, Diary()).run()
    chunks = [chunk for verb, *what in synchronous.events if verb == "generate" for chunk in what[0]]
    assert [chunk for chunk, _ in roles.trained] == [chunk for chunk in chunks if not chunk.evaluation]


@pytest.mark.parametrize("in_flight", [False, True])
def test_it_drops_no_handle_and_waits_for_causes_first(in_flight):
    roles, _, _ = run_queueing(steps_ahead=2, weights_in_flight=in_flight, eval_every=9)
    assert {id(handle) for handle in roles.handles} == {id(handle) for handle in roles.waited}
    block = {}
    for number, handles in enumerate(roles.waits):
        for handle in handles:
            block.setdefault(id(handle), number)
    assert len(roles.causes) > 30
    for handle, causes in roles.causes:
        assert all(block[id(cause)] < block[id(handle)] for cause in causes), handle.verb


def test_a_sync_waits_for_the_generators_only_where_they_take_weights_between_units():
    """Behind all that they were asked, an answer would come after the next step's generation: nothing would overlap."""
    for in_flight in (False, True):
        roles, _, _ = run_queueing(steps=2, eval_every=9, weights_in_flight=in_flight)
        waits = [[handle.verb for handle in handles] for handles in roles.waits]
        first = waits.index(["weights"], 2)  # after the sync before the first step
        assert (waits[first + 1] == ["load_weights"]) == in_flight


@pytest.mark.parametrize("stop_after", [0, 1, 3, 4])
@pytest.mark.parametrize("steps_ahead", [1, 3])
def test_a_stopped_run_trains_on_each_prompt_once(stop_after, steps_ahead):
    """What was drawn ahead is drawn anew, by the newer weights: prompts follow from the step, and the step is in the state."""
    whole, _, _ = run_queueing(steps_ahead=steps_ahead)
    before, first, finished = run_queueing(Diary(stop_after=stop_after), steps_ahead=steps_ahead)
    assert not finished
    state = LoopState.from_json(json.loads(json.dumps(first.saves[-1].to_json())))
    after, rest, finished = run_queueing(Diary(), state, steps_ahead=steps_ahead)
    assert finished and state.step == stop_after
    assert [chunk for chunk, _ in before.trained + after.trained] == [chunk for chunk, _ in whole.trained]
    assert [version for _, version in after.trained[:2]] == [stop_after] * 2, "two chunks a step, of the newest weights"
    assert all(0 <= chunk.step - version <= steps_ahead for chunk, version in after.trained)
    assert rest.steps() == [step for step in range(8) if step > stop_after or step == stop_after == 0]


def test_a_crash_after_a_checkpoint_loses_and_repeats_nothing():
    """It died in step 5, with 6 and 7 asked for: on from the checkpoint of step 4."""
    before = Diary(stop_after=5)
    run_queueing(before, steps_ahead=2, checkpoint_every=4)
    (state,) = (state for state in before.saves if state.step == 4)
    after, _, _ = run_queueing(Diary(), state, steps_ahead=2)
    whole, _, _ = run_queueing(steps_ahead=2)
    assert [chunk for chunk, _ in after.trained] == [chunk for chunk, _ in whole.trained if chunk.step >= 4]


def test_generators_that_lose_weights_stop_the_run():
    """The next sync would be taken by nobody either; the third step finds samples two versions old."""
    roles = QueueingRoles()
    roles.load_weights = lambda weights, policy_version: roles._answer("load_weights", policy_version)
    with pytest.raises(MismatchError, match=r"2 policy versions old, above ppo.steps_ahead = 1"):
        scripted_loop(roles, Diary(), steps_ahead=1, eval_every=9).run()
    assert len([event for event in roles.events if event[0] == "assemble"]) == 3
    assert len([event for event in roles.events if event[0] == "update"]) == 4, "two of each, before"


@pytest.mark.parametrize("gap", [0.51, math.inf, NAN])
def test_the_mismatch_gate_stands_at_each_evaluation(gap):
    with pytest.raises(MismatchError, match="max_mismatch = 0.5"):
        scripted_loop(QueueingRoles(own_gap=gap), Diary(), steps_ahead=1, max_mismatch=0.5).run()
    _, diary, _ = run_queueing()
    gaps = {step: metrics["policy/mismatch_p99"] for step, metrics in diary.records if "policy/mismatch_p99" in metrics}
    assert gaps == dict.fromkeys((0, 1, 3, 6, 7), 0.0), (
        "evaluations, and the first step, whose samples are of its policy"
    )


def test_the_gate_holds_samples_of_the_current_policy_too():
    with pytest.raises(MismatchError, match="max_mismatch = 0.5"):
        scripted_loop(QueueingRoles(mismatch=0.6), Diary(), steps_ahead=1, max_mismatch=0.5).run()


def test_a_log_prob_that_is_no_number_stops_the_run():
    with pytest.raises(MismatchError, match="not a number"):
        scripted_loop(QueueingRoles(importance=NAN), Diary(), steps_ahead=1).run()


@pytest.mark.parametrize("verb", ["generate", "score", "logprobs", "assemble", "update", "weights", "load_weights"])
def test_a_failure_of_any_verb_ends_the_run(verb):
    with pytest.raises(UserError, match=f"{verb} failed"):
        scripted_loop(QueueingRoles(broken=verb), Diary(), steps_ahead=1).run()


def test_what_does_not_go_together_is_refused_in_words():
    for override, told in (
        (["ppo.dynamic_sampling_rounds=2", "ppo.samples_per_prompt=2"], "steps_ahead is 1 and dynamic_sampling_rounds is 2"),
        (["ppo.steps_ahead=0", "ppo.weights_in_flight=true"], "steps_ahead is 0: nothing is drawn while weights move"),
        (["ppo.steps_ahead=-1"], "'ppo.steps_ahead' is -1"),
        (["ppo.importance_cap=0"], "'ppo.importance_cap' is 0"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told):
            build_recipe({"name": "x", "ppo": {"steps_ahead": 1}}, override, "x")
    assert PPOConfig().steps_ahead == 0

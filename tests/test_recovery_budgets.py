"""How often actors are made again, what is blamed, how long one may be silent. No Ray."""

import time
from types import SimpleNamespace

import pytest
from ray.exceptions import OutOfMemoryError, RayTaskError
from tiny import tiny_recipe

from rlhf_ray.actors import recovery as recovery_module
from rlhf_ray.actors import snapshots as snapshots_module
from rlhf_ray.actors.budgets import Budget, tells_of_end
from rlhf_ray.actors.calls import Call, Handle, Member
from rlhf_ray.actors.groups import GenerationGroup, RayRoles
from rlhf_ray.actors.hung import Deadline
from rlhf_ray.actors.low_memory import ended_by_guard
from rlhf_ray.actors.pulse import ActorProcess
from rlhf_ray.actors.recovery import GroupLost, Recovery
from rlhf_ray.actors.snapshots import Snapshot
from rlhf_ray.actors.wait import ActorDied, ArgumentLost, Waiter, _died
from rlhf_ray.errors import RunFailed
from rlhf_ray.messages import Chunk
from rlhf_ray.ppo.loop import LoopState
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.status import read_status

DIED = ActorDied("reward actor 0 died (killed); see the logs")


def member(role="reward"):
    return Member(role, 0, lambda: None)


def test_a_storm_of_restarts_stops_with_its_table():
    budget = Budget(2)
    for _ in range(2):
        budget.charge(member(), DIED, "after step 0, scoring (step 0)")
    budget.start_over()
    for role in ("generation", "reward"):
        budget.charge(member(role), DIED, "after step 1, weight sync (version 1)")
    with pytest.raises(RunFailed, match="3 actors were lost .*more than resources.restarts = 2") as told:
        budget.charge(member("critic"), DIED, "after step 1, value update (step 1)")
    assert str(told.value).splitlines()[1:] == [
        "  after step 1, weight sync (version 1): generation actor 0: reward actor 0 died (killed)",
        "  after step 1, weight sync (version 1): reward actor 0: reward actor 0 died (killed)",
        "  after step 1, value update (step 1): critic actor 0: reward actor 0 died (killed)",
    ]
    assert budget.take_failures() == {"failures/reward": 3.0, "failures/generation": 1.0, "failures/critic": 1.0}
    assert budget.take_failures() == {}


def test_the_end_of_a_budget_is_an_event_and_a_line(tmp_path):
    """And no restart: `status` counts those that were made."""
    run, lines = RunFolder(tmp_path), []
    run.recipe.write_text("name: toy\n")
    events = EventLog(run.events)
    budget = Budget(1, tells_of_end(events, lines.append, "ppo"))
    budget.charge(member(), DIED, "after step 3, scoring (step 3)")
    assert events.read() == lines == []
    with pytest.raises(RunFailed, match="2 actors were lost"):
        budget.charge(member(), DIED, "after step 3, scoring (step 3)")
    (event,) = events.read()
    assert (event["what"], event["role"], event["phase"]) == (
        "reward actor 0 was lost", "reward", "after step 3, scoring (step 3)",
    )  # fmt: skip
    assert "not made again: 2 actors were lost without a finished step between" in event["done"]
    assert event["seen"] == "reward actor 0 died (killed)"
    assert "reward actor 0 was lost" in lines[0]["say"] and "the run stops" in lines[0]["say"] and lines[0]["warns"]
    assert read_status(run).restarts == {}
    with pytest.raises(ActorDied):
        Budget(0, tells_of_end(events, lines.append, "ppo")).charge_start(DIED, "start of reward actor 0")
    assert "resources.restarts = 0" in events.read()[1]["done"]


def test_a_step_that_is_taken_again_is_no_progress(tmp_path):
    roles, recipe = SimpleNamespace(trained=[], members=[]), tiny_recipe(resources={"restarts": 1})
    events = EventLog(tmp_path / "events.jsonl")
    waiter, budget = Waiter(60, "wait"), Budget(recipe.resources.restarts)
    recovery = Recovery(recipe, roles, waiter, tmp_path, budget=budget, events=events, progress=lambda event: None)
    recovery.run(recovery.step_done, LoopState(step=1, kl_coef=0.1))
    for step in (2, 3):
        recovery.budget.charge(member(), DIED, "scoring")
        recovery.step_done(LoopState(step=step, kl_coef=0.1))
    recovery.budget.charge(member(), DIED, "scoring")
    recovery.step_done(LoopState(step=3, kl_coef=0.1))
    with pytest.raises(RunFailed, match="2 actors were lost"):
        recovery.budget.charge(member(), DIED, "scoring")


def test_a_call_that_ends_two_actors_is_named_with_its_samples():
    budget, generator, scorer = Budget(5), member("generation"), member()
    chunk = Chunk(step=3, index=1, prompt_indices=(7, 9), sample_indices=(0, 2))
    rollout = Call(generator, "generate", (chunk,), "generation actor 0 (step 3, chunk 1)")

    def score():
        return Call(scorer, "score", (Handle(rollout, 0),), "reward actor 0 (chunk 1)")

    budget.charge(scorer, DIED, "scoring", score())
    budget.charge(generator, DIED, "scoring", rollout)  # another call on the same samples
    with pytest.raises(RunFailed, match="reward actor 0 died 2 times at the same call, score of reward actor 0") as told:
        budget.charge(scorer, DIED, "scoring", score())
    assert "Its samples: step 3, prompt 7, sample 0; step 3, prompt 9, sample 2. " in str(told.value)


#: Ray's own, of 2.60, where it had ended an actor; lines between are left out
RAYS_WORDS = """2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 82faa69245) \
was 22.88GB used / 23.59GB limit (0.969902)
OOM kill reason: Memory usage 24567789824B exceeded threshold of 24059005542B (95.0% of 25325268992B limit)
Object store memory usage: [- objects spillable: 0
(global lru) bytes evicted: 0]
Ray killed 2 worker(s) based on the killing policy
Selected to kill: (Task: job ID=01000000, lease ID=0000000001, task name=A.__init__, required resources={}, pid=22750)
To see more information about memory usage on this node, use `ray logs raylet.out -ip 10.0.0.7`
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
22500\t0.45\t/opt/python -m rlhf_ray run demo
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/. Consider provisioning more memory."""


def test_what_rays_memory_guard_ended_is_told_in_a_sentence_with_the_host_the_memory_and_the_remedy():
    died = _died("reward actor 0 (chunk 1)", OutOfMemoryError(RAYS_WORDS))
    why = "Ray's memory guard ended it: 22.9 of 23.6 GB were in use on the host 10.0.0.7"
    assert str(died) == (
        f"reward actor 0 (chunk 1) died ({why}); end what else runs on that host, or lower what `rlhf-ray doctor` shows as large "
        "(microbatches, chunks, lengths, snapshots), then run the same command again to go on from the last checkpoint"
    )
    storm, blamed = Budget(1), Budget(5)
    storm.charge(member(), died, "scoring")
    with pytest.raises(RunFailed, match=r"restarts = 1; end what else runs on that host, .*\n  scoring: .*22.9 of 23.6 GB"):
        storm.charge(member(), died, "scoring")
    call = Call(member(), "score", (Chunk(step=3, index=1, prompt_indices=(7,), sample_indices=(0,)),), "reward actor 0 (chunk 1)")
    blamed.charge(call.member, died, "scoring", call)
    with pytest.raises(RunFailed, match="22.9 of 23.6 GB .*; end what else runs on that host"):
        blamed.charge(call.member, died, "scoring", call)
    wrapped = RuntimeError("a worker group failed")
    wrapped.__cause__ = OutOfMemoryError(RAYS_WORDS)
    assert ended_by_guard(wrapped) == why and ended_by_guard(RuntimeError("Memory on the node")) is None


def test_a_host_that_is_gone_is_one_loss_however_many_actors_it_had():
    budget, call = Budget(1), Call(member(), "score", (Chunk(step=3, index=1, prompt_indices=(7,), sample_indices=(0,)),), "")
    for role in ("generation", "reward", "reward", "reference", "policy"):
        budget.charge(member(role), DIED, "scoring", call, host="a1")
    assert budget.take_failures() == {"failures/generation": 1, "failures/reward": 2, "failures/reference": 1, "failures/policy": 1}
    with pytest.raises(RunFailed, match=r"2 actors were lost .*\n  scoring: the host of .*\n  scoring: the host of critic"):
        budget.charge(member("critic"), DIED, "scoring", call, host="b2")


def test_a_start_says_what_the_actor_needs():
    """A host is gone, and no other has room: this is what the terminal shows while the run waits for one."""
    names = []
    waiter = SimpleNamespace(track=lambda ref, name: names.append(name), get=lambda refs, *_: refs)
    actor = SimpleNamespace(ready=SimpleNamespace(remote=lambda: None))
    members = [Member("policy", 1, lambda: actor, "rank", "2 CPUs and 1 GPUs"), Member("experience", 0, lambda: actor)]
    roles = SimpleNamespace(waiter=waiter, _join=lambda groups, deadline_s: None)
    RayRoles.start(roles, members, [], 60.0)
    assert names == ["policy rank 1 (start on 2 CPUs and 1 GPUs)", "experience actor 0 (start)"]


def test_no_sample_is_blamed_for_a_rank_that_dies_while_it_hands_out_its_state():
    budget, rank = Budget(3), Member("policy", 0, lambda: None, "rank")
    for _ in range(3):
        budget.charge(rank, DIED, "weight sync", Call(rank, "weights", (1,), "policy rank 0 (weights)"))
    with pytest.raises(RunFailed, match="4 actors were lost without a finished step between"):
        budget.charge(rank, DIED, "weight sync", Call(rank, "weights", (1,), "policy rank 0 (weights)"))


def test_an_error_of_a_roles_own_code_gets_a_second_try_and_then_is_raised_as_it_is():
    budget, scorer = Budget(5), member()
    chunk = Chunk(step=3, index=1, prompt_indices=(7,), sample_indices=(2,))
    error = RayTaskError("score", "Traceback ...", ValueError("out of cheese"))

    def score():
        return Call(scorer, "score", (chunk,), "reward actor 0 (chunk 1)")

    budget.charge(scorer, error, "scoring (step 3)", score())
    with pytest.raises(RayTaskError) as told:
        budget.charge(scorer, error, "scoring (step 3)", score())
    assert told.value is error
    (note,) = error.__notes__
    assert note.startswith("reward actor 0 (chunk 1) failed 2 times, scoring (step 3), so no third try is made. ")
    assert note.endswith("Its samples: step 3, prompt 7, sample 2. ")


def test_a_start_that_the_roles_own_code_fails_is_tried_once_more_at_most():
    budget = Budget(2)
    with pytest.raises(ActorDied, match="creation task"):
        budget.charge_start(ActorDied("the actor died because of an error raised in its creation task"), "start of the actors")
    budget.charge_start(DIED, "start of the actors")
    budget.charge_start(DIED, "start of the actors")
    with pytest.raises(RunFailed, match="3 actors were lost"):
        budget.charge_start(DIED, "start of the actors")
    error = RayTaskError("join", "Traceback ...", ValueError("connection closed by peer"))
    budget = Budget(5)
    budget.charge_start(error, "start of the actors")
    with pytest.raises(RayTaskError):
        budget.charge_start(error, "start of the actors")


def test_with_no_restarts_the_first_death_stops_the_run():
    with pytest.raises(ActorDied, match="^reward actor 0 died"):
        Budget(0).charge(member(), DIED, "scoring")


class Fake(Member):
    def __init__(self, role, number=0, host="a", word="actor"):
        super().__init__(role, number, lambda: None, word)
        self.process = ActorProcess(host, 0, 0)

    def make_again(self):
        self.lives += 1
        self.process = None


class Group:
    """A rank on each of these hosts."""

    weight_bytes = 0

    def __init__(self, role, *hosts):
        self.role, self.members = role, [Fake(role, number, host, "rank") for number, host in enumerate(hosts)]

    def call(self, method, *args):
        return [method]

    def snapshot(self):
        return []


class OverFakes(Waiter):
    """torn: a snapshot that is restored has lost a share with its node."""

    recovery: Recovery
    torn: bool

    def track(self, ref, *_):
        return ref

    def wait(self, handles, what, *_):
        if self.torn and "restore" in handles:
            rank = self.recovery.roles.trained[0].members[-1]
            self.recovery.mend(Call(rank, "restore", (), f"{rank.name} (restore)"), ArgumentLost("its node died"), what)


@pytest.fixture
def recovery_over(tmp_path, monkeypatch):
    """Makes a Recovery of fake groups and actors -> (it, the sets of members that it has started, its events). starts: what each
    start raises, or the host that is found gone while it waits for another one."""

    def made(groups, others, starts, snapshot, gone=(), torn=False):
        started, gone, starts = [], set(gone), [*starts]
        for module in (recovery_module, snapshots_module):
            monkeypatch.setattr(module, "is_there", lambda host: host not in gone)

        def start(members, groups, seconds):
            event = starts.pop(0) if starts else None
            if isinstance(event, Exception):
                raise event
            gone.update(event or ())
            started.append({member.name for member in members})
            for each in members:
                each.process = ActorProcess("b", 1, 1)

        generation = SimpleNamespace(by_channel=False, members=[each for each in others if each.role == "generation"])
        members = [*others, *(member for group in groups for member in group.members)]
        roles = SimpleNamespace(trained=groups, policy=groups[0], members=members, start=start, generation=generation)
        events, recipe = EventLog(tmp_path / "events.jsonl"), tiny_recipe(resources={"restarts": 3}, ppo={"kl_coef": 0.25})
        waiter = OverFakes(60, "wait")
        waiter.torn = torn
        waiter.recovery = recovery = Recovery(
            recipe, roles, waiter, tmp_path, budget=Budget(3), events=events, progress=lambda event: None
        )
        recovery.snapshots.kept = [snapshot]
        return recovery, started, events

    return made


def lost_once(member):
    """A training whose first try ends with the loss of a rank -> (it, the steps that its tries begin with)."""
    begun = []

    def train(state):
        begun.append(state.step)
        if len(begun) == 1:
            raise GroupLost(DIED, member, "value update (step 4)")
        return state

    return train, begun


def test_a_snapshot_that_has_lost_a_share_is_given_up_and_not_tried_again(recovery_over):
    """Several ranks: that of an argument which was lost is the group's loss, too."""
    policy = Group("policy", "a", "a")
    starts = [None, Deadline("the start took too long; see the logs"), None]
    snapshot = Snapshot(LoopState(step=3, kl_coef=0.1), {"policy": []})
    recovery, _, events = recovery_over([policy], [], starts, snapshot, torn=True)
    train, begun = lost_once(policy.members[0])
    assert recovery.run(train, LoopState(step=4, kl_coef=0.1)).kl_coef == 0.25  # there is no checkpoint: from the start
    assert begun == [4, 0] and recovery.snapshots.kept == []
    one, late, other = events.read()  # each loss is told, also the one that was being mended when the other came
    assert (one["what"], one["phase"]) == ("policy rank 0 was lost", "value update (step 4)")
    assert one["done"] == "its group was made again, and meanwhile policy rank 1 was lost"
    assert (late["phase"], late["seen"], late["done"]) == ("start", "the start took too long", "started once more")
    assert other["what"] == "policy rank 1 was lost" and "the start" in other["done"]


ALL_OF_HOST = {"policy rank 0", "critic rank 0", "reward actor 0"}


@pytest.mark.parametrize(
    ("gone", "starts", "lies_on", "wanted"),
    [
        (["a"], [], "a", [ALL_OF_HOST]),
        ([], ["a"], "b", [{"policy rank 0"}, ALL_OF_HOST - {"policy rank 0"}]),  # found gone while the policy waits for room
        (["a"], [Deadline("too long")], "a", [ALL_OF_HOST]),
    ],
)
def test_all_that_a_lost_host_had_is_made_again_with_the_rank_that_was_missed_first(
    recovery_over, gone, starts, lies_on, wanted
):
    """Otherwise each is found out by itself, one start after the other; and what lay there is not asked for: the snapshot, or the
    weights that a generator had."""
    groups, others = [Group("policy", "a"), Group("critic", "a")], [Fake("reward"), Fake("generation", host="b")]
    others[1].weights = Call(others[1], "load_weights", (), "")
    snapshot = Snapshot(LoopState(step=3, kl_coef=0.1), {"policy": [], "critic": []}, frozenset({lies_on}))
    recovery, started, events = recovery_over(groups, others, starts, snapshot, gone)
    train, begun = lost_once(groups[0].members[0])
    recovery.run(train, LoopState(step=4, kl_coef=0.1))
    assert begun == [4, {"a": 0, "b": 3}[lies_on]] and started == wanted and others[1].weights is None
    told = [event for event in events.read() if event["phase"] != "start"]
    assert {event["what"].removesuffix(" was lost") for event in told} == ALL_OF_HOST and len(told) == 3
    assert told[-1]["what"] == "policy rank 0 was lost" and "with the state of step" in told[-1]["done"]


class Sent(Call):
    def send(self):
        """To nobody."""
        self.life = self.member.lives


def test_each_start_that_fails_is_told_with_its_own_seconds_and_the_loss_with_all(tmp_path):
    starts = [Deadline("the first start took too long"), Deadline("the second start took too long"), None]

    def start(members, groups, seconds):
        failure = starts.pop(0)
        if failure is not None:
            time.sleep(0.05)
            raise failure

    scorer = member()
    scorer.make_again = lambda: None
    roles = SimpleNamespace(trained=[], members=[scorer], start=start, generation=SimpleNamespace(by_channel=False, members=[]))
    events, recipe = EventLog(tmp_path / "events.jsonl"), tiny_recipe(resources={"restarts": 3})
    recovery = Recovery(recipe, roles, Waiter(60, "wait"), tmp_path, budget=Budget(3), events=events, progress=lambda _: None)
    call = Sent(scorer, "score", (), "reward actor 0 (chunk 1)")
    call.send()
    recovery.mend(call, DIED, "scoring (step 3)")
    first, second, mended = events.read()
    assert [each["done"] for each in (first, second)] == ["started once more"] * 2 and "made again" in mended["done"]
    assert first["cost_s"] >= 0.05 and first["cost_s"] + second["cost_s"] <= mended["cost_s"] + 0.002  # each is rounded


def test_who_was_made_again_is_told_also_where_what_it_needs_is_lost(recovery_over):
    """A generator's weights lay on its host too: then the policy has to make them again."""
    policy, generator = Group("policy", "a"), Fake("generation")
    recovery, _, events = recovery_over([policy], [generator], [], Snapshot(LoopState(step=3, kl_coef=0.1), {}))
    generator.weights = Sent(generator, "load_weights", (), "generation actor 0 (weights of version 2)")

    def lost(handles, what):
        raise GroupLost(DIED, policy.members[0], what)

    recovery.waiter.wait = lost
    draw = Sent(generator, "generate", (), "generation actor 0 (chunk 1)")
    draw.send()
    with pytest.raises(GroupLost):
        recovery.mend(draw, DIED, "generation (step 3)")
    (told,) = events.read()
    assert told["what"] == "generation actor 0 was lost" and told["done"] == "made again, and meanwhile policy rank 0 was lost"


class Anything:
    """An actor whose every method answers with refs that stand for what never comes."""

    def __getattr__(self, method):
        return self

    def options(self, num_returns, **_):
        return SimpleNamespace(remote=lambda *_: object() if num_returns == 1 else [object() for _ in range(num_returns)])


@pytest.mark.parametrize("first", ["score", "update"])  # looked at
def test_the_error_of_a_call_is_not_blamed_on_those_that_need_its_result(recovery_over, first):
    """Ray raises it as theirs too: they are sent again, and their actors live on."""
    policy = Group("policy", "a")
    scorer, maker, rank = Fake("reward"), Fake("experience"), policy.members[0]
    for each in (scorer, maker, rank):
        each.actor = Anything()
    recovery, started, events = recovery_over([policy], [scorer, maker], [], Snapshot(LoopState(step=3, kl_coef=0.1), {}))
    (scores,) = scorer.call("score", name="reward actor 0 (chunk 1)")
    stats, shard = maker.call("assemble", scores, name="experience", returns=2)
    (update,) = rank.call("update", shard, name="policy rank 0 (update)")
    error = RayTaskError("score", "Traceback ...", RuntimeError("out of luck"))
    calls = (scores.call, stats.call, update.call)
    recovery.waiter.there = lambda call: True
    recovery.waiter.readable = lambda handle: True
    recovery.waiter.failure_of = lambda call: error if call.sent == 1 else None
    recovery._unanswered = lambda member: [each for each in member.calls if recovery.waiter.failure_of(each) is not None]
    for each in calls if first == "score" else calls[::-1]:
        if each.sent == 1:
            recovery.mend(each, error, "policy update (step 3)")
    assert [each.sent for each in calls] == [2, 2, 2] and started == [{"reward actor 0"}]
    recovery.waiter.failure_of = lambda call: error if call is stats.call else None
    recovery.mend(stats.call, error, "assembling (step 3)")  # its own, now: what it needs is there
    assert started == [{"reward actor 0"}, {"experience actor 0"}] and rank.lives == 1
    assert [event["role"] for event in events.read()] == ["reward", "experience"]


@pytest.mark.parametrize("by_channel", [True, False])
def test_who_waits_for_a_broadcast_waits_for_those_who_take_it(by_channel):
    """The policy sends until all have received, so its call would not end where one of them died. Through the object store it does,
    and the generators come after it."""
    rank, generators = Fake("policy"), [Fake("generation"), Fake("generation")]
    for each in (rank, *generators):
        each.actor = Anything()
    group = GenerationGroup(generators)
    group.by_channel = by_channel
    (weights,) = rank.call("send_weights", name="policy rank 0 (weights)")
    loads = group.load_weights([weights], 3)
    waited = list(Waiter(60, "wait")._waiting([weights]))
    assert waited == [weights.call, *(load.call for load in loads if by_channel)]

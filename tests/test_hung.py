"""When an actor is taken for hung: stopped, idle for far longer than ever, late; and never because the machine is busy."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import wait_for

from rlhf_ray.actors.calls import Member
from rlhf_ray.actors.hung import AwakeClock, HungWatch
from rlhf_ray.actors.pulse import ActorProcess, Pulse, end_here, pulse_here, started_at
from rlhf_ray.actors.worker_watch import WorkerWatch
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.storage import write_atomically

IDLE, BUSY, STOPPED = Pulse(False, False), Pulse(False, True), Pulse(True, False)


class Remote:
    """An actor's method that never answers: what it returns stands for a ref."""

    def options(self, **_):
        return self

    def remote(self, *_):
        return object()


class Actor:
    score = generate = update = load_weights = Remote()


def member(role="reward", number=0, word="actor"):
    made = Member(role, number, Actor, word)
    made.process = ActorProcess("here", hash((role, number)), 0)
    return made


class World:
    """Processes that do what a test says, and a watch over them."""

    def __init__(self, deadline_s=1800.0):
        self.now, self.answered, self.pulses = 0.0, set(), {}
        self.watch = HungWatch(deadline_s, lambda call: call in self.answered, lambda process: self.pulses.get(process, IDLE))

    def seconds_until_hung(self, call, most=2000):
        """Watched once a second -> (seconds, what is said); most: None where it never is."""
        for seconds in range(most):
            told = self.watch.hung(call, self.now, "scoring (step 1)", "look why")
            if told is not None:
                return seconds, told
            self.now += 1
        return None, None


def sent(to, method="score", *args, **options):
    (handle,) = to.call(method, *args, name=f"{to.name} ({method})", **options)
    return handle


def test_a_stopped_process_is_found_in_seconds_whatever_its_calls_took():
    world, call = World(), sent(member()).call
    world.pulses[call.member.process] = STOPPED
    seconds, told = world.seconds_until_hung(call)
    assert seconds <= 12 and told.member is call.member and told.to_blame is None
    what = f"waited {seconds} s for reward actor 0 (score) during scoring (step 1)"
    assert str(told) == f"{what}, the process of reward actor 0 is stopped; look why"


def test_a_process_that_goes_on_after_a_moment_is_not_stopped():
    world, call = World(), sent(member()).call
    for second in range(60):
        world.pulses[call.member.process] = STOPPED if second % 10 < 4 else BUSY
        assert world.watch.hung(call, world.now, "scoring", "") is None
        world.now += 1


@pytest.mark.parametrize(("longest_s", "limit_s"), [(0.01, 60), (3.0, 60), (5.0, 100), (1000.0, 1800)])
def test_an_idle_process_is_hung_after_many_times_what_its_calls_took(longest_s, limit_s):
    world, call = World(), sent(member()).call
    world.watch.ended(sent(call.member).call, longest_s, 0.0)
    seconds, told = world.seconds_until_hung(call)
    assert limit_s < seconds <= limit_s + 4 and told.member is call.member
    again, _ = world.seconds_until_hung(sent(member()).call)  # it may have had good reason
    assert again == pytest.approx(min(2 * limit_s, 1800), abs=8)


def test_of_a_kind_that_never_ended_nothing_is_known_but_the_deadline():
    world, call = World(), sent(member()).call
    world.watch.ended(sent(member(), "generate").call, 0.1, 0.0)
    seconds, told = world.seconds_until_hung(call)
    assert seconds == 1801 and told.to_blame is call


def test_what_was_learned_in_a_quiet_second_does_not_end_a_healthy_actor_on_a_busy_machine():
    """Its calls took 10 ms. Now its threads wait for a core nearly all the time, and one call takes 25 minutes."""
    world, call = World(), sent(member()).call
    world.watch.ended(sent(call.member).call, 0.01, 0.0)
    for second in range(1500):
        world.pulses[call.member.process] = IDLE if second % 30 == 0 else BUSY  # e.g. between two messages of its peer
        assert world.watch.hung(call, world.now, "scoring", "") is None, second
        world.now += 1


def test_a_process_that_is_always_at_work_is_hung_after_the_deadline_and_its_call_is_to_blame():
    world, call = World(deadline_s=90), sent(member()).call
    world.pulses[call.member.process] = BUSY
    seconds, told = world.seconds_until_hung(call)
    assert seconds == 91 and told.to_blame is call and "longer than 90 s" in str(told)


def test_who_waits_for_another_is_not_hung():
    """A scorer has nothing to do until the rollout is there. A call waits for those that its actor was asked before."""
    world, generator, scorer = World(), member("generation"), member()
    before, rollout = sent(generator, "generate"), sent(generator, "generate")
    score = sent(scorer, "score", rollout)
    assert world.watch.keeps(score.call) is before.call
    world.pulses[generator.process] = STOPPED
    _, told = world.seconds_until_hung(score.call)
    assert told.member is generator
    world.answered |= {before.call, rollout.call}
    assert world.watch.keeps(score.call) is score.call


def test_weights_in_flight_do_not_wait_for_what_is_drawn_beside_them():
    world, generator = World(), member("generation")
    drawn = sent(generator, "generate")
    weights = sent(generator, "load_weights", concurrency_group="in_flight")
    assert world.watch.keeps(weights.call) is weights.call and world.watch.keeps(drawn.call) is drawn.call


def test_a_policy_that_sends_waits_for_what_generators_still_draw():
    """Idle for an hour, and not hung: the generator is at work on a chunk before it receives. Where that one is stopped, it is
    told."""
    world, policy, generator = World(deadline_s=4000.0), member("policy", word="rank"), member("generation")
    world.watch.ended(sent(policy, "update").call, 0.1, 0.0)
    policy.calls.clear()
    drawn, received = sent(generator, "generate"), sent(generator, "load_weights")
    sending = sent(policy, "update", concurrency_group="sending")
    sending.call.meets = [received]
    assert world.watch.keeps(sending.call) is drawn.call
    world.pulses[generator.process] = BUSY
    assert world.seconds_until_hung(sending.call, most=3600) == (None, None)
    world.pulses[generator.process] = STOPPED
    _, told = world.seconds_until_hung(sending.call)
    assert told.member is generator


def test_ranks_wait_for_each_other():
    """One is idle as long as the other works; where one is stopped, that one is hung, not the one that waits for it."""
    world, ranks = World(), [member("policy", number, "rank") for number in range(2)]
    for each in ranks:
        each.peers = ranks
    first, _ = (sent(each, "update") for each in ranks)
    world.watch.ended(sent(ranks[0], "update").call, 0.1, 0.0)
    ranks[0].calls.pop()
    world.pulses[ranks[1].process] = BUSY
    assert world.seconds_until_hung(first.call, most=1000) == (None, None)
    world.pulses[ranks[1].process] = STOPPED
    _, told = world.seconds_until_hung(first.call)
    assert told.member is ranks[1] and "the process of policy rank 1 is stopped" in str(told)


def test_a_host_that_tells_nothing_ends_nobody_before_the_deadline():
    world, call = World(), sent(member()).call
    world.watch.ended(sent(call.member).call, 0.1, 0.0)
    world.watch._look = lambda process: None
    assert world.seconds_until_hung(call)[0] == 1801


def test_a_controller_that_slept_makes_nobody_late():
    times = iter([100.0, 101.0, 4000.0, 4001.0])
    clock = AwakeClock(lambda: next(times))
    assert [clock.tick() for _ in range(3)] == [1.0, 6.0, 7.0]


PROGRAM = """
import subprocess, sys, time
if sys.argv[1] == "child":
    subprocess.run([sys.executable, "-c", "while True: pass"])
while sys.argv[1] == "work": pass
print("here", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def program():
    started = []

    def start(how):
        started.append(subprocess.Popen([sys.executable, "-c", PROGRAM, how], start_new_session=True))
        return ActorProcess("here", started[-1].pid, started_at(started[-1].pid))

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_kernel_tells_who_is_stopped_and_who_works(program):
    sleeps, works, asks = program("sleep"), program("work"), program("child")
    wait_for(lambda: pulse_here(sleeps) == IDLE)
    wait_for(lambda: pulse_here(works) == BUSY)
    wait_for(lambda: pulse_here(asks) == BUSY)  # a function of the user's in a process of its own
    os.kill(works.pid, signal.SIGSTOP)
    wait_for(lambda: pulse_here(works) == STOPPED)
    end_here(works)
    wait_for(lambda: pulse_here(works) is None)
    end_here(works)  # it is gone
    assert pulse_here(ActorProcess("here", 2**22 + 1, 5)) is None
    another = ActorProcess("here", sleeps.pid, sleeps.started - 1)  # had this number before
    end_here(another)
    assert pulse_here(another) is None and pulse_here(sleeps) == IDLE


def test_a_process_that_hardly_gets_a_core_is_at_work(program):
    """Nice 19 beside as many others as there are cores, twice: looked at 40 times, it nearly always has something to do."""
    starved = program("work")
    os.setpriority(os.PRIO_PROCESS, starved.pid, 19)
    for _ in range(2 * len(os.sched_getaffinity(0))):
        program("work")
    wait_for(lambda: pulse_here(starved) == BUSY)
    seen = []
    for _ in range(40):
        seen.append(pulse_here(starved))
        time.sleep(0.02)
    assert seen.count(BUSY) >= 38


def test_a_call_is_looked_at_anew_when_it_is_sent_again():
    world, call = World(), sent(member()).call
    world.watch.ended(sent(call.member).call, 0.1, 0.0)
    call.member.calls.pop()
    assert world.seconds_until_hung(call, most=50) == (None, None)
    call.send()
    assert world.seconds_until_hung(call)[0] > 50


class Workers:
    """Two workers of a supervised stage, and their watch, which is asked once a second."""

    def __init__(self, folder):
        self.now, self.pulses, self.ended = 0.0, {}, []
        self.events = EventLog(folder / "events.jsonl")
        for pid in (0, 1):
            write_atomically(folder / "processes" / f"{pid}.json", json.dumps({"node": "here", "pid": pid, "started": 7}))
        self.watch = WorkerWatch(
            folder / "processes", "sft", self.events, lambda: self.now, lambda each: self.pulses.get(each.pid, BUSY),
            lambda each: self.ended.append(each.pid),
        )  # fmt: skip

    def go(self, seconds, went_on=False):
        """-> seconds without a step."""
        for _ in range(seconds):
            self.now += 1
            still_s = self.watch.look(3, went_on, 1800.0)
        return still_s


def test_a_stopped_worker_of_a_supervised_stage_is_ended_and_told_of(tmp_path):
    workers = Workers(tmp_path)
    workers.go(1, went_on=True)
    workers.pulses[1] = STOPPED
    assert workers.go(12) < 12 and workers.ended == [1]
    (event,) = workers.events.read()
    assert event["what"] == "sft worker 1 was hung" and event["seen"] == "it is stopped" and event["step"] == 3


def test_a_worker_that_works_long_on_a_step_is_left_alone_and_idle_ones_are_not(tmp_path):
    workers = Workers(tmp_path)
    for _ in range(3):
        workers.go(10)
        workers.go(1, went_on=True)  # a step takes 11 s
    assert workers.go(1500) == 1500 and workers.ended == []
    workers.go(1, went_on=True)
    workers.pulses = {0: IDLE, 1: BUSY}  # one waits for the other
    assert workers.go(1500) == 1500 and workers.ended == []
    workers = Workers(tmp_path)
    for _ in range(3):
        workers.go(10)
        workers.go(1, went_on=True)
    workers.pulses = {0: IDLE, 1: IDLE}
    workers.go(219)
    assert workers.ended == []
    workers.go(10)
    assert workers.ended == [0] and "idle for 22" in workers.events.read()[-1]["seen"]


def test_before_its_first_step_a_worker_may_be_idle_until_the_deadline(tmp_path):
    workers = Workers(tmp_path)
    workers.pulses = {0: IDLE, 1: IDLE}
    assert workers.go(1700) == 1700 and workers.ended == []

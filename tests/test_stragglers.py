"""Which calls are given to a second actor, whose answer counts, and that nothing is sent with a ref that may change. No Ray."""

import pytest

from rlhf_ray.actors.calls import Call, Member
from rlhf_ray.actors.pulse import ActorProcess
from rlhf_ray.actors.stragglers import SHORTEST_LIMIT_S, Stragglers


class Actor:
    """Notes what it is asked, with which arguments; each result stands for a ref."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, method):
        return Remote(self.asked, method)


class Remote:
    def __init__(self, asked, method):
        self.asked, self.method = asked, method

    def options(self, num_returns, **_):
        self.num_returns = num_returns
        return self

    def remote(self, *args):
        self.asked.append((self.method, args))
        refs = [f"{self.method}{args} {len(self.asked)} of {id(self.asked)}, {number}" for number in range(self.num_returns)]
        return refs[0] if self.num_returns == 1 else refs


class World:
    """Two generators, two scorers and one actor that puts their results together; nothing is answered until a test says so."""

    def __init__(self):
        self.generation, self.reward = self.members("generation", 2), self.members("reward", 2)
        (self.experience,) = self.members("experience", 1)
        self.there, self.failed, self.told = set(), set(), []
        self.late = Stragglers(
            [self.generation, self.reward], lambda: [*self.generation, *self.reward, self.experience],
            lambda calls: {call for call in calls if call.sent and call.receipt in self.there},
            lambda call: RuntimeError() if call in self.failed else None,
            lambda call, helper, seen, phase: self.told.append((call.name, helper.name, seen)),
        )  # fmt: skip
        for _ in range(3):
            self.late.ended(Call(self.reward[0], "score", (), ""), 1.0)

    @staticmethod
    def members(role, count):
        made = [Member(role, number, Actor) for number in range(count)]
        for member in made:
            member.process = ActorProcess("here", 1 + member.number, 0)
        return made

    def ask(self, member, method, *args, movable=True, **options):
        (handle,) = member.call(method, *args, name=f"{member.name} {method}", movable=movable, receipt=True, **options)
        return handle

    def answer(self, call):
        self.there.add(call.receipt)

    def answer_to_everything(self):
        """As a waiter does: what was sent is there, and was looked at."""
        for member in self.late.members():
            for call in [each for each in member.calls if each.sent]:
                self.answer(call)
                call.finish()


def test_what_needs_a_movable_result_is_sent_when_that_is_there_and_what_follows_keeps_its_place():
    world = World()
    drawn = [world.ask(member, "generate", number) for number, member in enumerate(world.generation)]
    scores = [world.ask(world.reward[0], "score", rollout, movable=False) for rollout in drawn]
    texts = world.ask(world.reward[0], "texts", "any", movable=False)
    other = world.ask(world.reward[0], "weights", movable=False, concurrency_group="in flight")
    both = world.ask(world.experience, "assemble", *scores, movable=False)
    assert other.call.sent and not any(each.call.sent for each in (*scores, texts, both))
    assert set(world.late.send_due()) == {each.call for each in drawn}
    world.answer(drawn[1].call)
    assert world.late.send_due() == [drawn[0].call]
    assert not scores[1].call.sent, "an actor is asked in the order in which the loop asked"
    world.answer(drawn[0].call)
    assert world.late.send_due() == []
    assert [method for method, _ in world.reward[0].actor.asked] == ["weights", "score", "score", "texts"]
    assert world.reward[0].actor.asked[1][1] == (drawn[0].ref,)
    assert world.experience.actor.asked == [("assemble", (scores[0].ref, scores[1].ref))]


def test_without_movable_calls_all_is_sent_at_once():
    world = World()
    rollout = world.ask(world.generation[0], "generate", 0, movable=False)
    score = world.ask(world.reward[0], "score", rollout)
    world.ask(world.experience, "assemble", world.ask(world.reward[1], "texts", movable=False), movable=False)
    assert score.call.sent and world.experience.calls[0].sent and world.late.send_due() == []


@pytest.mark.parametrize(("usual_s", "limit_s"), [(1.0, SHORTEST_LIMIT_S), (5.0, 20.0)])
def test_a_call_is_late_after_four_times_what_its_kind_takes(usual_s, limit_s):
    world = World()
    for _ in range(40):  # older ones count no more
        world.late.ended(Call(world.reward[1], "score", (), ""), usual_s)
    call = world.ask(world.reward[0], "score", "rollout").call
    world.late.look(call, limit_s, "scoring")
    assert world.told == []
    world.late.look(call, limit_s + 0.1, "scoring")
    assert world.told == [
        ("reward actor 0 score", "reward actor 1", f"at work for {limit_s:.0f} s, a usual call takes {usual_s} s")
    ]
    assert world.reward[1].actor.asked == [("score", ("rollout",))]
    world.late.look(call, 1000.0, "scoring")
    assert len(world.told) == 1, "one second actor, whatever it does"


def test_of_a_kind_that_nobody_knows_none_is_late():
    world = World()
    world.late.look(world.ask(world.generation[0], "generate", 0).call, 1000.0, "generation")
    world.late.look(world.ask(world.reward[0], "texts", 0, movable=False).call, 1000.0, "scoring")
    assert world.told == []


def test_only_an_idle_actor_is_asked():
    world = World()
    call, other = (world.ask(member, "score", "rollout").call for member in world.reward)
    world.late.look(call, 100.0, "scoring")
    assert world.told == []
    world.answer(other)
    world.reward[1].process = None  # it is being made again
    world.late.look(call, 100.0, "scoring")
    assert world.told == []
    world.reward[1].process = world.reward[0].process
    world.late.look(call, 100.0, "scoring")
    assert len(world.told) == 1


def test_the_second_actor_is_first_and_the_late_one_is_relieved_of_the_rest():
    world = World()
    scores = [world.ask(world.reward[0], "score", f"rollout {number}") for number in range(3)]
    both = world.ask(world.experience, "assemble", *scores, movable=False)
    first = scores[0].call
    own = first.receipt
    world.late.look(first, 100.0, "scoring")
    assert len(world.told) == 1, "one idle actor, one call"
    (copy,) = world.reward[1].unasked
    assert copy in world.late.send_due()
    world.answer(copy)
    world.late.take_answers()
    assert first.refs == copy.refs and first in world.reward[1].calls and first not in world.reward[0].calls
    assert first.life == world.reward[1].lives
    first.finish()
    world.late.look(scores[1].call, 0.0, "scoring")  # the late one has not begun it
    assert world.told[1] == ("reward actor 0 score", "reward actor 1", "still at reward actor 0 score")
    world.there.add(own)  # it answers after all, the same
    world.late.take_answers()
    assert first.refs == copy.refs and world.reward[0].unasked == []
    world.answer_to_everything()
    world.late.send_due()
    assert both.call.sent == 1 and world.experience.actor.asked == [("assemble", tuple(each.ref for each in scores))]


def test_its_own_actor_is_first_or_the_second_one_fails_or_the_step_is_given_up():
    for way in ("own", "fails", "given up"):
        world = World()
        call = world.ask(world.reward[0], "score", "rollout").call
        refs = call.refs
        world.late.look(call, 100.0, "scoring")
        (copy,) = world.reward[1].unasked
        if way == "own":
            world.answer(call)
        elif way == "fails":
            world.failed.add(copy)
        else:
            world.reward[0].calls.clear()
        world.answer(copy)
        world.late.take_answers()
        assert call.refs == refs and call.member is world.reward[0], way
        assert world.reward[1].calls == [] and world.late.send_due() == [], way
        world.late.look(call, 1000.0, "scoring")
        assert len(world.told) == 1, f"no third time: {way}"


def test_a_generator_with_other_weights_is_not_asked():
    world = World()
    for member in world.generation:
        world.ask(member, "load_weights", 7, movable=False, brings_weights=True)
    world.answer_to_everything()
    world.ask(world.generation[1], "load_weights", 8, movable=False, brings_weights=True)
    world.answer(world.generation[1].calls[0])  # there, if nobody has looked at it yet
    for _ in range(3):
        world.late.ended(Call(world.generation[0], "generate", (), ""), 1.0)
    call = world.ask(world.generation[0], "generate", 0).call
    world.late.look(call, 100.0, "generation")
    assert world.told == []
    world.generation[1].calls.clear()
    world.late.look(call, 100.0, "generation")
    assert [helper for _, helper, _ in world.told] == ["generation actor 1"]

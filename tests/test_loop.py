"""The PPO loop: the order of things on scripted roles, and the arithmetic on the real ones in one process."""

import copy
import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from differences import saw
from in_process import LocalRoles
from tiny import TEXTS, tiny_recipe, write_start

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import UserError
from rlhf_ray.messages import Scores, Sequences
from rlhf_ray.ppo.loop import LoopHooks, LoopState, PPOLoop
from rlhf_ray.ppo.step import MismatchError, StepConfig, cut_chunks, ppo_step, step_prompts, sum_over_ranks
from rlhf_ray.roles.experience import policy_shards, rank_parts
from rlhf_ray.runs.run_folder import RunFolder

# -- scripted roles ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Handle:
    """A verb's result before it is there."""

    verb: str
    value: object = None


@dataclass
class ScriptedRoles:
    """Every role in one: writes down what is asked of it, and answers from the script."""

    mismatch: float = 0.0
    mismatch_kl: float = 0.0
    kl: float = 1.0
    eval_scores: list[float] = field(default_factory=lambda: [0.0] * 100)
    eval_judge: list[float] = field(default_factory=list)
    broken: str = ""  # waiting for this verb's handles fails
    events: list[tuple] = field(default_factory=list)
    handles: list[Handle] = field(default_factory=list)
    waits: list[list[Handle]] = field(default_factory=list)

    def __post_init__(self):
        self.generation = self.reward = self.reference = self.policy = self.critic = self.experience = self

    def _answer(self, verb, *values):
        made = [Handle(verb, value) for value in values]
        self.handles += made
        return made

    def _log(self, verb, *what):
        self.events.append((verb, *what))

    @property
    def waited(self):
        return [handle for handles in self.waits for handle in handles]

    def verbs(self):
        return [event[0] for event in self.events]

    def generate(self, chunks):
        self._log("generate", chunks)
        return self._answer("generate", *chunks)

    def load_weights(self, weights, policy_version):
        self._log("load_weights", policy_version)
        assert [handle.verb for handle in weights] == ["weights"]
        return self._answer("load_weights", policy_version)

    def score(self, rollouts):
        self._log("score")
        return self._answer("score", *(Scores(total=np.ones(1, np.float32)) for _ in rollouts))

    def judge(self, rollouts):
        self._log("judge")
        return self._answer("judge", *rollouts)

    def texts(self, rollout, count):
        return self._answer("texts", [("prompt", "response")])[0]

    def logprobs(self, rollouts):
        self._log("logprobs")
        return self._answer("logprobs", *rollouts)

    def values(self, rollouts):
        self._log("values")
        return self._answer("values", *rollouts)

    def assemble(self, rollouts, scores, ref_logprobs, old_logprobs, old_values, kl_coef):
        self._log("assemble", kl_coef)
        parts = rollouts, scores, ref_logprobs, old_logprobs, old_values
        verbs = [{handle.verb for handle in part} for part in parts]
        assert verbs == [{"generate"}, {"score"}, {"logprobs"}, {"logprobs"}, {"values"}]
        stats = {"policy/mismatch_p99": self.mismatch, "policy/mismatch_kl": self.mismatch_kl, "objective/kl": self.kl}
        return self._answer("assemble", stats)[0], ["policy shard"], ["critic shard"]

    def update(self, shards, learning_rate, kl_coef=None):
        self._log("update", *shards, learning_rate)
        return self._answer("update", {"policy/loss": 0.5})

    def weights(self):
        self._log("weights")
        return self._answer("weights", None)

    def evaluate(self, rollouts, scores, ref_logprobs, judged):
        self._log("evaluate")
        figures = {"eval/score": self.eval_scores.pop(0)}
        if judged:
            assert {handle.verb for handle in judged} == {"judge"}
            figures["eval/judge"] = self.eval_judge.pop(0)
        return self._answer("evaluate", figures)[0]

    def wait(self, handles, what):
        self.waits.append(list(handles))
        if any(handle.verb == self.broken for handle in handles):
            raise UserError(f"{self.broken} failed in {what}")

    def get(self, handles, what):
        self.wait(handles, what)
        return [handle.value for handle in handles]


@dataclass
class Diary:
    """Hooks that write down what the controller tells them."""

    records: list[tuple] = field(default_factory=list)
    saves: list[LoopState] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    stop_after: int | None = None

    def hooks(self):
        return LoopHooks(
            record=lambda step, metrics: self.records.append((step, dict(metrics))),
            samples=lambda step, texts, scores: self.samples.append(step),
            save=self.saves.append,
            save_best=lambda state: self.best.append(state.step),
            stop_requested=lambda: self.stop_after is not None and max(self.steps(), default=-1) >= self.stop_after,
        )

    def steps(self):
        return [step for step, _ in self.records]


def scripted_loop(roles, diary, state=None, prompts=10, **options):
    config = PPOConfig(
        **{
            "steps": 7,
            "rollout_batch_size": 4,
            "minibatch_size": 4,
            "microbatch_size": 4,
            "eval_every": 3,
            "eval_prompts": 3,
            "checkpoint_every": 2,
            **options,
        }
    )
    return PPOLoop(
        roles,
        config,
        diary.hooks(),
        state or LoopState(kl_coef=config.kl_coef),
        prompts=prompts,
        eval_prompts=3,
        chunk_size=3,
        seed=0,
    )


def training_units(roles):
    return [chunk for verb, *what in roles.events if verb == "generate" for chunk in what[0] if not chunk.evaluation]


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_an_epoch_takes_each_prompt_at_most_once_and_the_next_is_in_another_order():
    steps = [step_prompts(step, prompts=12, batch=4, seed=5) for step in range(9)]
    epochs = [steps[i : i + 3] for i in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(prompt for batch in epoch for prompt in batch) == list(range(12))
    assert epochs[0] != epochs[1] != epochs[2]
    assert step_prompts(0, 12, 4, seed=5) != step_prompts(0, 12, 4, seed=6)


def test_the_rest_of_an_epoch_is_left_out_and_no_prompt_is_forgotten_for_ever():
    steps = [step_prompts(step, prompts=10, batch=4, seed=0) for step in range(40)]
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert len({*first, *second}) == 8
    assert {prompt for step in steps for prompt in step} == set(range(10))


def test_units_hold_every_sample_of_every_prompt_once_in_chunks():
    chunks = cut_chunks(5, [9, 4, 7], samples=2, chunk_size=4)
    assert [(chunk.prompt_indices, chunk.sample_indices) for chunk in chunks] == [
        ((9, 9, 4, 4), (0, 1, 0, 1)),
        ((7, 7), (0, 1)),
    ]
    assert [(chunk.step, chunk.index, chunk.evaluation) for chunk in chunks] == [(5, 0, False), (5, 1, False)]


# -- one step ---------------------------------------------------------------------------------------------------------


def options(**values):
    return StepConfig(
        **{
            "step": 4,
            "kl_coef": 0.1,
            "learning_rate": 0.5,
            "critic_learning_rate": 0.25,
            "max_mismatch": 0.5,
            "max_mismatch_kl": 0.01,
            "max_first_approx_kl": 1e-3,
            **values,
        }  # fmt: skip
    )


def test_a_step_rolls_out_assembles_updates_and_syncs():
    roles = ScriptedRoles()
    ppo_step(roles, cut_chunks(4, range(6), 1, 3), options())
    assert roles.verbs() == [
        "generate",
        "score",
        "logprobs",
        "logprobs",
        "values",
        "assemble",
        "update",
        "update",
        "weights",
        "load_weights",
    ]
    assert roles.events[5:] == [
        ("assemble", 0.1),
        ("update", "policy shard", 0.5),
        ("update", "critic shard", 0.25),
        ("weights",),
        ("load_weights", 5),
    ]


def test_a_step_drops_no_handle():
    """A failed call whose handle nobody waits for would be a silent loss: a lost load_weights means stale rollouts."""
    roles = ScriptedRoles()
    ppo_step(roles, cut_chunks(4, range(6), 1, 3), options())
    assert {id(handle) for handle in roles.handles} == {id(handle) for handle in roles.waited}


def test_a_run_drops_no_handle():
    """Evaluations too: what is never waited for is never released either."""
    roles = ScriptedRoles()
    scripted_loop(roles, Diary()).run()
    assert {id(handle) for handle in roles.handles} == {id(handle) for handle in roles.waited}


def test_causes_are_waited_for_before_what_needs_them():
    """A dead reward model takes the experience actor's call along; the failure that is told must be the reward model's."""
    needs = {
        "score": {"generate"},
        "logprobs": {"generate"},
        "values": {"generate"},
        "load_weights": {"weights"},
        "assemble": {"score", "logprobs", "values"},
        "evaluate": {"score", "logprobs"},
    }
    roles = ScriptedRoles()
    scripted_loop(roles, Diary(), steps=1, eval_every=1).run()
    block = {}
    for number, handles in enumerate(roles.waits):
        for handle in handles:
            block.setdefault(id(handle), number)
    for place, handle in enumerate(roles.handles):
        causes = [cause for cause in roles.handles[:place] if cause.verb in needs.get(handle.verb, ())]
        assert all(block[id(cause)] < block[id(handle)] for cause in causes), handle.verb


@pytest.mark.parametrize(
    "verb", ["generate", "score", "logprobs", "values", "assemble", "update", "weights", "load_weights"]
)
def test_a_failure_of_any_verb_ends_the_step(verb):
    with pytest.raises(UserError, match=f"{verb} failed"):
        ppo_step(ScriptedRoles(broken=verb), cut_chunks(4, range(6), 1, 3), options())


@pytest.mark.parametrize("figure, limit", [("mismatch", "max_mismatch = 0.5"), ("mismatch_kl", "max_mismatch_kl = 0.01")])
@pytest.mark.parametrize("value", [0.51, math.inf, math.nan])
def test_the_mismatch_gate_stands_before_the_update(figure, limit, value):
    roles = ScriptedRoles(**{figure: value})
    with pytest.raises(MismatchError, match=limit):
        ppo_step(roles, cut_chunks(4, range(6), 1, 3), options())
    assert roles.verbs()[-1] == "assemble"


def test_statistics_add_up_over_ranks_but_for_the_gradient_norm():
    parts = [{"policy/loss": 1.0, "policy/grad_norm": 3.0}, {"policy/loss": 2.0, "policy/grad_norm": 3.0}]
    assert sum_over_ranks(parts) == {"policy/loss": 3.0, "policy/grad_norm": 3.0}


# -- the controller ---------------------------------------------------------------------------------------------------


def test_evaluations_and_checkpoints_come_when_they_are_due():
    roles, diary = ScriptedRoles(), Diary()
    assert scripted_loop(roles, diary).run()
    assert diary.steps() == list(range(8))
    assert [step for step, metrics in diary.records if "eval/score" in metrics] == [0, 3, 6, 7] == diary.samples
    assert [state.step for state in diary.saves] == [2, 4, 6, 7]
    assert [event[1] for event in roles.events if event[0] == "load_weights"] == list(range(8))


def test_a_stop_request_ends_the_loop_with_a_checkpoint():
    diary = Diary(stop_after=3)
    loop = scripted_loop(ScriptedRoles(), diary)
    assert not loop.run()
    assert loop.state.step == 3 and [state.step for state in diary.saves] == [2, 3]


def test_a_step_is_saved_once():
    """Saving again would take the checkpoint away for a moment, and with it the run if the machine fails then."""
    diary = Diary(stop_after=4)
    assert not scripted_loop(ScriptedRoles(), diary).run()
    resumed = Diary(stop_after=-1)
    assert not scripted_loop(ScriptedRoles(), resumed, diary.saves[-1]).run()
    assert [state.step for state in diary.saves] == [2, 4] and resumed.saves == []


def test_a_stop_before_the_first_step_leaves_a_checkpoint_too():
    diary = Diary(stop_after=0)
    assert not scripted_loop(ScriptedRoles(), diary).run()
    assert [state.step for state in diary.saves] == [0]


def test_a_long_step_makes_a_checkpoint_overdue():
    diary = Diary()
    scripted_loop(ScriptedRoles(), diary, checkpoint_every=100, checkpoint_minutes=1e-9).run()
    assert [state.step for state in diary.saves] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_resumed_loop_does_what_the_undisturbed_one_would(stop_after):
    options = {"adaptive_kl": {"target": 2.0, "horizon": 10}, "samples_per_prompt": 2, "minibatch_size": 8}
    scores = [1.0, 0.5, 2.0, 1.5]

    def run(roles, diary, state=None):
        scripted_loop(roles, diary, state, **options).run()
        return [(verb, *what) for verb, *what in roles.events if verb in ("generate", "update", "assemble", "evaluate")]

    whole = Diary()
    undisturbed = run(ScriptedRoles(kl=3.0, eval_scores=scores[:]), whole)
    first, second = Diary(stop_after=stop_after), Diary()
    before = run(ScriptedRoles(kl=3.0, eval_scores=scores[:]), first)
    left = scores[sum(event[0] == "evaluate" for event in before) :]
    state = LoopState.from_json(json.loads(json.dumps(first.saves[-1].to_json())))
    roles = ScriptedRoles(kl=3.0, eval_scores=left)
    assert before + run(roles, second, state) == undisturbed
    assert roles.events[1] == ("load_weights", stop_after)
    assert first.steps() + second.steps() == whole.steps()
    assert second.saves[-1] == whole.saves[-1]
    assert first.best + second.best == whole.best


def test_learning_rates_fall_linearly_or_stay():
    def rates(**options):
        roles = ScriptedRoles()
        scripted_loop(roles, Diary(), steps=4, learning_rate=0.4, critic_learning_rate=0.8, **options).run()
        return [event[2] for event in roles.events if event[0] == "update"]

    assert rates() == pytest.approx([0.4, 0.8, 0.3, 0.6, 0.2, 0.4, 0.1, 0.2])
    assert rates(anneal=False) == [0.4, 0.8] * 4


def test_the_adaptive_coefficient_follows_the_kl_and_a_fixed_one_stays():
    """kl 3 against a target of 2: the error 0.5 is clipped to 0.2; 4 episodes of a horizon of 10: 1.08 a step."""

    def coefficients(**options):
        roles, diary = ScriptedRoles(kl=3.0), Diary()
        scripted_loop(roles, diary, steps=3, kl_coef=0.1, **options).run()
        return [event[1] for event in roles.events if event[0] == "assemble"], diary.saves[-1].kl_coef

    used, after = coefficients(adaptive_kl={"target": 2.0, "horizon": 10})
    assert used == pytest.approx([0.1, 0.108, 0.11664]) and after == pytest.approx(0.1259712)
    assert coefficients() == ([0.1] * 3, 0.1)


def test_the_best_policy_is_kept():
    diary = Diary()
    loop = scripted_loop(ScriptedRoles(eval_scores=[1.0, 3.0, 2.0, 3.0]), diary)
    loop.run()
    assert diary.best == [3] and (loop.state.best_step, loop.state.best_score) == (3, 3.0)


def run_until(roles, stop_after=None, state=None, **options):
    """(the loop, whether it finished, what it told) of a run of at most 12 steps that evaluates each."""
    diary = Diary(stop_after=stop_after)
    loop = scripted_loop(roles, diary, state, **{"steps": 12, "eval_every": 1, "checkpoint_every": 3, **options})
    return loop, loop.run(), diary


def test_patience_ends_the_training_and_counts_evaluations_without_a_better_one():
    """Best at step 2; 3, 4 and 5 are no better (an equal one is not). The last step is checkpointed."""
    loop, finished, diary = run_until(ScriptedRoles(eval_scores=[0.0, 1.0, 4.0, 3.0, 4.0, 3.9]), patience=3)
    assert finished and diary.steps() == [0, 1, 2, 3, 4, 5]
    assert (loop.state.best_step, loop.state.best_score, loop.state.worse_since) == (2, 4.0, 3)
    assert diary.best == [1, 2] and [state.step for state in diary.saves] == [3, 5]
    assert [metrics["eval/best_step"] for _, metrics in diary.records] == [0, 1, 2, 2, 2, 2]


def test_a_better_policy_gives_patience_back():
    scores = [0.0, -1.0, -1.0, 1.0, 0.0, 0.0, 2.0, 1.0, 1.0, 1.0, 9.0]
    loop, finished, diary = run_until(ScriptedRoles(eval_scores=scores), patience=3)
    assert finished and loop.state.step == 9 and diary.best == [3, 6]


def test_without_patience_it_takes_all_steps():
    loop, finished, _ = run_until(ScriptedRoles(eval_scores=[9.0] + [0.0] * 12))
    assert finished and loop.state.step == 12 and loop.state.worse_since == 12


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 4])
def test_a_stopped_run_has_as_much_patience_as_an_undisturbed_one(stop_after):
    scores = [0.0, 1.0, 0.5, 0.5, 0.5]
    whole = run_until(ScriptedRoles(eval_scores=scores[:]), patience=3, roll_back=True)
    first = run_until(ScriptedRoles(eval_scores=scores[:]), stop_after, patience=3, roll_back=True)
    assert first[1] == (stop_after == 4)
    state = LoopState.from_json(json.loads(json.dumps(first[2].saves[-1].to_json())))
    # A run that was stopped before its first step evaluates the start model once more.
    left = scores[stop_after + 1 :] if stop_after > 0 else scores[:]
    second = run_until(ScriptedRoles(eval_scores=left), None, state, patience=3, roll_back=True)
    assert second[1] and second[0].state == whole[0].state and whole[0].state.step == 4
    assert first[2].steps() + second[2].steps()[stop_after == 0 :] == whole[2].steps()
    assert first[2].best + second[2].best[stop_after == 0 :] == whole[2].best == [0, 1]


def test_a_run_stopped_before_its_first_step_loses_no_patience():
    """The start model, the best one, is evaluated once more when the run goes on."""
    first = run_until(ScriptedRoles(eval_scores=[2.0]), 0, patience=2)
    assert first[0].state.worse_since == 0 and first[2].saves[-1].step == 0
    loop, finished, _ = run_until(ScriptedRoles(eval_scores=[2.0, 1.0, 1.0, 1.0]), None, first[2].saves[-1], patience=2)
    assert finished and (loop.state.step, loop.state.best_step, loop.state.worse_since) == (2, 0, 2)


def test_a_checkpoint_of_a_run_that_ran_out_of_patience_ends_at_once():
    state = LoopState(kl_coef=0.1, step=5, best_score=4.0, best_step=2, worse_since=3)
    roles = ScriptedRoles()
    loop, finished, diary = run_until(roles, None, state, patience=3)
    assert finished and diary.steps() == [] and "generate" not in roles.verbs()
    loop, finished, _ = run_until(ScriptedRoles(), None, state, patience=8)
    assert finished and loop.state.step == 10


def test_the_judge_is_asked_in_evaluations_and_may_decide():
    """The score rises for ever, the judge's falls from step 2 on."""
    scripts = {"eval_scores": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "eval_judge": [0.0, 1.0, 3.0, 2.0, 1.0, 0.0]}
    roles = ScriptedRoles(**{name: values[:] for name, values in scripts.items()})
    loop, finished, diary = run_until(roles, patience=2, judge_evaluations=True, best_by="judge")
    assert finished and (loop.state.step, loop.state.best_step, loop.state.best_score) == (4, 2, 3.0)
    assert [metrics["eval/judge"] for _, metrics in diary.records] == [0.0, 1.0, 3.0, 2.0, 1.0]
    assert roles.verbs().count("judge") == 5 and diary.best == [1, 2]
    assert {id(handle) for handle in roles.handles} == {id(handle) for handle in roles.waited}
    roles = ScriptedRoles(**scripts)
    loop, _, diary = run_until(roles, steps=4, judge_evaluations=True)
    assert loop.state.best_step == 4 and diary.best == [1, 2, 3, 4], (
        "the score decides unless the recipe says otherwise"
    )
    assert "judge" not in (roles := ScriptedRoles()).verbs() and run_until(roles)[1] and "judge" not in roles.verbs()


def test_the_start_model_is_kept_where_it_may_be_gone_back_to():
    scores = [5.0, 1.0, 1.0, 1.0]
    for roll_back, kept in ((True, [0]), (False, [])):
        loop, _, diary = run_until(ScriptedRoles(eval_scores=scores[:]), steps=3, roll_back=roll_back)
        assert diary.best == kept and loop.state.best_step == 0


def test_the_state_survives_json_before_the_first_evaluation_too():
    for state in (LoopState(kl_coef=0.3), LoopState(step=4, kl_coef=0.1 + 0.2, best_score=1 / 3, best_step=2)):
        assert LoopState.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False))) == state


def test_every_step_trains_on_its_own_prompts():
    roles = ScriptedRoles()
    scripted_loop(roles, Diary(), steps=6, prompts=12).run()
    chunks = training_units(roles)
    for epoch in ((0, 1, 2), (3, 4, 5)):
        rows = [row for chunk in chunks if chunk.step in epoch for row in chunk.prompt_indices]
        assert sorted(rows) == list(range(12))


# -- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_together_hold_each_row_of_each_minibatch_once(ranks):
    """Row b is b + 1 tokens long, and everything about it says b: what a rank would train on shows whose it is."""
    rows, schedule = 8, [[0, 3, 5, 6], [1, 2, 4, 7], [0, 1, 2, 3], [4, 5, 6, 7]]
    ids = [np.full(b + 1, b, np.int32) for b in range(rows)]
    floats = torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, rows)
    shards = policy_shards(
        3, rank_parts(Sequences.of(ids, ids), schedule, ranks), floats + 0.25, floats + 0.5, None
    )
    assert len(shards) == ranks and all(shard.step == 3 for shard in shards)
    found = [[] for _ in schedule]
    for shard in shards:
        responses, lengths = shard.sequences.responses(), shard.sequences.response_lengths
        parts = zip(
            responses,
            shard.sequences.prompts(),
            np.split(shard.old_logprobs, np.cumsum(lengths)[:-1]),
            np.split(shard.advantages, np.cumsum(lengths)[:-1]),
            strict=True,
        )
        whose = []
        for response, prompt, old, target in parts:
            b = int(response[0])
            assert len(response) == len(prompt) == len(old) == len(target) == b + 1
            assert (prompt == b).all() and (old == b + 0.25).all() and (target == b + 0.5).all()
            whose.append(b)
        assert len(set(whose)) == len(whose), "a shard holds a row once, however often it is trained on"
        for number, step in enumerate(shard.schedule):
            assert len(step.rows) == 4 // ranks
            assert step.num_tokens == sum(b + 1 for b in schedule[number]), "of all ranks"
            found[number] += [whose[row] for row in step.rows]
    assert [sorted(rows) for rows in found] == schedule


# -- the real roles ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_start(tiny_recipe(), RunFolder(tmp_path_factory.mktemp("loop")))


def real_loop(recipe, roles, diary, state=None):
    return PPOLoop(
        roles,
        recipe.ppo,
        diary.hooks(),
        state or LoopState(kl_coef=recipe.ppo.kl_coef),
        prompts=16,
        eval_prompts=6,
        chunk_size=recipe.generation.chunk_size,
        seed=recipe.seed,
    )


def run_real(recipe, folder, **kwargs):
    roles, diary = LocalRoles(recipe, folder, **kwargs), Diary()
    real_loop(recipe, roles, diary).run()
    return roles, diary


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_the_first_minibatch_has_ratio_one_exactly_at_equal_padding(folder):
    """Chunk, microbatch and minibatch are one batch of the same rows, so old and new log-probs are the same numbers."""
    recipe = tiny_recipe(ppo={"steps": 2, "minibatch_size": 8, "microbatch_size": 8}, generation={"chunk_size": 8})
    _, diary = run_real(recipe, folder)
    for _, metrics in diary.records[1:]:
        assert metrics["first_policy/ratio"] == 1.0
        assert metrics["first_policy/approx_kl"] == 0.0
        assert metrics["first_policy/clip_frac"] == metrics["first_value/clip_frac"] == 0.0
        assert metrics["policy/approx_kl"] > 0.0  # the second epoch sees another policy


@pytest.mark.parametrize("options", [{}, {"microbatch_tokens": 60, "entropy_coef": 0.05}, {"critic_warmup_steps": 1}])
def test_a_first_step_from_the_forward_passes_that_are_there_is_the_same_step(folder, options):
    """Two chunks of four in microbatches of two: equal weights, as many forward passes fewer, and no approx_kl at all."""
    ends, passes = [], []
    for reuse in (False, True):
        ppo = {"steps": 2, "minibatch_size": 8, "reuse_forward": reuse} | options
        recipe = tiny_recipe(ppo=ppo)
        roles, diary = LocalRoles(recipe, folder), Diary()
        count = [0, 0]
        for number, role in enumerate((roles.policy, roles.critic)):
            role.roles[0].engine.module.register_forward_hook(
                lambda *_, number=number, count=count: count.__setitem__(number, count[number] + 1)
            )
        assert real_loop(recipe, roles, diary).run()
        ends.append([dict(role.roles[0].engine.weights()) for role in (roles.policy, roles.critic)])
        passes.append(count)
        if reuse:
            assert all(metrics.get("first_policy/approx_kl", 0.0) == 0.0 for _, metrics in diary.records[1:])
    for one, other in zip(*ends, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(
                other[name], tensor, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
    if not options:  # 2 steps of 4 microbatches: once for the old ones and once each epoch
        assert passes == [[2 * 4 * 3] * 2, [2 * 4 * 2] * 2]
    assert passes[1][0] < passes[0][0] and passes[1][1] < passes[0][1]


def test_the_first_minibatch_has_ratio_one_to_rounding_at_unequal_padding(folder):
    _, diary = run_real(tiny_recipe(ppo={"steps": 2}), folder)
    lengths = {metrics["objective/response_length"] for _, metrics in diary.records[1:]}
    assert not any(length.is_integer() for length in lengths), "responses of one length would prove nothing"
    for step, metrics in diary.records[1:]:
        assert metrics["first_policy/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert abs(metrics["first_policy/approx_kl"]) < 1e-6
        assert metrics["policy/mismatch_max"] < 1e-5, "generator and policy agree, also after the sync"
        assert metrics["rollout/policy_version_min"] == step - 1


def test_at_a_lower_temperature_generator_policy_and_reference_agree(folder):
    _, diary = run_real(tiny_recipe(ppo={"steps": 2}, generation={"temperature": 0.6}), folder)
    first, second = (metrics for _, metrics in diary.records[1:])
    assert max(first["policy/mismatch_max"], second["policy/mismatch_max"]) < 1e-5
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4), "the policy starts at the reference"
    assert second["objective/kl"] != pytest.approx(0.0, abs=1e-4)


@pytest.fixture(scope="module")
def undisturbed(folder):
    roles, diary = run_real(tiny_recipe(), folder)
    return roles.weights(), diary


def test_training_moves_both_models(folder, undisturbed):
    start = LocalRoles(tiny_recipe(), folder).weights()
    assert len(differing(start, undisturbed[0])) == len(start)


def test_it_does_not_matter_which_actor_a_chunk_goes_to(folder, undisturbed):
    roles, diary = run_real(tiny_recipe(), folder, actors=3)
    assert differing(roles.weights(), undisturbed[0]) == []
    saw("weights: 3 generation, reward and reference actors for 1", 0.0)
    scores = [[metrics["objective/score"] for _, metrics in each.records[1:]] for each in (diary, undisturbed[1])]
    assert scores[0] == scores[1]


def test_evaluating_does_not_disturb_training(folder, undisturbed):
    roles, _ = run_real(tiny_recipe(ppo={"eval_every": 1}), folder)
    assert differing(roles.weights(), undisturbed[0]) == []


def test_evaluation_draws_the_same_responses_from_the_same_policy(folder):
    roles = LocalRoles(tiny_recipe(), folder)
    drawn = []
    for step in (0, 3):
        rollouts = roles.generation.generate(cut_chunks(step, range(6), 1, 4, evaluation=True))
        drawn.append([ids.tolist() for rollout in rollouts for ids in rollout.sequences.responses()])
    training = roles.generation.generate(cut_chunks(0, range(6), 1, 4))
    assert drawn[0] == drawn[1]
    assert drawn[0] != [ids.tolist() for rollout in training for ids in rollout.sequences.responses()]


def test_evaluation_asks_the_held_out_prompts(folder):
    roles = LocalRoles(tiny_recipe(), folder)
    for evaluation, expected in ((False, TEXTS[2:5]), (True, TEXTS[18:21])):
        (rollout,) = roles.generation.generate(cut_chunks(0, [2, 3, 4], 1, 4, evaluation=evaluation))
        assert [prompt for prompt, _ in roles.reward.texts(rollout, 3)] == expected


def test_samples_of_a_prompt_differ(folder):
    roles = LocalRoles(tiny_recipe(), folder)
    (rollout,) = roles.generation.generate(cut_chunks(0, [3], 4, 4))
    assert len({tuple(ids) for ids in rollout.sequences.responses()}) > 1
    assert len({tuple(ids) for ids in rollout.sequences.prompts()}) == 1


def test_a_resumed_run_ends_in_the_same_weights(folder, undisturbed):
    """What a checkpoint holds (weights, optimiser, the controller's state) is all there is: the rest is made anew."""
    recipe = tiny_recipe()
    before, diary = LocalRoles(recipe, folder), Diary(stop_after=1)
    assert not real_loop(recipe, before, diary).run()
    after, rest = LocalRoles(recipe, folder), Diary()
    for old, new in zip(before.engines, after.engines, strict=True):
        new.module.load_state_dict(old.module.state_dict())
        new.optimizer.load_state_dict(copy.deepcopy(old.optimizer.state_dict()))
    assert real_loop(recipe, after, rest, diary.saves[-1]).run()
    assert differing(after.weights(), undisturbed[0]) == []
    assert diary.steps() + rest.steps() == undisturbed[1].steps()


def test_a_generator_on_stale_weights_stops_the_run(folder):
    """Weights that got lost on the way must not go unnoticed."""
    recipe = tiny_recipe(ppo={"learning_rate": 3e-2, "max_mismatch": 1e-3})
    roles, diary = LocalRoles(recipe, folder), Diary()
    roles.generation.synced = False
    with pytest.raises(MismatchError):
        real_loop(recipe, roles, diary).run()
    assert diary.steps() == [0, 1]


def count_t(prompts, responses):
    """A reward that is easy to raise: the share of one letter."""
    return [text.count("t") for text in responses]


CRITIC_FREE = {
    "rloo": {},
    "grpo": {"kl_in": "loss", "kl_estimator": "k3", "loss_aggregation": "sequence_mean"},
    "dr_grpo": {"loss_aggregation": "constant", "clip_range_high": 0.28, "dual_clip": 3.0},
    "reinforce_pp": {"entropy_coef": 0.01, "loss_aggregation": "sequence_sum"},
    "reinforce_pp_baseline": {"kl_in": "loss", "kl_estimator": "k2", "max_approx_kl": 0.05},
}


@pytest.mark.parametrize("advantage", CRITIC_FREE)
def test_an_algorithm_without_a_critic_runs_without_one(folder, advantage):
    recipe = tiny_recipe(ppo={
        "steps": 2, "rollout_batch_size": 4, "samples_per_prompt": 2, "minibatch_size": 8, "microbatch_size": 8,
        "advantage": advantage, **CRITIC_FREE[advantage],
    }, generation={"chunk_size": 8})  # fmt: skip
    start = LocalRoles(recipe, folder).weights()
    roles, diary = run_real(recipe, folder)
    assert roles.critic is None and "critic" not in recipe.ppo_roles
    assert len(differing(start, roles.weights())) == len(start)
    for _, metrics in diary.records[1:]:
        assert metrics["first_policy/ratio"] == 1.0 and metrics["first_policy/approx_kl"] == 0.0
        assert not any(name.startswith("value/") for name in metrics)
        assert ("policy/kl_loss" in metrics) == (recipe.ppo.kl_in == "loss")


def count_a_few(prompts, responses):
    """A reward that most prompts' samples share: whether two letters occur."""
    return [float("t" in text and "o" in text) for text in responses]


def test_prompts_that_tell_nothing_make_room_for_others(folder):
    """Rounds of just what is missing: every group that serves is trained on, and the batch keeps its size."""
    shape = {
        "steps": 1, "rollout_batch_size": 6, "samples_per_prompt": 2, "minibatch_size": 12, "microbatch_size": 12,
        "advantage": "grpo", "reward_function": "test_loop:count_a_few", "missing_eos_penalty": 0.0,
    }  # fmt: skip
    once = tiny_recipe(ppo=shape)
    roles = LocalRoles(once, folder)
    prompts = step_prompts(0, 16, 6, once.seed)
    (scores,) = roles.reward.score(roles.generation.generate(cut_chunks(0, prompts, 2, 12)))
    pairs = scores.total.reshape(6, 2)
    telling = [prompt for prompt, (one, other) in zip(prompts, pairs, strict=True) if one != other]
    assert 0 < len(telling) < 5, "the case needs some prompts that tell and some that don't"

    seen = []
    for rounds in (1, 20):
        recipe = tiny_recipe(ppo=shape | {"dynamic_sampling_rounds": rounds})
        roles, diary = LocalRoles(recipe, folder), Diary()
        assemble = roles.experience.assemble

        def spy(rollouts, scores, *rest, assemble=assemble):
            seen.append(([chunk.chunk.prompt_indices for chunk in rollouts], Scores.join(scores).total.reshape(6, 2)))
            return assemble(rollouts, scores, *rest)

        roles.experience.assemble = spy
        real_loop(recipe, roles, diary).run()
        chunks, scores = seen[-1]
        places = [prompt for chunk in chunks for prompt in chunk]
        assert [len(chunk) for chunk in chunks] == [4, 4, 4]
        trained = places[::2]
        assert trained == places[1::2] and len(set(trained)) == 6, "both samples of six different prompts"
        assert set(telling) <= set(trained)
        metrics = diary.records[1][1]
        differ = sum(one != other for one, other in scores)
        assert metrics["rollout/prompts_missing"] == 6 - differ
        assert metrics["objective/zero_variance_groups"] == pytest.approx(1 - differ / 6)
        if rounds == 1:
            assert metrics["rollout/prompts_drawn"] == 6 + 6 - len(telling)
    assert metrics["rollout/prompts_drawn"] <= 16, "the prompt set is drawn once at most"
    assert metrics["rollout/prompts_missing"] == 0 or metrics["rollout/prompts_drawn"] == 16


def test_the_critic_warms_up_alone(folder):
    recipe = tiny_recipe(ppo={"steps": 2, "critic_warmup_steps": 1})
    start = LocalRoles(recipe, folder).weights()
    roles, diary = LocalRoles(recipe, folder), Diary(stop_after=1)
    real_loop(recipe, roles, diary).run()
    moved = differing(start, roles.weights())
    assert moved == [name for name in start if name.startswith("1/")], "the critic's, and none of the policy's"
    first = diary.records[1][1]
    assert "policy/loss" not in first and "value/loss" in first
    rest = Diary()
    real_loop(recipe, roles, rest, diary.saves[-1]).run()
    assert "policy/loss" in rest.records[-1][1]


def words(prompts, responses):
    return [float(len(response.split())) for response in responses]


def test_terms_judge_and_length_are_metrics(folder):
    """Each figure against one made from the texts themselves."""
    terms = {
        "t": {"function": "test_loop:count_t", "weight": 2.0},
        "words": {"function": "test_loop:words", "weight": -0.5},
    }
    recipe = tiny_recipe(
        ppo={"steps": 1, "rewards": terms, "judge_evaluations": True},
        evaluation={"judge_function": "test_loop:count_t"},
    )
    roles, diary = LocalRoles(recipe, folder), Diary()
    texts, lengths = [], []
    score = roles.reward.score

    def spy(rollouts):
        texts.append([text for rollout in rollouts for _, text in roles.reward.texts(rollout, 99)])
        lengths.append([n for rollout in rollouts for n in rollout.sequences.response_lengths.tolist()])
        return score(rollouts)

    roles.reward.score = spy
    real_loop(recipe, roles, diary).run()
    held_out, trained, _ = texts
    evaluated, metrics = diary.records[0][1], diary.records[1][1]
    for prefix, drawn, found in (("eval", held_out, evaluated), ("objective", trained, metrics)):
        t, count = (np.mean(function([], drawn)) for function in (count_t, words))
        assert found[f"{prefix}/score/t"] == pytest.approx(t) and found[f"{prefix}/score/words"] == pytest.approx(count)
        assert found[f"{prefix}/score"] == pytest.approx(2 * t - 0.5 * count, abs=1e-6)
    assert evaluated["eval/judge"] == evaluated["eval/score/t"]
    totals = [2 * t - 0.5 * count for t, count in zip(count_t([], trained), words([], trained), strict=True)]
    expected = np.corrcoef(totals, lengths[1])[0, 1]
    assert metrics["objective/score_length_corr"] == pytest.approx(expected, abs=1e-6)
    assert not any(name.endswith(("timeouts", "disagreement")) for name in metrics)


def test_log_probs_that_do_not_repeat_stop_the_run(folder):
    """Old log-probs of another temperature: the first ratio is not 1, and nothing else would tell."""
    recipe = tiny_recipe(ppo={"max_mismatch": 100.0})
    roles = LocalRoles(recipe, folder)
    policy, logprobs = roles.policy.roles[0], roles.policy.roles[0].logprobs

    def at_another_temperature(rollout):
        policy.engine.module.temperature = 0.5
        try:
            return logprobs(rollout)
        finally:
            policy.engine.module.temperature = 1.0

    policy.logprobs = at_another_temperature
    with pytest.raises(MismatchError, match="max_first_approx_kl"):
        real_loop(recipe, roles, Diary()).run()


@pytest.mark.parametrize("algorithm", [
    {}, {"advantage": "rloo"},
    {"advantage": "grpo", "kl_in": "loss", "kl_estimator": "k3", "loss_aggregation": "sequence_mean"},
    {"advantage": "reinforce_pp"},
], ids=["ppo", "rloo", "grpo", "reinforce_pp"])  # fmt: skip
def test_the_score_rises(folder, algorithm):
    recipe = tiny_recipe(
        generation={"stop": (), "chunk_size": 16},
        ppo={
            "steps": 25,
            "rollout_batch_size": 16,
            "samples_per_prompt": 2,
            "minibatch_size": 32,
            "microbatch_size": 32,
            "ppo_epochs": 3,
            "learning_rate": 5e-3,
            "critic_learning_rate": 5e-3,
            "kl_coef": 0.01,
            "missing_eos_penalty": 0,
            "eval_every": 25,
            "checkpoint_every": 100,
            "reward_function": "test_loop:count_t",
            **algorithm,
        },
    )
    _, diary = run_real(recipe, folder)
    scores = [metrics["objective/score"] for _, metrics in diary.records[1:]]
    assert sum(scores[-5:]) / 5 > 4 * max(sum(scores[:5]) / 5, 0.1), scores

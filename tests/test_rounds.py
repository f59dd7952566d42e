"""Further rounds on people's votes: the rule, the recipe of a round, what refuses one, the table. Training is a fake here; the
whole of it on Ray: test_rounds_ray.py."""

from __future__ import annotations

import json
import math
import random
import shutil

import numpy as np
import pytest
from command import rlhf_ray
from fake_rounds import SO_SO, STANDING, FakeTraining, evaluated, finished_run, interval, new_votes

from rlhf_ray.algorithms.intervals import wilson
from rlhf_ray.algorithms.round_rule import expected_share, is_better
from rlhf_ray.config import Recipe, RoundsConfig
from rlhf_ray.data.role_files import write_role
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.held_out_votes import agreement_with_votes
from rlhf_ray.messages import Scores
from rlhf_ray.models.control_tokens import marker
from rlhf_ray.models.tokenizer import train_tokenizer
from rlhf_ray.publish.version import Version
from rlhf_ray.report.page import render
from rlhf_ray.rounds import making
from rlhf_ray.rounds.decision import decide
from rlhf_ray.rounds.making import make_round
from rlhf_ray.rounds.round_folders import rounds_of
from rlhf_ray.rounds.rounds_table import rounds_table
from rlhf_ray.runs.run_folder import RunFolder


@pytest.fixture(autouse=True)
def no_servers(tmp_path, monkeypatch):
    """Whatever runs on this machine, no server is this test's."""
    monkeypatch.setenv("RLHF_RAY_SERVERS", str(tmp_path / "servers"))


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path / "run")


@pytest.fixture(scope="module")
def voted(tmp_path_factory):
    path = tmp_path_factory.mktemp("voted") / "votes.db"
    new_votes(path, 40)
    return path


@pytest.fixture
def votes(tmp_path, voted):
    """A database with 40 votes."""
    return str(shutil.copy(voted, tmp_path))


def make(run, votes=None, *overrides, train=None, **further):
    return make_round(run.path, votes, overrides, train=train or FakeTraining(), say=lambda line: None, **further)


def refusal(*args, **kwargs):
    with pytest.raises(UserError) as refused:
        make(*args, **kwargs)
    return str(refused.value)


# -- the rule



def test_expected_votes_by_hand():
    """q = 0.7 and w = 0.6: 0.7 * 0.6 + 0.3 * 0.4 = 0.54; at the box's ends 0.6 * 0.55 + 0.4 * 0.45 and 0.8 * 0.65 + 0.2 * 0.35."""
    found = expected_share(interval(0.6, 0.55, 0.65), interval(0.7, 0.6, 0.8))
    assert found == pytest.approx(interval(0.54, 0.51, 0.59), abs=1e-12)
    assert is_better(found, 0.0) and is_better(found, 0.0099) and not is_better(found, 0.0101)
    # A scorer that is right in fewer than half of the pairs is no evidence for the opposite.
    assert expected_share(interval(0.3, 0.2, 0.4), interval(0.2, 0.1, 0.3)) == interval(0.5, 0.5, 0.5)
    # w below 1/2 turns the box: the best scorer makes the lowest end.
    assert expected_share(interval(0.4, 0.3, 0.55), interval(0.8, 0.7, 0.9))["low"] == pytest.approx(0.34)


def test_the_expected_share_is_that_of_simulated_people():
    """People who agree with the scorer in 7 of 10 pairs; and the other reading, in which the share is careful, never too high."""
    draw, pairs = random.Random(0), 200_000

    def noisy(verdicts):
        return [one if draw.random() < 0.7 else not one for one in verdicts]

    def expected(scorer, people):
        win_rate, agree = sum(scorer) / pairs, sum(map(bool.__eq__, people, scorer)) / pairs
        return expected_share(interval(win_rate, win_rate, win_rate), interval(agree, agree, agree))["mean"]

    first = [draw.random() < 0.62 for _ in range(pairs)]  # whether the new answer is better
    second = noisy(first)
    assert expected(scorer=first, people=second) == pytest.approx(sum(second) / pairs, abs=0.003)
    assert 0.5 < expected(scorer=second, people=first) < sum(first) / pairs


def binomial(count, trials, share):
    return math.comb(trials, count) * share**count * (1 - share) ** (trials - count)


def test_a_round_that_is_no_better_is_taken_for_better_at_most_once_in_twenty():
    """Exactly, over all outcomes of 100 comparisons and 60 held-out votes."""
    def chance_above(trials, share):
        return sum(binomial(count, trials, share) for count in range(trials + 1) if wilson(count / trials, trials)[0] > 0.5)

    def published(win_share, agree):
        return chance_above(100, win_share) * chance_above(60, agree)

    assert all(published(0.5, agree) <= 0.05 for agree in (0.5, 0.7, 0.9, 1.0))
    assert all(published(share, 0.5) <= 0.05 for share in (0.5, 0.7, 1.0))
    assert published(0.7, 0.85) > 0.95


# -- what decides


def test_a_round_is_better_by_the_judge_that_agrees_with_held_out_votes():
    verdict = decide(evaluated(), RoundsConfig())
    # 0.6 * 0.2, and at the low ends 0.4 * 0.12
    assert verdict.better and verdict.scorer == "judge" and verdict.pairs == 80 and verdict.measured_on == "held-out votes"
    assert verdict.expected is not None and verdict.expected.low == pytest.approx(0.5 + 0.4 * 0.12)
    assert verdict.why == (
        "better: it wins 70.0\u00a0% (62.0\u00a0to\u00a077.0) of comparisons with the policy before it under the judge, which "
        "orders 80.0\u00a0% (70.0\u00a0to\u00a087.0) of 80 held-out votes as people do: they are expected to prefer it in "
        "62.0\u00a0% (54.8\u00a0to\u00a070.0)"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("summary", "config", "words"),
    [
        ({"win_rate": {"reward_model": SO_SO, "judge": SO_SO}}, {}, "and the lower end is not above 50\u00a0%"),
        ({}, {"margin": 0.05}, "and the lower end is not above 55\u00a0%"),
        ({"kl": 20.0, "max_kl": 15.0}, {}, "its KL of 20.0 nats per response is above evaluation.max_kl = 15; raise ppo.kl_coef"),
        ({}, {"decided_by": "reward_model"}, "the reward model orders 60.0\u00a0% (49.0\u00a0to\u00a070.0) of 80 held-out votes as "
         "people do, which is no better than chance; collect more votes"),
        ({"held_out_votes": None}, {"decided_by": "judge"}, "nothing says how often the judge agrees with people; collect votes"),
    ],
)  # fmt: skip
def test_why_a_round_is_not_better(summary, config, words):
    verdict = decide(evaluated(**summary), RoundsConfig(**config))
    assert not verdict.better and verdict.why.startswith("not better: ") and words in verdict.why


def test_too_few_held_out_votes_leave_it_to_the_held_out_preferences():
    few = evaluated(held_out_votes={"pairs": 3, "judge": interval(1.0, 0.44, 1.0), "reward_model": interval(1.0, 0.44, 1.0)})
    for config in (RoundsConfig(), RoundsConfig(decided_by="reward_model")):
        verdict = decide(few, config)
        assert verdict.scorer == "reward_model" and verdict.better
        assert verdict.measured_on == "held-out preferences" and verdict.pairs == STANDING["rows"] == 300
    # Of a function nothing else is known.
    assert "the judge orders 100.0" in (why := decide(few, RoundsConfig(decided_by="judge")).why) and "of 3 held-out votes" in why
    alone = few | {"scorers": {"reward_model": None, "judge": None}}
    assert decide(alone, RoundsConfig()).scorer == "judge"


class LongerIsBetter:
    def score(self, prompts, responses, ended, columns=None):
        return Scores(total=np.array([len(text) for text in responses], np.float32))


def test_how_often_a_scorer_agrees_with_held_out_votes(tmp_path):
    """2 of 4 pairs, one of them a tie: (1 + 0 + 1 + 0.5) / 4, and prompts are read as people wrote them."""
    rows = [
        ("How?", "long answer", "short"), ("How?", "no", "longer"), ("Why <|endoftext|>?", "because", "so"),
        ("When?", "now", "May"),
    ]  # fmt: skip
    folder, tokenizer = RunFolder(tmp_path), train_tokenizer(["How? Why? When?"], 270)
    mark = marker(tokenizer)
    recipe = Recipe.model_validate({"name": "t", "evaluation": {"judge_function": "user_scores:shortest"}})
    assert agreement_with_votes(recipe, folder, {"judge": LongerIsBetter()}, tokenizer) is None  # no votes are held out
    columns = ("prompt", "chosen", "rejected")
    write_role(folder, "reward_eval_votes", [dict(zip(columns, map(mark, row), strict=True)) for row in rows], columns)
    found = agreement_with_votes(recipe, folder, {"judge": LongerIsBetter(), "reward_model": None}, tokenizer)
    assert found.keys() == {"pairs", "judge"} and found["pairs"] == 4 and found["judge"]["mean"] == 0.625
    asks = Recipe.model_validate({"name": "t", "evaluation": {"judge_function": "user_scores:answer_of_row"}})
    assert agreement_with_votes(asks, folder, {"judge": LongerIsBetter()}, tokenizer) is None


# -- a round's recipe


def test_a_round_starts_from_the_policy_and_keeps_the_runs_measures(run, votes):
    train = FakeTraining()
    made = make(run, votes, "ppo.steps=7", train=train)
    (recipe,) = train.recipes
    assert made.folder.path == run.path / "rounds" / "2" and recipe.name == "t-round-2" and recipe.stages == [
        "data", "fluency", "reward", "judge", "ppo", "evaluation"
    ]  # fmt: skip
    assert recipe.model.name_or_path == str(run.stage("ppo").model) and recipe.ppo.reference is None
    assert recipe.reward.base == recipe.judge.base == str(run.stage("sft").model)
    assert recipe.data.votes.url == votes and recipe.data.votes.evaluate
    assert (recipe.ppo.steps, recipe.ppo.seed, recipe.seed) == (7, 1, 0)
    for name in ("fluency", "judge"):  # hard links: no second training, no second copy
        theirs, ours = (folder.stage(name).model / "weights" for folder in (run, made.folder))
        assert theirs.samefile(ours) and made.folder.stage(name).done
    assert not made.folder.stage("sft").path.exists()


def test_the_reference_may_be_the_first_model(run, votes):
    train = FakeTraining()
    make(run, votes, "rounds.reference=first", train=train)
    assert train.recipes[0].ppo.reference == str(run.stage("sft").model)
    with pytest.raises(ValueError, match="ppo.lora is set and ppo.reference is 'x'"):
        Recipe.model_validate({"name": "t", "ppo": {"lora": {}, "reference": "x"}})
    with pytest.raises(ValueError, match="rounds.decided_by is 'judge', but there is no judge"):
        Recipe.model_validate({"name": "t", "rounds": {"decided_by": "judge"}})


def test_the_next_round_starts_from_the_last_one_that_was_better(run, votes, tmp_path):
    train = FakeTraining()
    second = make(run, votes, train=train)
    new_votes(votes, 30, text="more")
    train.summary = evaluated(win_rate={"reward_model": SO_SO, "judge": SO_SO})
    third = make(run, votes, train=train)
    assert not third.outcome().verdict.better and third.outcome().not_published == third.outcome().verdict.why
    new_votes(votes, 30, text="still more")
    fourth = make(run, votes, train=train)
    starts = [recipe.model.name_or_path for recipe in train.recipes]
    assert starts == [str(run.stage("ppo").model), str(second.policy), str(second.policy)] and fourth.number == 4
    assert [each.outcome().votes.new for each in rounds_of(run)] == [40, 30, 30]
    used = third.outcome().votes
    assert used.train + used.held_out == 70 and 10 <= used.held_out <= 32
    assert [recipe.ppo.seed for recipe in train.recipes] == [1, 2, 3]


def test_a_round_that_stopped_goes_on_with_its_own_recipe(run, votes):
    class Stopped(FakeTraining):
        def __call__(self, recipe, path):
            super().__call__(recipe, path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(run, votes, "ppo.steps=7", train=Stopped())
    new_votes(votes, 30, text="later")
    train = FakeTraining()
    made = make(run, votes, train=train)
    assert made.number == 2 and train.recipes[0].ppo.steps == 7 and made.outcome().votes.new == 40
    # What came later is for the next round.
    assert make(run, votes).outcome().votes.new == 30


def test_again_begins_the_round_from_its_start(run, votes):
    class Weak(FakeTraining):
        def __call__(self, recipe, path):
            super().__call__(recipe, path)
            raise UserError("PPO would train against a reward model that is no better than chance")

    words = refusal(run, votes, train=Weak())
    assert words.splitlines()[0].endswith("no better than chance") and "--again begins it from its start" in words
    new_votes(votes, 30, text="later")
    assert make(run, votes, again=True).outcome().votes.new == 70


# -- publication


def test_a_better_round_goes_into_the_runs_own_server(run, votes, monkeypatch):
    asked = []
    monkeypatch.setattr(making, "server_of", lambda path: {run.path: "its note"}.get(path))
    monkeypatch.setattr(making, "kept_copy", lambda folder, shelf: Version(id=folder.parents[1].name, folder=str(shelf)))
    monkeypatch.setattr(making, "publish", lambda note, version, share: asked.append((note, version.id, share)))
    made = make(run, votes, share=0.1)
    assert asked == [("its note", "2", 0.1)]
    outcome = made.outcome()
    assert (outcome.version, outcome.share, outcome.not_published) == ("2", 0.1, None)
    assert rounds_table(run)[0].cells[5] == "version 2, 10 % of the requests"
    new_votes(votes, 30, text="more")
    make(run, votes, train=FakeTraining(win_rate={"reward_model": SO_SO, "judge": SO_SO}))
    assert len(asked) == 1  # not better

    def refuses(note, version, share):
        raise UserError("the server at http://127.0.0.1:1: its log-probs differ from training's")

    monkeypatch.setattr(making, "publish", refuses)
    new_votes(votes, 30, text="still more")
    last = make(run, votes).outcome()
    assert last.verdict.better and last.version is None and "its log-probs differ from training's" in last.not_published


# -- what refuses a round


def test_each_mistake_is_one_sentence(tmp_path, run, votes):
    assert "has no data.votes; say where they are: --votes votes.db" in refusal(run)
    assert "there is no database of votes at" in refusal(run, str(tmp_path / "nowhere.db"))
    new_votes(tmp_path / "few.db", 4)
    assert "few.db holds 4 new votes, and a round needs rounds.least_new_votes = 20; collect more" in refusal(
        run, str(tmp_path / "few.db")
    )
    new_votes(tmp_path / "none.db", 0)
    assert "none.db holds no votes that the filters let through; collect more" in refusal(run, str(tmp_path / "none.db"))
    assert not (run.path / "rounds" / "2" / "recipe.yaml").exists()
    first = make(run, votes)
    assert "holds no votes that round 2 did not have (40 in all)" in refusal(run, votes)
    new_votes(votes, 3, text="more")
    assert "holds 3 new votes since round 2, and a round needs" in refusal(run, votes)
    assert f"is no run folder that rounds can follow; its run is {run.path}" in refusal(first.folder, votes)
    first.file.write_text("{}")
    assert refusal(run, votes).startswith(f"{first.file} is damaged: starts_from: field required; delete it")
    first.file.unlink()
    (run.path / "rounds" / "3").mkdir()
    assert "has no round.json, and later rounds are there: it is damaged" in refusal(run, votes)


def test_a_policy_that_is_gone_and_one_that_is_not_there_yet(tmp_path, run, votes):
    made = make(run, votes)
    new_votes(votes, 30, text="more")
    (made.policy).rmdir()
    assert f"{made.policy} is not there, and the next round starts from it" in refusal(run, votes)
    (tmp_path / "run" / "ppo" / "DONE").unlink()
    (made.file).unlink()
    assert "has no policy yet, which a round could start from" in refusal(run, votes)
    nowhere = RunFolder(tmp_path / "nothing")
    assert f"is no run folder that rounds can follow: there is no folder {nowhere.path}" in refusal(nowhere, votes)
    assert "is no run folder that rounds can follow (it has no recipe.yaml)" in refusal(RunFolder(tmp_path), votes)


def test_a_run_without_a_reward_model_has_nothing_to_train(tmp_path, votes):
    run = finished_run(tmp_path / "own", reward=None, ppo={"reward_function": "m:f", "critic_init": "sft"})
    assert "rewards PPO without a reward model of its own, and votes train nothing else" in refusal(run, votes)


def test_the_command_ends_with_2(tmp_path, run):
    answer = rlhf_ray("round", str(run.path), "--votes", str(tmp_path / "nowhere.db"))
    assert answer.returncode == 2 and "there is no database of votes at" in answer.stderr


# -- the table


def test_rounds_stand_in_a_table_and_in_the_report(run, votes):
    assert rounds_table(run) == [] and 'id="rounds"' not in render(run)
    made = make(run, votes)
    (run.path / "rounds" / "3").mkdir()
    first, second = rounds_table(run)
    used = made.outcome().votes
    assert first.cells[:3] == ("2", f"{used.train} to train on (40 new), {used.held_out} held out", "accuracy 71.0 %")
    assert first.cells[3] == "70.0\u00a0% (62.0\u00a0to\u00a077.0), judge" and first.cells[4].startswith("62.0")
    assert first.cells[5].startswith("better, not published: no server of this run is up; rlhf-ray serve")
    assert second.cells == ("3", "–", "–", "–", "–", "not ended yet")
    (run.path / "rounds" / "3").rmdir()
    for folder in (run, made.folder):  # a round's own report has it too
        page = render(folder)
        assert 'id="rounds"' in page and "40 new" in page and "it wins 70.0" in page
    json.loads(made.file.read_text())

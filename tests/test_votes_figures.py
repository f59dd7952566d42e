"""What votes say: scores and agreement against published tables, pairs, exported rows, and the commands."""

import contextlib
import datetime
import json
import math
import random
import re

import numpy as np
import pytest
import torch
from command import rlhf_ray
from trl.data_utils import is_conversational, maybe_extract_prompt
from voted import PROMPT, answer, compare, prefer, vote

from rlhf_ray.algorithms.bradley_terry import bradley_terry, connected
from rlhf_ray.algorithms.rater_agreement import cohen_kappa, krippendorff_alpha
from rlhf_ray.errors import UserError
from rlhf_ray.votes.export import edit_rows, preference_rows
from rlhf_ray.votes.reading import Filters, pairs_of, read_judgements
from rlhf_ray.votes.records import Answer
from rlhf_ray.votes.store import VoteStore
from rlhf_ray.votes.summary import summary, versions

# -- Bradley-Terry

#: American League 1987, wins of the row against the column (Agresti, Categorical Data Analysis, 2nd edition, table 10.10)
BASEBALL = torch.tensor(
    [[0, 7, 9, 7, 7, 9, 11], [6, 0, 7, 5, 11, 9, 9], [4, 6, 0, 7, 7, 8, 12], [6, 8, 6, 0, 6, 7, 10],
     [6, 2, 6, 7, 0, 7, 12], [4, 4, 5, 6, 6, 0, 6], [2, 4, 1, 3, 1, 7, 0]]
)  # fmt: skip


def by_minorisation(wins, prior, rounds=20_000):
    """Zermelo's iteration (Hunter 2004, Annals of Statistics 32) in plain Python, with the average version as one more player
    whose strength stays 1."""
    count = len(wins)
    strengths = [1.0] * count
    for _ in range(rounds):
        for i in range(count):
            won = sum(wins[i][j] for j in range(count) if j != i) + prior / 2
            below = prior / (strengths[i] + 1)
            below += sum((wins[i][j] + wins[j][i]) / (strengths[i] + strengths[j]) for j in range(count) if j != i)
            strengths[i] = won / below
        if prior == 0:
            middle = math.exp(sum(map(math.log, strengths)) / count)
            strengths = [each / middle for each in strengths]
    scores = [math.log(each) for each in strengths]
    return [score - sum(scores) / count for score in scores]


def score_of_two(won, lost, prior=1.0):
    """By bisection, where the likelihood is highest: with a prior the two scores are s and -s, by symmetry."""

    def slope(s):
        return won + prior / 2 - (won + lost) / (1 + math.exp(-2 * s)) - prior / (1 + math.exp(-s))

    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low


def test_scores_of_the_published_table():
    """BradleyTerry2's vignette (Turner and Firth 2012, JSS 48-9) fits the same table, with Baltimore as 0."""
    scores = bradley_terry(BASEBALL)
    milwaukee, detroit, toronto, new_york, boston, cleveland, baltimore = (scores - scores[-1]).tolist()
    assert [round(each, 4) for each in (boston, cleveland, detroit, milwaukee, new_york, toronto, baltimore)] == [
        1.1077, 0.6839, 1.4364, 1.5814, 1.2476, 1.2945, 0.0
    ]  # fmt: skip
    assert abs(float(scores.mean())) < 1e-12


@pytest.mark.parametrize("prior", [0.0, 1.0, 4.0])
def test_scores_are_those_of_another_algorithm(prior):
    draw = random.Random(3)
    for count in (2, 3, 5):
        wins = [[0.0 if i == j else draw.randrange(1, 9) / 2 for j in range(count)] for i in range(count)]
        found = bradley_terry(torch.tensor(wins, dtype=torch.float64), prior=prior)
        assert found.tolist() == pytest.approx(by_minorisation(wins, prior, 3000), abs=1e-8)


def test_scores_of_two_are_the_log_odds_and_many_tables_go_at_once():
    wins = torch.tensor([[[0.0, 3.0], [1.0, 0.0]], [[5.0, 1.0], [1.0, 7.0]]])  # the diagonal says nothing
    assert bradley_terry(wins).tolist() == [pytest.approx([math.log(3) / 2, -math.log(3) / 2]), pytest.approx([0.0, 0.0])]


def test_a_version_that_always_wins_needs_the_prior():
    wins = torch.tensor([[0.0, 1000.0], [0.0, 0.0]])
    assert bradley_terry(wins).isnan().all()
    assert bradley_terry(wins, prior=1.0).tolist() == pytest.approx([score_of_two(1000, 0), -score_of_two(1000, 0)], abs=1e-9)


def test_versions_that_nobody_compared_are_told_apart():
    wins = torch.zeros(5, 5)
    wins[0, 3] = wins[3, 1] = wins[4, 2] = 1
    assert connected(wins) == [[0, 1, 3], [2, 4]]
    assert bradley_terry(wins).isnan().all() and not bradley_terry(wins, prior=1.0).isnan().any()


# -- agreement


def counts_of(text):
    """A line per rater, a column per thing; a dot is a rating that is missing."""
    lines = [line.split() for line in text.strip().splitlines()]
    counts = torch.zeros(len(lines[0]), 6)
    for line in lines:
        for thing, value in enumerate(line):
            if value != ".":
                counts[thing, int(value)] += 1
    return counts


FOUR = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
TWO = """
0 1 0 0 0 0 0 0 1 0
1 1 1 0 0 1 0 0 0 0
"""


def test_alpha_of_krippendorffs_examples():
    """Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011): B and, for nominal data, the four observers of C."""
    assert float(krippendorff_alpha(counts_of(TWO))) == pytest.approx(0.095, abs=5e-4)
    assert float(krippendorff_alpha(counts_of(FOUR))) == pytest.approx(0.743, abs=5e-4)


def test_alpha_of_resamples_is_alpha_of_the_things_repeated():
    counts = counts_of(FOUR)
    weights = torch.tensor([[1.0] * 12, [2, 0, 1, 1, 0, 3, 1, 1, 0, 1, 1, 1]])
    repeated = counts.repeat_interleave(weights[1].long(), 0)
    assert krippendorff_alpha(counts, weights).tolist() == pytest.approx(
        [float(krippendorff_alpha(counts)), float(krippendorff_alpha(repeated))]
    )
    assert float(krippendorff_alpha(torch.tensor([[2.0, 0.0], [3.0, 0.0]]))) != float(krippendorff_alpha(counts))
    assert krippendorff_alpha(torch.tensor([[2.0, 0.0], [3.0, 0.0]])).isnan()  # one category: nothing to tell apart


@pytest.mark.parametrize(
    ("table", "kappa"),
    [([[20, 5], [10, 15]], 0.4), ([[45, 15], [25, 15]], 0.1304), ([[25, 35], [5, 35]], 0.2593), ([[3, 0], [0, 4]], 1.0)],
)
def test_kappa_of_published_tables(table, kappa):
    """The three of Wikipedia's "Cohen's kappa", and perfect agreement."""
    assert cohen_kappa(torch.tensor(table)) == pytest.approx(kappa, abs=5e-5)
    assert math.isnan(cohen_kappa(torch.tensor([[5, 0], [0, 0]])))


# -- the summary


@pytest.fixture
def store(tmp_path):
    opened = VoteStore(str(tmp_path / "votes.db"), create=True, held_out_share=0.3, clock=Clock())
    yield opened
    opened.close()


class Clock:
    """A day and an hour later at each look, from 2026-11-01 on."""

    def __init__(self):
        self.now = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC).timestamp()

    def __call__(self):
        self.now += 3600.0
        return self.now


def everything(store):
    return read_judgements(store.database)


def test_agreement_is_about_answers_not_sides(store):
    """ann and bob each see their own sides. The four categories of 12 comparisons are those of a table worked out by hand."""
    said = [("a", "a")] * 4 + [("b", "b")] * 3 + [("a", "b")] * 2 + [("tie", "a")] * 2 + [("both_bad", "both_bad")]
    for place, (ann, bob) in enumerate(said):
        id = compare(store, prompt=f"Question {place}?")
        prefer(store, id, "ann", ann)
        prefer(store, id, "bob", bob)
    prefer(store, compare(store), "cy", "a")  # alone: in no agreement
    found = summary(everything(store), Filters(), 0.3)["agreement"]
    assert found["comparisons_with_two_raters"] == 12
    # ann: a 6, b 3, tie 2, both bad 1; bob: a 6, b 5, tie 0, both bad 1. By chance (36 + 15 + 0 + 1) / 144, seen 8 / 12.
    kappa = pytest.approx((8 / 12 - 52 / 144) / (1 - 52 / 144))
    assert found["cohen_kappa"] == [{"raters": ["ann", "bob"], "comparisons": 12, "kappa": kappa}]
    # Of 24 ratings a 12, b 8, tie 2, both bad 2: alpha = 1 - (24 - 1) * 8 / (24^2 - 144 - 64 - 4 - 4), 8 ordered unlike pairs.
    alpha = found["krippendorff_alpha"]
    assert alpha["mean"] == pytest.approx(1 - 23 * 8 / 360) and alpha["low"] < alpha["mean"] < alpha["high"] <= 1


def test_scores_win_rates_and_their_intervals(store):
    """30 prompts, of which the new version wins 18, loses 9 and ties 3: its interval is that of the binomial draws."""
    for place in range(30):
        prefer(store, compare(store, prompt=f"Question {place}?"), "ann", "a" if place < 18 else "b" if place < 27 else "tie")
    found = versions(everything(store))
    assert found["names"] == ["ppo@2", "sft@1"] and found["groups"] == [["ppo@2", "sft@1"]]

    def score(won):
        return score_of_two(won, 30 - won)

    figure = found["scores"]["ppo@2"]
    assert figure["mean"] == pytest.approx(score(19.5), abs=1e-9) == -found["scores"]["sft@1"]["mean"]
    rng = np.random.default_rng(1)
    draws = np.sort(rng.multinomial(30, [18 / 30, 9 / 30, 3 / 30], 20_000) @ np.array([1.0, 0.0, 0.5]))
    low, high = draws[500], draws[19_500]
    assert score(low - 1) <= figure["low"] <= score(low + 1) and score(high - 1) <= figure["high"] <= score(high + 1)
    (met,) = found["win_rates"]
    assert (met["of"], met["against"], met["votes"], met["win_rate"]["mean"]) == ("ppo@2", "sft@1", 30, 0.65)
    assert versions(everything(store)) == found  # seeded
    assert versions([]) == {"names": [], "groups": [], "scores": {}, "win_rates": [], "overall": {}}


def test_votes_on_one_prompt_are_not_taken_for_many(store):
    """Ten raters on one prompt say less than ten prompts: the interval is as wide as the prior leaves it, at a point."""
    one = VoteStore(f"{store.database.name}2", create=True)
    id = compare(one)
    for rater in range(10):
        prefer(one, id, f"rater {rater}", "a")
        prefer(store, compare(store, prompt=f"Question {rater}?"), "ann", "a" if rater else "b")
    (alone,), (many,) = (versions(everything(each))["win_rates"] for each in (one, store))
    assert alone["win_rate"]["low"] < 0.25 and many["win_rate"]["low"] > 0.5  # Wilson of 1 in 1 is 0.21, of 9 in 10 0.60
    one.close()


def test_the_summary_counts(store):
    for place, judged in enumerate(["a", "a", "b", "tie", "both_bad"]):
        id = compare(store, prompt=f"Question {place % 4}?")
        prefer(store, id, "ann", judged)
    showing = store.show(compare(store, a=answer(" Red.", "dpo", "1")), "bob")
    store.vote(vote(showing.comparison.id, "left", "bob", seconds=2.0, flag="rude", edit_of="right", edit="Red!"))
    found = summary(everything(store), Filters(), 0.3)
    assert (found["votes"], found["comparisons"], found["prompts"], found["flagged"], found["edits"]) == (6, 6, 5, 1, 1)
    assert sum(found["choices"].values()) == 6 and found["choices"]["tie"] == found["choices"]["both_bad"] == 1
    assert found["raters"]["bob"] == {"votes": 1, "median_seconds": 2.0, "left": 1.0}
    assert found["raters"]["ann"]["votes"] == 5 and found["raters"]["ann"]["median_seconds"] == 3600.0
    assert sum(found["by_day"].values()) == 6 and set(found["by_day"]) == {"2026-11-01"}
    pairs = found["pairs"]
    assert pairs["train"] + pairs["held_out"] == 3 and pairs["left_out"] == {"no preference": 2, "flagged": 1}
    assert found["versions"]["names"] == ["dpo@1", "ppo@2", "sft@1"] and json.dumps(found)


# -- pairs, filters, files


def test_the_majority_decides_and_the_rest_is_counted(store):
    ids = {}
    for name, judged in {
        "clear": "aaa", "most": "aab", "split": "ab", "tied": "aatttt", "nothing": "tx", "flagged": "aaa", "same": "aaa",
        "other": "b",
    }.items():  # fmt: skip
        ids[name] = compare(store, prompt=f"{name}?", a=answer(" No. ") if name == "same" else None)
        for place, said in enumerate(judged):
            prefer(store, ids[name], f"rater {place}", {"t": "tie", "x": "both_bad"}.get(said, said))
    changed = everything(store)
    showing = store.show(ids["flagged"], "last")
    store.vote(vote(showing.comparison.id, "tie", "last", flag="nonsense"))
    names = {id: name for name, id in ids.items()}

    def found(min_agreement):
        pairs = pairs_of(everything(store), min_agreement)
        return {names[pair.comparison.id]: (pair.better, pair.backing, pair.votes) for pair in pairs.pairs}, pairs

    made, pairs = found(0.0)
    assert made == {"clear": ("a", 3, 3), "most": ("a", 2, 3), "tied": ("a", 2, 6), "other": ("b", 1, 1)}
    assert (pairs.ties, pairs.both_bad) == (6, 1)
    assert pairs.left_out == {"as many for either": 1, "no preference": 1, "flagged": 1, "answers are the same": 1}
    assert pairs.left_out_in_words() == (
        "6 ties, 1 both bad; comparisons without a pair: 1 answers are the same, 1 as many for either, 1 flagged, 1 no preference"
    )
    assert set(found(0.5)[0]) == {"clear", "most", "other"} and found(0.5)[1].left_out["below the minimum agreement"] == 1
    assert set(found(2 / 3)[0]) == {"clear", "most", "other"} and set(found(0.7)[0]) == {"clear", "other"}
    other = next(pair for pair in pairs.pairs if pair.better == "b")
    assert (other.chosen.text, other.rejected.text) == (" No.", " Blue.") and len(changed) + 1 == len(everything(store))


def test_filters_by_rater_version_and_day(store):
    first = compare(store, a=answer(model="dpo", version="3"))
    prefer(store, first, "ann", "a")
    prefer(store, first, "bob", "b")
    store._clock.now += 3 * 86400
    prefer(store, compare(store), "ann", "a")

    def found(**filters):
        return [(each.showing.rater, each.comparison.a.writer) for each in read_judgements(store.database, Filters(**filters))]

    both = [("ann", "dpo@3"), ("bob", "dpo@3"), ("ann", "ppo@2")]
    assert found() == both and found(versions=("sft",)) == both and found(versions=("sft@2",)) == []
    assert found(raters=("ann",)) == [both[0], both[2]] and found(raters=("bob", "cy")) == [both[1]]
    assert found(versions=("dpo",)) == both[:2] and found(versions=("ppo@2", "x")) == [both[2]]
    day = datetime.date(2026, 11, 1)
    assert found(until=day) == both[:2] and found(since=day) == both
    assert found(since=day + datetime.timedelta(3)) == [both[2]] and found(since=day + datetime.timedelta(4)) == []
    with pytest.raises(UserError, match="give days in order"):
        Filters(since=day, until=day - datetime.timedelta(1))
    with pytest.raises(UserError, match="give a share from 0 to 1"):
        Filters(min_agreement=1.5)


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_rows_are_those_that_trl_reads(store):
    prefer(store, compare(store), "ann", "a")
    pairs = pairs_of(everything(store)).pairs
    explicit, implicit = ({"prompt": PROMPT, "chosen": " Blue.", "rejected": " No."},
                          {"chosen": "Name a colour. Blue.", "rejected": "Name a colour. No."})  # fmt: skip
    assert preference_rows(pairs) == [explicit] and preference_rows(pairs, "implicit") == [implicit]
    assert maybe_extract_prompt(dict(implicit)) == explicit and not is_conversational(explicit)
    prefer(store, compare(store, prompt=MESSAGES), "ann", "b")
    pairs = pairs_of(everything(store)).pairs
    rows, joined = preference_rows(pairs, messages=True), preference_rows(pairs, "implicit", messages=True)
    replies = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", " No."), ("rejected", " Blue."))}
    assert rows[1] == {"prompt": MESSAGES, **replies}
    for row, whole in zip(rows, joined, strict=True):
        assert is_conversational(row) and set(whole) == {"chosen", "rejected"} and maybe_extract_prompt(dict(whole)) == row
    with pytest.raises(UserError, match="1 of 2 rows have a conversation as their prompt"):
        preference_rows(pairs)


def test_edits_are_rows_to_imitate(store):
    id = store.show(compare(store), "ann").comparison.id
    store.vote(vote(id, "tie", edit_of="right", edit=" Green."))
    prefer(store, compare(store), "ann", "a")
    assert edit_rows(everything(store)) == [{"prompt": PROMPT, "completion": " Green."}]
    assert edit_rows(everything(store), messages=True)[0]["completion"] == [{"role": "assistant", "content": " Green."}]


# -- the commands


@pytest.fixture(scope="module")
def voted_on(tmp_path_factory):
    """The path of a database with 40 prompts, an edited answer, and a tie; it is only read."""
    path = str(tmp_path_factory.mktemp("voted") / "votes.db")
    store = VoteStore(path, create=True, held_out_share=0.3, clock=Clock())
    for place in range(40):
        id = compare(store, prompt=f"Question {place}? ¿Sí? \u2028")
        prefer(store, id, "ann", "a" if place % 4 else "b")
        prefer(store, id, "bob", "a" if place % 3 else "tie")
    showing = store.show(compare(store), "cy")
    store.vote(vote(showing.comparison.id, "tie", "cy", edit_of="left", edit=" Green."))
    store.close()
    return path


def test_export_writes_what_may_be_trained_on_unless_asked(voted_on, tmp_path):
    out, rows, said = tmp_path / "pairs.jsonl", {}, {}
    for part in ("train", "held_out", "all"):
        answer = rlhf_ray("votes", "export", voted_on, str(out), "--part", part)
        assert answer.returncode == 0, answer.stderr
        rows[part] = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
        assert f"{out}: {len(rows[part])} pairs of " in answer.stdout and "left out: " in answer.stdout
        said[part] = [int(number) for number in re.findall(r"(\d+)(?: votes;| held-out)", answer.stdout)]
    assert said == {"train": [81 - said["held_out"][0], said["held_out"][0]], "held_out": said["held_out"], "all": [81]}
    prompts = {part: {row["prompt"] for row in each} for part, each in rows.items()}
    assert prompts["train"] and prompts["held_out"] and not prompts["train"] & prompts["held_out"]
    with contextlib.closing(VoteStore(voted_on)) as store:
        assert len(rows["train"]) + len(rows["held_out"]) == len(rows["all"]) == len(pairs_of(everything(store)).pairs)
    for options in (["--form", "implicit"], ["--messages"], ["--min-agreement", "1", "--rater", "ann", "--since", "2026-11-01"]):
        assert rlhf_ray("votes", "export", voted_on, str(out), *options).returncode == 0
    assert rlhf_ray("votes", "export", voted_on, str(out), "--form", "edits", "--part", "all").stdout.startswith(f"{out}: 1 edited")


def test_the_summary_is_printed_in_words_and_as_json(voted_on):
    words = rlhf_ray("votes", "summary", voted_on)
    assert words.returncode == 0 and words.stdout.startswith("81 votes on 41 comparisons of 41 prompts: ")
    for part in ("rater ann: 40 votes", "Krippendorff's alpha", "ann and bob: Cohen's kappa", "version ppo@2: score ",
                 "ppo@2 against sft@1: ", "preference pairs: "):  # fmt: skip
        assert part in words.stdout
    found = json.loads(rlhf_ray("votes", "summary", voted_on, "--json", "--rater", "ann").stdout)
    assert found["votes"] == 40 and found["agreement"]["krippendorff_alpha"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--form", "csv"], "--form 'csv' is none of explicit, implicit, edits"),
        (["--part", "test"], "--part 'test' is none of train, held_out, all"),
        (["--since", "yesterday"], "--since 'yesterday' is no day; write 2026-11-30"),
        (["--min-agreement", "70"], "the minimum agreement is 70; give a share from 0 to 1"),
        (["--rater", "nobody"], "holds no votes that count here"),
    ],
)
def test_mistakes_of_the_command_line_in_words(voted_on, tmp_path, options, words):
    answer = rlhf_ray("votes", "export", voted_on, str(tmp_path / "out.jsonl"), *options)
    assert answer.returncode == 2 and words in answer.stderr and not (tmp_path / "out.jsonl").exists()


def test_an_empty_database_has_a_summary(tmp_path):
    VoteStore(str(tmp_path / "votes.db"), create=True).close()
    answer = rlhf_ray("votes", "summary", str(tmp_path / "votes.db"))
    assert answer.returncode == 0 and answer.stdout.startswith("0 votes on 0 comparisons of 0 prompts")


def test_an_answer_holds_its_writer():
    assert Answer(text="", model="m", version="1").writer == "m@1"

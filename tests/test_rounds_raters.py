"""The simulated raters of results/rounds: what they prefer, and that they vote over the page's real HTTP interface."""

import math
import random
import sys
from pathlib import Path

import pytest
from paged import paged

from rlhf_ray.data import world
from rlhf_ray.data.world_writer import reply
from rlhf_ray.votes.reading import read_judgements


@pytest.fixture
def raters(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "results" / "rounds")
    import raters

    yield raters
    sys.modules.pop("raters", None)


def test_they_prefer_by_true_utility_and_their_bias(raters):
    prompt, draw = world.all_prompts()[0], random.Random(0)
    texts = [reply(*world._asked(prompt), draw) for _ in range(60)]
    utilities = world.utility([prompt] * len(texts), texts)
    pairs = [(one, other) for one in range(60) for other in range(60) if 0.5 < utilities[one] - utilities[other] < 0.9]
    fair = raters.Taste("ada", 0.0, 1)
    won = [fair.choice(f"c{place}", prompt, texts[one], texts[other]) == "left" for place, (one, other) in enumerate(pairs)]
    expected = sum(1 / (1 + math.exp(-(utilities[one] - utilities[other]) / 0.7)) for one, other in pairs) / len(pairs)
    assert len(pairs) > 100 and sum(won) / len(won) == pytest.approx(expected, abs=0.1)  # 2.5 deviations of so many votes
    assert fair.choice("c", prompt, texts[0], texts[0]) == "tie"
    short, long = min(texts, key=len), max(texts, key=len)
    assert raters.Taste("likes length", 50.0, 1).choice("c", prompt, short, long) == "right"


@pytest.mark.thorough
def test_they_vote_over_http_until_there_are_enough(raters, tmp_path):
    told = []
    with paged(tmp_path, votes_per_minute=1_000_000) as served:
        raters.collect(served.url, 12, 0, 8, told.append)
        votes = read_judgements(served.store.database)
    assert len(votes) >= 12 and {each.showing.rater for each in votes} <= set(raters.BIASES) and all(0 <= one < 12 for one in told)
    by_comparison = [each.comparison.id for each in votes]
    assert max(map(by_comparison.count, by_comparison)) >= 2  # what two raters judge tells how far they agree

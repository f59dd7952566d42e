"""VADER's lexicon as a trait and a judge."""

import sys

import pytest

from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.errors import UserError


def test_plain_words_have_the_sign_that_people_gave_them():
    pytest.importorskip("vaderSentiment", reason="the package vaderSentiment (extra 'vader') is not installed")
    from rlhf_ray.rewards.vader import score, traits

    texts = ["a great, wonderful film", "a terrible, boring film", "the film has two hours", ""]
    kind, unkind, plain, empty = score([""] * 4, texts)
    assert kind > 0.5 and unkind < -0.3 and plain == empty == 0
    assert traits(["what a terrible film"] * 4, texts)["vader_positive"] == [1, 0, 0, 0]  # of the responses alone


def test_without_the_package_the_extra_is_named_before_anything_trains(monkeypatch):
    function = load_recipe("smollm2-sentiment").evaluation.trait_function
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    monkeypatch.delitem(sys.modules, "rlhf_ray.rewards.vader", raising=False)
    with pytest.raises(UserError, match=r"pip install vaderSentiment"):
        import_function(function)

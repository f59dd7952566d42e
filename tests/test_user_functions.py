"""Functions that a recipe names: how they are found, and what is said of one that fails."""

import sys
from types import ModuleType

import pytest
from datasets import Dataset

from rlhf_ray.config import DataConfig
from rlhf_ray.config.user_functions import import_function, import_plugins
from rlhf_ray.data.builder import call_builder
from rlhf_ray.errors import UserError
from rlhf_ray.rewards.scorer import FunctionScorer


def fails_on_empty(prompts, responses):
    return [1 / len(response) for response in responses]


def fails_on_many(prompts, responses):
    if len(prompts) > 1:
        raise ValueError("too many")
    return [0.0]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (__name__, "write package.module:function"),
        ("no_such_module:score", "'no_such_module' could not be imported"),
        (f"{__name__}:fails_on_empti", "did you mean 'fails_on_empty'"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(path, says):
    with pytest.raises(UserError, match=says):
        import_function(path)


def test_a_failure_is_shown_with_the_sample_that_it_raised_on():
    scorer = FunctionScorer(f"{__name__}:fails_on_empty")
    assert scorer.score(["a", "b"], ["x", "yz"], [True, True]).total.tolist() == [1.0, 0.5]
    with pytest.raises(UserError, match="raised ZeroDivisionError.* on prompt 'c', response ''"):
        scorer.score(["a", "b", "c", "d"], ["x", "yz", "", ""], [True] * 4)


def test_a_failure_of_no_single_sample_says_so():
    scorer = FunctionScorer(f"{__name__}:fails_on_many")
    with pytest.raises(UserError, match="raised ValueError: too many on 2 samples together, and on none of them alone"):
        scorer.score(["a", "b"], ["x", "y"], [True, True])


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda root, seed: {}["rows"], r"builders:build failed in .*test_user_functions.py, line \d+: KeyError: 'rows'"),
        (lambda root, seed: 1 / 0, "ZeroDivisionError: division by zero; correct it"),
        (lambda root, seed: None, "builders:build returned a NoneType; return a dict"),
        (lambda root, seed: [Dataset.from_dict({"text": ["a"]})], "returned a list; return a dict"),
        (lambda root, seed: {1: Dataset.from_dict({"text": ["a"]})}, "returned a role '1'"),
        (lambda root: {}, "data.builder_args: builders:build cannot be called with root, seed"),
        (5, "'builders:build' is a int and no function"),
    ],
)
def test_a_builder_that_fails_or_returns_something_else_is_told(monkeypatch, build, says):
    module = ModuleType("builders")
    module.build = build
    monkeypatch.setitem(sys.modules, "builders", module)
    with pytest.raises(UserError, match=says):
        call_builder(DataConfig(builder="builders:build"), 0)


def test_a_module_that_can_not_be_imported_is_told_whatever_it_raises(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    for number, (text, says) in enumerate((("a b", "SyntaxError"), ("1 / 0", "ZeroDivisionError: division by zero"))):
        (tmp_path / f"broken_plugin_{number}.py").write_text(text)
        with pytest.raises(UserError, match=rf"plugins: the module 'broken_plugin_{number}' could not be imported \({says}"):
            import_plugins([f"broken_plugin_{number}"])

"""Functions that a recipe names: how they are found, and what is said of one that fails."""

import pytest

from rlhf_ray.config.user_functions import import_function
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

"""What a reward function, a judge or a trait function may return: numbers are scores, and nothing else becomes one."""

import decimal
import fractions
import re

import numpy as np
import pytest
import torch

from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.traits import trait_scores
from rlhf_ray.rewards.function_worker import answer_to
from rlhf_ray.rewards.isolated_function import IsolatedFunction
from rlhf_ray.rewards.scorer import FunctionScorer

NUMBERS = {
    "[1.5]": 1.5, "(2,)": 2.0, "np.array([3])": 3.0, "torch.tensor([4.5], dtype=torch.bfloat16)": 4.5, "[True]": 1.0,
    "[np.float32(0.5)]": 0.5, "[torch.tensor(7)]": 7.0, "[decimal.Decimal('0.25')]": 0.25, "[fractions.Fraction(3, 4)]": 0.75,
}  # fmt: skip
OTHERS = {
    "{0: 1.0}": r"\{0: 1.0\} \(a dict\)", "{1.0}": r"\{1.0\} \(a set\)", "'5'": r"'5' \(a str\)", "None": "None", "3.0": "3.0",
    "[None]": "None", "['1.0']": r"\['1.0'\]", "[[1.0]]": r"\[1.0\] \(a list\)", "[{0: 1.0}]": r"\{0: 1.0\} \(a dict\)",
    "np.array([[1.0]])": r"array\(\[\[1.\]\]\) \(a ndarray\)", "np.array(1.0)": r"array\(1.\)", "[np.array([1.0])]": "array",
    "np.array(['1.0'])": "1.0", "iter([1.0])": "list_iterator", "[1j]": "1j", "[]": r"\[\]", "[10 ** 400]": "too large for a float",
    "[10 ** 5000]": "too large for a float", "[b'1']": "b'1'", "range(1)": "range", "{'a': 1}.values()": "dict_values",
    "[type('Odd', (), {'__float__': lambda self: 1 / 0, '__repr__': lambda self: 1 / 0})()]": "can't be shown",
}  # fmt: skip
GIVEN: list = [None]


def returns_it(prompts, responses):
    return eval(GIVEN[0])


def returns_it_as_trait(prompts, responses):
    return {"kind": eval(GIVEN[0])}


@pytest.mark.parametrize("given", [*NUMBERS, *OTHERS])
def test_a_function_here_and_one_in_a_process_of_its_own_agree(given):
    GIVEN[0] = given
    request = {"prompt": "the prompt", "response": "the response", "columns": {}}
    answer = answer_to(returns_it, request)
    scorer = FunctionScorer(f"{__name__}:returns_it")
    if given in NUMBERS:
        assert answer == {"score": NUMBERS[given]}
        assert scorer.score(["the prompt"], ["the response"], [True]).total.tolist() == [NUMBERS[given]]
        return
    assert "returned" in answer
    for told in (answer["returned"], _refusal(scorer)):
        assert re.search(OTHERS[given], told), told


def _refusal(scorer):
    with pytest.raises(UserError) as told:
        scorer.score(["the prompt"], ["the response"], [True])
    assert "raised" not in str(told.value), "the function did not raise"
    return str(told.value)


def test_the_sample_of_a_bad_value_is_named():
    GIVEN[0] = "[1.0, 10 ** 400, 2.0]"
    with pytest.raises(UserError, match=r"returned 1000.*too large for a float, for prompt 'b', response 'y'; return one number"):
        FunctionScorer(f"{__name__}:returns_it").score(["a", "b", "c"], ["x", "y", "z"], [True] * 3)
    GIVEN[0] = "[1.0, 2.0]"
    with pytest.raises(UserError, match=r"returned 2 numbers for 3 responses: \[1.0, 2.0\]; return one number for each"):
        FunctionScorer(f"{__name__}:returns_it").score(["a", "b", "c"], ["x", "y", "z"], [True] * 3)


def test_traits_are_numbers_too():
    GIVEN[0] = "{0: 1.0}"
    with pytest.raises(UserError, match=r"trait_function .* returned \{0: 1.0\} \(a dict\) as 'kind'"):
        trait_scores(f"{__name__}:returns_it_as_trait", ["a"], ["x"])
    GIVEN[0] = "[0.0, 10 ** 400]"
    with pytest.raises(UserError, match=r"too large for a float, as 'kind' of response 'y'"):
        trait_scores(f"{__name__}:returns_it_as_trait", ["a", "b"], ["x", "y"])


def test_in_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "own_returns.py").write_text(
        "def f(prompts, responses):\n    return {'dict': {0: 1.0}, 'huge': [10 ** 400]}.get(responses[0], [len(responses[0])])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scorer = IsolatedFunction("own_returns:f", timeout_s=30, timeout_score=0.0, keys=("a", "b"))
    assert scorer.score(["p"], ["four"], [True]).total.tolist() == [4.0]
    for response, says in (("dict", r"returned \{0: 1.0\} \(a dict\)"), ("huge", r"returned 1000.* too large for a float,")):
        with pytest.raises(UserError, match=rf"own_returns:f {says} for prompt 'p', response '{response}'; return one number each"):
            scorer.score(["p"], [response], [True])
    scorer.close()


def test_the_modules_in_the_expressions_are_used():
    assert all((decimal, fractions, np, torch))

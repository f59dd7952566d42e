"""A user's function in a process of its own: real ones that sleep, raise, end their interpreter, print and leak."""

import os
import time

import pytest

from rlhf_ray.errors import UserError
from rlhf_ray.rewards.isolated_function import FunctionProcess, IsolatedFunction
from rlhf_ray.rewards.scorer import FunctionScorer, WeightedSum, WeightedTerm

FUNCTIONS = '''
import ctypes, os, subprocess, sys, time

calls = 0

def scores(prompts, responses):
    """As many as the letters, and how often this process was asked; some responses say what is to happen."""
    global calls
    calls += 1
    print("noise for the log")
    (prompt,), (response,) = prompts, responses
    if response == "sleep":
        time.sleep(60)
    if response == "spawn":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open("child", "w").write(str(child.pid))
        time.sleep(60)
    if response == "exit":
        os._exit(3)
    if response == "crash":
        ctypes.string_at(0)
    if response == "raise":
        raise ValueError("not that one")
    return {"text": ["many"], "nan": [float("nan")], "two": [1, 2]}.get(response, [len(response) + 100 * calls])

def process(prompts, responses):
    return [os.getpid()]

def nap(prompts, responses):
    time.sleep(0.3)
    return [1.0]

def nap_together(prompts, responses):
    time.sleep(0.3)
    return [2.0] * len(prompts)
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The functions, where the processes find them: by this one's search path."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "own_scores.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def lenient(module):
    """Used by several tests: a process that ended is replaced."""
    scorer = isolated(timeout_score=0.0)  # a score for late samples is none for broken ones
    yield scorer
    scorer.close()


def isolated(function="scores", timeout_s=20.0, timeout_score=None):
    keys = ("ppo.rewards.mine.timeout_s", "ppo.rewards.mine.timeout_score")
    return IsolatedFunction(f"own_scores:{function}", timeout_s=timeout_s, timeout_score=timeout_score, keys=keys)


def score(scorer, *responses):
    return scorer.score([f"prompt {i}" for i in range(len(responses))], responses, [True] * len(responses))


def test_one_process_answers_sample_by_sample_and_stays(module):
    scorer = isolated()
    found = [score(scorer, "a", "bcd"), score(scorer, "é\n\ud800")]
    assert found[0].total.tolist() == [101.0, 203.0] and found[1].total.tolist() == [303.0]
    assert not found[0].late.any()
    mine = isolated("process")
    first, second = score(mine, "x", "y").total
    assert first == second != os.getpid()
    scorer.close()
    mine.close()


def test_a_sample_over_the_limit_gets_its_score_and_the_next_a_new_process(module):
    scorer = isolated(timeout_s=1.0, timeout_score=-7.0)
    started = time.monotonic()
    found = score(scorer, "a", "sleep", "bc")
    assert found.total.tolist() == [101.0, -7.0, 102.0], "the third is the first call of its process"
    assert found.late.tolist() == [False, True, False]
    assert time.monotonic() - started < 20
    scorer.close()


def test_a_process_that_the_function_started_ends_with_it(module):
    scorer = isolated(timeout_s=2.0, timeout_score=0.0)
    assert score(scorer, "spawn").late.tolist() == [True]
    child = int((module / "child").read_text())
    for _ in range(50):
        state = ended(child)
        if state:
            break
        time.sleep(0.1)
    assert state
    scorer.close()


def ended(process):
    """Gone, or dead and waiting for whoever collects it."""
    try:
        return open(f"/proc/{process}/stat").read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_sample_over_the_limit_stops_the_run_in_words(module):
    with pytest.raises(UserError) as told:
        score(isolated(timeout_s=0.5), "a", "sleep")
    assert str(told.value) == (
        "own_scores:scores took longer than 0.5 s (ppo.rewards.mine.timeout_s) on prompt 'prompt 1', response 'sleep'; "
        "make it faster, raise the limit, or set ppo.rewards.mine.timeout_score to score such samples"
    )


@pytest.mark.parametrize(
    ("response", "says"),
    [
        ("exit", r"ended its process \(exit status 3\) on prompt 'prompt 1', response 'exit'"),
        ("crash", r"ended its process \(killed by SIGSEGV\) on prompt 'prompt 1', response 'crash'"),
        ("raise", r"raised ValueError: not that one on prompt 'prompt 1', response 'raise'"),
        ("text", r"returned \['many'\] for prompt 'prompt 1'.*return one number each"),
        ("two", r"returned \[1, 2\] for prompt 'prompt 1'.*return one number each"),
        ("nan", r"returned nan for prompt 'prompt 1'"),
    ],
)
def test_what_goes_wrong_is_the_users_with_the_sample(lenient, response, says):
    with pytest.raises(UserError, match=says):
        score(lenient, "a", response)


def test_a_function_that_cannot_be_imported_is_refused_at_the_start(module):
    with pytest.raises(UserError, match="did you mean 'scores'"):
        isolated("scoress")
    (module / "ends_at_once.py").write_text("import os\nos._exit(4)\n")
    with pytest.raises(UserError, match=r"ended its process \(exit status 4\) while its module was imported"):
        FunctionProcess("ends_at_once:f")


def test_functions_aside_are_waited_for_together_and_while_others_compute(module):
    """Two processes of their own and one function here, 4 samples of 0.3 s (here: all at once): 1.2 s, not 2.7."""
    scorers = {"one": isolated("nap"), "two": isolated("nap"), "here": FunctionScorer("own_scores:nap_together")}
    total = WeightedSum({name: WeightedTerm(1.0, scorer) for name, scorer in scorers.items()})
    started = time.monotonic()
    found = score(total, *"abcd")
    assert found.total.tolist() == [4.0] * 4
    assert time.monotonic() - started < 2.4
    for name in ("one", "two"):
        scorers[name].close()

"""What people add: one entry of each table, through the public door, end to end. Expected numbers by hand."""

import json
import math
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from in_process import LocalRoles
from rich.console import Console
from tiny import TEXTS, tiny_recipe, write_start
from transformers import GPTNeoXConfig

import rlhf_ray
from rlhf_ray.actors.checks import _engine_problems
from rlhf_ray.algorithms.experience import WrongEstimate, assemble
from rlhf_ray.cli.display import summary_table
from rlhf_ray.config import RoleConfig
from rlhf_ray.config.columns import Asked, asked_by, asked_columns, column_problems
from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.config.sampling_params import Completion, SamplingParams
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.data.data_problems import check_data
from rlhf_ray.data.prepare import prepare
from rlhf_ray.data.role_files import PromptColumns, read_prompt_columns, read_prompts, read_role, write_role
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.evaluate import evaluate
from rlhf_ray.evaluation.samples import draw_responses
from rlhf_ray.messages import Scores
from rlhf_ray.models.load import load_causal_lm, load_config
from rlhf_ray.models.memory import memory_plan
from rlhf_ray.models.model_problems import check_model
from rlhf_ray.models.size import shape_of_model
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.models.wire import copy_weights
from rlhf_ray.ppo.loop import LoopState, PPOLoop
from rlhf_ray.ppo.step import cut_chunks, step_prompts
from rlhf_ray.report.collect import _readme
from rlhf_ray.report.key_figures import table
from rlhf_ray.rewards.from_recipe import reward_scorer
from rlhf_ray.rewards.isolated_function import IsolatedFunction
from rlhf_ray.rewards.scorer import FunctionScorer
from rlhf_ray.roles.configs import experience_config
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.serving.config import EngineOptions, Limits
from rlhf_ray.serving.engine_choice import EngineChoice, choose_engine
from rlhf_ray.serving.loading import load
from rlhf_ray.tables.advantages import ADVANTAGES
from rlhf_ray.tables.engines import ENGINES
from rlhf_ray.tables.families import FAMILIES
from rlhf_ray.tables.figures import FIGURES, GROUPS, shown_figures
from rlhf_ray.tables.rewards import REWARDS
from rlhf_ray.tables.table import Table, loaded
from rlhf_ray.training.forward import response_logprobs


@pytest.fixture
def added():
    """added(register, table, entry): registered for the length of a test."""
    entries = []

    def add(register, table, entry):
        entries.append((table, register(entry).name))
        return entry

    yield add
    for of_it, name in entries:
        of_it.remove(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose prompts have the columns `length` and `level`."""
    folder = write_start(tiny_recipe(), RunFolder(tmp_path_factory.mktemp("extend")))
    for role, texts in (("prompts", TEXTS[:16]), ("eval_prompts", TEXTS[16:])):
        rows = [{"prompt": text, "columns": {"number": text.split()[-1], "level": [len(text)]}} for text in texts]
        write_role(folder, role, rows, ("prompt",))
    return folder


class Hooks:
    def __init__(self):
        self.metrics = []

    def record(self, step, metrics):
        self.metrics.append(metrics)

    def samples(self, *args): ...
    def save(self, state): ...
    def save_best(self, state): ...
    def stop_requested(self):
        return False


def train(recipe, folder):
    """The PPO stage on the real roles in one process -> (roles, metrics of every step)."""
    roles, hooks = LocalRoles(recipe, folder), Hooks()
    loop = PPOLoop(
        roles, recipe.ppo, hooks, LoopState(kl_coef=recipe.ppo.kl_coef), prompts=16, eval_prompts=4,
        chunk_size=recipe.generation.chunk_size, seed=recipe.seed,
    )  # fmt: skip
    assert loop.run()
    return roles, hooks.metrics


# -- tables -----------------------------------------------------------------------------------------------------------


def test_every_built_in_entry_finds_its_functions():
    for advantage in ADVANTAGES.values():
        assert callable(advantage.estimator) and (advantage.before_kl is None or callable(advantage.score_baseline))
    for entry in (*ENGINES.values(), *FAMILIES.values()):
        given = (entry.make, entry.problem) if entry.name in ENGINES else (entry.config,)
        assert all(callable(loaded(each)) for each in given if each is not None)
    assert all(callable(loaded(each.measure)) for each in (*FIGURES.values(), *GROUPS.values()))
    for kind in REWARDS.values():
        assert all(callable(loaded(each)) for each in (kind.make, kind.columns, kind.problems) if each is not None)


def test_a_taken_name_is_refused_and_the_same_entry_is_not(added):
    mine = rlhf_ray.Advantage(name="mine", estimate=above_the_best, words="mine")
    added(rlhf_ray.register_advantage, ADVANTAGES, mine)
    assert rlhf_ray.register_advantage(mine) is mine  # a module that is imported twice
    with pytest.raises(UserError, match="named 'gae' already; choose another name"):
        rlhf_ray.register_advantage(rlhf_ray.Advantage(name="gae", estimate=above_the_best, words=""))
    assert isinstance(ADVANTAGES, Table) and ADVANTAGES["gae"].needs_critic


PLUGIN = """
import rlhf_ray
from rlhf_ray.config.columns import Asked

def first_token(rewards, values, action_mask, options):
    total = rewards.sum(1, keepdim=True)
    advantages = total.new_zeros(rewards.shape)
    advantages[:, 0] = total[:, 0]
    return advantages, None

class Half:
    def score(self, prompts, responses, ended, columns):
        import numpy as np
        from rlhf_ray.messages import Scores
        return Scores(total=np.array([0.5 * int(number) for number in columns["number"]], np.float32))

rlhf_ray.register_advantage(rlhf_ray.Advantage(name="plugged", estimate=first_token, words="the first token gets all"))
rlhf_ray.register_reward(rlhf_ray.RewardKind(
    name="plugged", make=lambda setting: Half(), words="half the number", columns=lambda term: Asked(("number",))))
"""


def test_a_plugin_of_the_recipe_is_all_it_takes(tmp_path, monkeypatch, folder):
    """The recipe names the module; a name of it is no name without that."""
    (tmp_path / "my_additions.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    sections = {
        "ppo": {"advantage": "plugged", "rewards": {"half": {"kind": "plugged"}}, "critic_init": "sft", "steps": 1},
        "reward": None,
    }
    with pytest.raises(ValueError, match="'plugged' is not an advantage"):
        tiny_recipe(**sections)
    try:
        recipe = tiny_recipe(plugins=("my_additions",), **sections)
        _, metrics = train(pickle.loads(pickle.dumps(recipe)), folder)
        assert metrics[-1]["objective/score"] == 0.5 * np.mean([int(text.split()[-1]) for text in drawn(recipe)])
    finally:
        ADVANTAGES.remove("plugged")
        REWARDS.remove("plugged")


def test_the_examples_of_the_readme_work(tmp_path, monkeypatch, folder):
    """The blocks of tables/README.md as one module, and what its recipe says."""
    text = (Path(rlhf_ray.__file__).parent / "tables/README.md").read_text()
    blocks = dict.fromkeys(("yaml", "python"), "")
    for language, body in re.findall(r"^```(yaml|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        blocks[language] += body
    (tmp_path / "my_additions.py").write_text(blocks["python"])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_additions", raising=False)
    given = yaml.safe_load(blocks["yaml"])
    stages = dict(STAGES)
    try:
        recipe = tiny_recipe(plugins=given["plugins"], reward=None, counted=given["counted"],
                             ppo=given["ppo"] | {"steps": 1, "rollout_batch_size": 4})  # fmt: skip
        assert recipe.stages.index("counted") < recipe.stages.index("ppo") and recipe.section("counted").bins == 5
        counted = import_function(STAGES["counted"].run)(recipe, folder, "counted", print)
        assert counted["prompts"] == 16 and 16 / 5 < counted["largest_bin"] <= 16
        _, metrics = train(recipe, folder)
        assert metrics[-1]["objective/score"] <= 0 and metrics[-1]["rollout/tokens"] > 0
        shown = FIGURES["questions"].measure(SimpleNamespace(
            mean=np.mean, responses=SimpleNamespace(texts=["Why? ", "So."])
        ))  # fmt: skip
        assert shown == 0.5
    finally:
        STAGES.clear()
        STAGES.update(stages)
        for table, name in ((ADVANTAGES, "best_of_group"), (REWARDS, "brevity"), (FIGURES, "questions")):
            table.remove(name)


def drawn(recipe):
    """The prompts of the first step."""
    return [TEXTS[row] for row in step_prompts(0, 16, recipe.ppo.rollout_batch_size, recipe.seed)]


# -- advantages -------------------------------------------------------------------------------------------------------


def above_the_best(rewards, values, action_mask, options):
    """A response's reward less the best of its group, on each of its tokens."""
    of_response = rewards.sum(1).view(-1, options.group_size)
    gap = (of_response - of_response.max(1, keepdim=True).values).flatten()
    return gap[:, None].expand_as(rewards) * options.gamma, None


def assembled(recipe, **overrides):
    """Two samples of a prompt, three and two tokens, scores 2 and 1, no KL."""
    from dataclasses import replace

    mask = torch.tensor([[True, True, True], [True, True, False]])
    zeros = torch.zeros(2, 3)
    return mask, assemble(
        torch.tensor([2.0, 1.0]), torch.tensor([True, True]), zeros, zeros, zeros, None, mask,
        replace(experience_config(recipe).advantages, **overrides), kl_coef=0.0,
    )  # fmt: skip


def test_an_advantage_of_ones_own_trains(added, folder):
    mine = rlhf_ray.Advantage(name="above_the_best", estimate=above_the_best, words="mine", compares_samples=True)
    added(rlhf_ray.register_advantage, ADVANTAGES, mine)
    recipe = tiny_recipe(
        ppo={"advantage": "above_the_best", "samples_per_prompt": 2, "steps": 2, "rollout_batch_size": 4, "gamma": 0.5},
        reward={"max_length": 64},
    )
    assert not recipe.ppo.has_critic and not recipe.ppo.whitens_advantages
    mask, result = assembled(recipe)
    assert result.advantages[mask].tolist() == [0.0, 0.0, 0.0, -0.5, -0.5]  # (2 - 2) / 2 and (1 - 2) / 2
    assert result.advantages[~mask].tolist() == [0.0]  # though the estimator filled it
    before = LocalRoles(recipe, folder).weights()
    roles, metrics = train(recipe, folder)
    assert roles.critic is None and any((before[name] != each).any() for name, each in roles.weights().items())
    assert metrics[-1]["policy/advantage_std"] > 0
    with pytest.raises(ValueError, match="above_the_best compares the samples of a prompt"):
        tiny_recipe(ppo={"advantage": "above_the_best"})


def test_an_advantage_with_a_critic_must_give_returns(added):
    entry = rlhf_ray.Advantage(name="own_critic", estimate=above_the_best, words="mine", needs_critic=True)
    added(rlhf_ray.register_advantage, ADVANTAGES, entry)
    recipe = tiny_recipe(ppo={"advantage": "own_critic"})
    assert recipe.ppo.has_critic and "critic" in recipe.ppo_roles
    with pytest.raises(WrongEstimate, match="own_critic gave no returns"):
        assembled(recipe, group_size=2)


def test_an_advantage_of_another_shape_is_refused(added):
    def short(rewards, values, action_mask, options):
        return rewards.sum(1), None

    added(
        rlhf_ray.register_advantage, ADVANTAGES, rlhf_ray.Advantage(name="short", estimate=short, words="[B] only")
    )
    with pytest.raises(WrongEstimate, match=r"short gave advantages of shape \(2,\) for rewards of shape \(2, 3\)"):
        assembled(tiny_recipe(ppo={"advantage": "short"}))


def test_a_name_that_is_no_advantage_trains_nothing():
    """It was REINFORCE++ once, without a word."""
    with pytest.raises(ValueError, match="did you mean 'grpo'"):
        tiny_recipe(ppo={"advantage": "grop"})
    with pytest.raises(UserError, match="ppo.advantage: 'grop' .* did you mean 'grpo'"):
        build_recipe({"name": "x", "ppo": {"advantage": "grop"}}, [], "x.yaml")
    with pytest.raises(UserError, match="is not an advantage"):
        ADVANTAGES.named("nobody's")


# -- columns of the prompts' rows -------------------------------------------------------------------------------------


def right_number(prompts, responses, *, number):
    return [float(prompt.endswith(f" {each}")) for prompt, each in zip(prompts, number, strict=True)]


def first_level(prompts, responses, level, scale=2.0):
    return [scale * each[0] for each in level]


def all_there_is(prompts, responses, **columns):
    return [float(len(columns))] * len(prompts)


def two_only(prompts, responses):
    return [0.0] * len(prompts)


def strict_about_five(prompts, responses, *, number):
    return [1 / (int(each) - 5) for each in number]


HERE = __name__


def test_what_functions_ask_for():
    assert asked_by(two_only) == Asked()
    assert asked_by(right_number) == Asked(needed=("number",))
    assert asked_by(first_level) == Asked(needed=("level",), welcome=("scale",))
    assert asked_by(all_there_is) == Asked(everything=True)
    assert asked_by(len) == Asked() and asked_by(lambda *texts: texts) == Asked()
    assert asked_by(all_there_is).among(["a", "b"]) == ("a", "b") and asked_by(first_level).among(["a", "scale"]) == ("scale",)


def test_a_function_gets_the_columns_it_names_and_no_others():
    columns = {"number": ["1", "2"], "level": [[3], [4]]}
    given = ["x 1", "x 3"], ["", ""], [True, True], columns
    assert FunctionScorer(f"{HERE}:right_number").score(*given).total.tolist() == [1.0, 0.0]
    assert FunctionScorer(f"{HERE}:first_level").score(*given).total.tolist() == [6.0, 8.0]
    assert FunctionScorer(f"{HERE}:all_there_is").score(*given).total.tolist() == [2.0, 2.0]
    assert FunctionScorer(f"{HERE}:two_only").score(*given).total.tolist() == [0.0, 0.0]


def test_a_users_error_shows_the_sample_with_its_columns():
    given = ["a", "b"], ["x", "y"], [True, True], {"number": ["4", "5"], "level": [[1], [2]]}
    with pytest.raises(UserError, match="ZeroDivisionError.* on prompt 'b', response 'y', number '5'$"):
        FunctionScorer(f"{HERE}:strict_about_five").score(*given)


def test_an_isolated_function_gets_its_columns_too(tmp_path, monkeypatch):
    (tmp_path / "isolated_scores.py").write_text(
        "def score(prompts, responses, *, number, level=None):\n"
        "    return [float(number[0]) + level[0][0]]\n"
        "def boom(prompts, responses, *, number):\n"
        "    raise ValueError('no')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    columns = {"number": ["1", "2"], "level": [[30], [40]], "id": [7, 8]}
    keys = ("limit", "score")
    scorer = IsolatedFunction("isolated_scores:score", timeout_s=60.0, timeout_score=None, keys=keys)
    try:
        assert scorer.score(["a", "b"], ["x", "y"], [True, True], columns).total.tolist() == [31.0, 42.0]
    finally:
        scorer.close()
    scorer = IsolatedFunction("isolated_scores:boom", timeout_s=60.0, timeout_score=None, keys=keys)
    try:
        with pytest.raises(UserError, match="ValueError: no on prompt 'a', response 'x', number '1'$"):
            scorer.score(["a"], ["x"], [True], {"number": ["1"]})
    finally:
        scorer.close()


def test_columns_reach_the_reward_role_by_prompt_index(folder):
    recipe = tiny_recipe(
        ppo={"reward_function": f"{HERE}:right_number", "judge_evaluations": True, "critic_init": "sft"},
        evaluation={"judge_function": f"{HERE}:first_level"},
    )
    roles = LocalRoles(recipe, folder)
    for evaluation, texts in ((False, TEXTS), (True, TEXTS[16:])):
        (rollout,) = roles.generation.generate(cut_chunks(0, [3, 0, 3], 1, 4, evaluation=evaluation))
        assert roles.reward.score([rollout])[0].total.tolist() == [1.0] * 3  # each answer stands beside its own prompt
        assert roles.reward.judge([rollout])[0].total.tolist() == [2.0 * len(texts[i]) for i in (3, 0, 3)]


def test_a_column_that_is_not_there_is_refused_in_words(folder):
    recipe = tiny_recipe(ppo={"reward_function": f"{HERE}:right_number"}, evaluation={"judge_function": f"{HERE}:two_only"})
    assert asked_columns(recipe) == {"ppo.reward_function": Asked(("number",)), "evaluation.judge_function": Asked()}
    assert column_problems(recipe, ["number", "level"], "x") == []
    (problem,) = column_problems(recipe, ["level"], "data.prompts")
    assert problem.startswith(
        "ppo.reward_function: its function asks for the column 'number', but data.prompts has the column 'level'"
    )


def rows_of(path, **columns):
    pd.DataFrame(columns).to_parquet(path)
    return {"path": str(path)}


@pytest.fixture
def with_answers(tmp_path):
    """Two sources of prompts, of which one row is empty, one repeats another and one is too long for 16 tokens."""
    sft = rows_of(tmp_path / "sft.parquet", text=[f"{text} and so on." for text in TEXTS])
    long = "word " * 40 + "please tell me about number 99"
    first = ["ask 1", "", "ask 2", "ask 1", long, *(f"ask {i}" for i in range(3, 20))]
    answers = ["1", "none", "2", "again", "99", *(str(i) for i in range(3, 20))]
    prompts = [
        rows_of(tmp_path / "a.parquet", prompt=first, answer=answers, only_a=list(range(len(first)))),
        rows_of(tmp_path / "b.parquet", answer=[f"{i}" for i in range(50, 60)], prompt=[f"ask {i}" for i in range(50, 60)]),
    ]
    return {"sft": [sft], "prompts": prompts, "holdout": 0.3, "max_prompt_tokens": 16}


def answers_match(prompts, responses, *, answer):
    return [float(prompt.split()[-1] == each) for prompt, each in zip(prompts, answer, strict=True)]


WHOLE = []


def notes_whole(prompts, responses, *, whole_prompt):
    WHOLE.extend(whole_prompt)
    return [0.0] * len(prompts)


def test_a_function_may_ask_for_whole_prompts_where_none_was_cut(tmp_path):
    """It gets the prompts. One that takes all columns gets those of the data only, and the data's own of that name comes first."""
    recipe = tiny_recipe(ppo={"reward_function": f"{HERE}:notes_whole"})
    assert column_problems(recipe, [], "data.prompts") == []
    assert asked_by(notes_whole).of({}, ["a", "b"]) == {"whole_prompt": ["a", "b"]}
    assert asked_by(notes_whole).of({"whole_prompt": ["x"], "other": [1]}, ["a"]) == {"whole_prompt": ["x"]}
    assert asked_by(all_there_is).of({"other": [1]}, ["a"]) == {"other": [1]}
    marked = [{"prompt": "b", "key": "a <|im\ufdd0_end|> b", "messages": None}, {"prompt": "c", "key": "c", "messages": None}]
    write_role(RunFolder(tmp_path), "prompts", marked, ("prompt",))
    assert read_prompt_columns(RunFolder(tmp_path)).of([1, 0]) == {"whole_prompt": ["c", "a <|im_end|> b"]}


def test_rows_and_columns_stay_together_through_duplicates_cuts_mixing_and_holding_out(tmp_path, with_answers):
    recipe = tiny_recipe(data=with_answers, reward=None, ppo={"reward_function": f"{HERE}:answers_match", "critic_init": "sft"})
    assert check_data(recipe) == []
    folder = RunFolder(tmp_path / "run")
    prepare(recipe, folder)
    seen, whole = 0, []
    for role in ("prompts", "eval_prompts"):
        prompts, columns = read_prompts(folder, role), read_prompt_columns(folder, role)
        assert columns.names[:2] == ["answer", "only_a"]
        rows = columns.of(range(len(prompts)))
        WHOLE.clear()
        FunctionScorer(f"{HERE}:notes_whole").score(prompts, prompts, [True] * len(prompts), rows)
        whole += [(text, prompt) for text, prompt in zip(WHOLE, prompts, strict=True) if text != prompt]
        assert rows["answer"] == [prompt.split()[-1] for prompt in prompts]  # also the one that was cut
        for prompt, only_a in zip(prompts, rows["only_a"], strict=True):
            assert (only_a is None) == (50 <= int(prompt.split()[-1]) < 60)
        assert columns.of([2, 0]) == {name: [rows[name][2], rows[name][0]] for name in columns.names}
        seen += len(prompts)
    assert seen == 20 + 10  # 22 rows of a, less the empty one and the repeated one
    ((text, cut),) = whole  # the data's own text, of the one that was cut
    assert text == "word " * 40 + "please tell me about number 99" and cut and text.endswith(cut.strip())
    assert column_problems(recipe, [], "x", perhaps=("answer",)) == []
    assert set(read_role(folder, "sft_train").column_names) == {"prompt", "response"}


def needs_solution(prompts, responses, *, solution):
    return [0.0] * len(prompts)


def test_data_without_the_column_is_refused_before_anything_trains(tmp_path, with_answers):
    recipe = tiny_recipe(data=with_answers, reward=None, ppo={"reward_function": f"{HERE}:needs_solution", "critic_init": "sft"})
    says = "asks for the column 'solution', but data.prompts has the columns 'answer', 'only_a'"
    assert any(says in problem for problem in check_data(recipe))
    with pytest.raises(UserError, match=says):
        prepare(recipe, RunFolder(tmp_path / "run"))
    assert not RunFolder(tmp_path / "run").data("prompts").exists()


def test_values_of_two_types_are_refused(tmp_path):
    rows = [{"prompt": "a", "columns": {"answer": 1}}, {"prompt": "b", "columns": {"answer": "one"}}]
    with pytest.raises(UserError, match="'answer' are of several types"):
        write_role(RunFolder(tmp_path), "prompts", rows, ("prompt",))


# -- kinds of reward --------------------------------------------------------------------------------------------------


class Constant:
    def __init__(self, value):
        self.value = value

    def score(self, prompts, responses, ended, columns):
        assert set(columns) == {"number", "level"}
        return Scores(total=np.full(len(prompts), self.value, np.float32))


def constant(setting):
    return Constant(setting.term.options["value"])


def constant_problems(recipe, key, term):
    return [] if "value" in term.options else [f"{key}.options has no value; set it"]


def test_a_kind_of_reward_of_ones_own(added, folder):
    from rlhf_ray.rewards.reward_problems import reward_problems

    kind = rlhf_ray.RewardKind(name="constant", make=constant, words="the same for all", problems=constant_problems,
                               columns=lambda term: Asked(("number",)))  # fmt: skip
    added(rlhf_ray.register_reward, REWARDS, kind)
    terms = {
        "always": {"kind": "constant", "options": {"value": 3.0}, "weight": 0.5},
        "right": {"function": f"{HERE}:right_number"},
    }
    recipe = tiny_recipe(ppo={"rewards": terms, "critic_init": "sft", "steps": 1})
    assert reward_problems(recipe) == []
    _, metrics = train(recipe, folder)
    assert metrics[-1]["objective/score"] == pytest.approx(0.5 * 3 + 1) and metrics[-1]["objective/score/always"] == 3.0
    (problem,) = column_problems(recipe, [], "x")[:1]
    assert problem.startswith("ppo.rewards.always: its function asks for the column 'number', but x has no column")
    bare = tiny_recipe(ppo={"rewards": {"always": {"kind": "constant"}}, "critic_init": "sft"})
    assert reward_problems(bare) == ["ppo.rewards.always.options has no value; set it"]


@pytest.mark.parametrize(
    ("term", "says"),
    [
        ({"kind": "constnt"}, "'constnt' is not a kind of reward; .*there are|There are"),
        ({"kind": "function"}, "follows from the keys"),
        ({"kind": "constant", "model": "reward"}, "give it one of these"),
        ({"options": {"a": 1}, "model": "reward"}, "no kind that reads them"),
        ({}, "neither function and model"),
    ],
)
def test_terms_that_say_too_much_or_too_little(added, term, says):
    added(rlhf_ray.register_reward, REWARDS, rlhf_ray.RewardKind(name="constant", make=constant, words=""))
    with pytest.raises(ValueError, match=says):
        tiny_recipe(ppo={"rewards": {"one": term}})


def test_models_are_loaded_once_for_two_terms(folder):
    terms = {"a": {"model": "reward"}, "b": {"model": "reward", "weight": -1.0}}
    scorer = reward_scorer(tiny_recipe(ppo={"rewards": terms}), folder, torch.float32, "cpu")
    assert scorer.terms["a"].scorer is scorer.terms["b"].scorer
    total = scorer.score(["please tell"], [" me"], [True], {}).total
    assert total.tolist() == [0.0] and not math.isnan(total[0]) and isinstance(read_prompt_columns(folder), PromptColumns)


# -- generation engines -----------------------------------------------------------------------------------------------


class Spelling:
    """Draws the ids 5, 6, 7, ... one after the other, whatever the prompt, and says what it was asked."""

    max_length, vocab_size = None, 300

    def __init__(self, setting):
        self.model, self.asked, self.setting = setting.model, [], setting

    def generate(self, prompt_ids, seeds, params):
        self.asked.append((len(prompt_ids), params.max_new_tokens))
        ids = np.arange(5, 5 + params.max_new_tokens, dtype=np.int32)
        logprobs = response_logprobs(self.model, [np.asarray(one) for one in prompt_ids], [ids] * len(prompt_ids))
        return [Completion(response_ids=ids, logprobs=each, finish_reason="length") for each in logprobs]

    def load_weights(self, state, kept=frozenset()):
        copy_weights(self.model, state, kept)

    def model_changed(self): ...
    def sleep(self): ...
    def close(self):
        self.asked.append("closed")


@pytest.fixture
def spelling(added):
    made = []

    def make(setting):
        made.append(Spelling(setting))
        return made[-1]

    entry = rlhf_ray.Engine(
        name="spelling", make=make, words="the ids in order", coldest=0.3, copies=(2, 0),
        problem=lambda gpus: "spelling needs no GPU; set gpus to 0" if gpus else None,
    )  # fmt: skip
    added(rlhf_ray.register_engine, ENGINES, entry)
    return made


def test_an_engine_of_ones_own_draws_ppos_rollouts(spelling, folder):
    recipe = tiny_recipe(generation={"engine": "spelling", "stop": ()}, ppo={"steps": 1})
    roles, metrics = train(recipe, folder)
    (engine,) = spelling
    assert engine.asked[0] == (4, 10) and engine.setting.rows == 4 and engine.setting.longest > 10
    assert metrics[-1]["objective/response_length"] == 10 and metrics[-1]["policy/mismatch_max"] < 1e-4
    name, trained = next(iter(roles.policy.roles[0].weights()))
    assert torch.equal(dict(engine.model.named_parameters())[name], trained)  # it got the new weights


def test_an_engines_needs_are_checked(spelling):
    with pytest.raises(ValueError, match="below 0.3, the least that spelling draws at"):
        tiny_recipe(generation={"engine": "spelling", "temperature": 0.2})
    with pytest.raises(ValueError, match="did you mean 'spelling'"):
        tiny_recipe(generation={"engine": "speling"})
    recipe = tiny_recipe(generation={"engine": "spelling"})
    assert _engine_problems(recipe) == []
    on_gpu = recipe.model_copy(
        update={"resources": recipe.resources.model_copy(update={"generation": RoleConfig(gpus=1.0)})}
    )
    assert _engine_problems(on_gpu) == ["spelling needs no GPU; set gpus to 0"]
    with_copies, plain = ({row.role: row.state for row in memory_plan(each)}["generation"]
                          for each in (recipe, tiny_recipe(generation={"engine": "torch"})))  # fmt: skip
    assert with_copies == 1.5 * plain  # the model and two copies; the model and one


def test_the_evaluation_draws_with_the_recipes_engine(spelling, folder):
    path = folder.stage("sft").model
    drawn = draw_responses(
        load_causal_lm(path), load_tokenizer(path), TEXTS[:3], (0, 1), SamplingParams(max_new_tokens=4), chunk_size=4,
        device="cpu", progress=lambda count: None, engine="spelling", folder=path,
    )  # fmt: skip
    assert [ids.tolist() for ids in drawn.response_ids] == [[5, 6, 7, 8]] * 6
    assert spelling[0].asked == [(4, 4), (2, 4), "closed"] and spelling[0].setting.folder == path


def test_what_a_server_draws_with(spelling, added, tmp_path):
    """The recipe's engine where it can serve; else torch, in words; one that is asked for and can't serve is refused."""
    recipe = tmp_path / "recipe.yaml"
    assert choose_engine(None, tmp_path, 0.0) == EngineChoice("torch")  # no recipe: a model folder
    recipe.write_text("name: x\ngeneration: {engine: spelling}\n")
    chosen = choose_engine(None, tmp_path / "ppo" / "model", 0.0)
    assert chosen.name == "torch"
    assert chosen.note.startswith("drawing with torch: the engine spelling has no batch that requests join")
    with pytest.raises(UserError, match="the engine spelling has no batch .*; give --engine torch"):
        choose_engine("spelling", tmp_path, 0.0)
    recipe.write_text("name: x\ngeneration: {engine: open}\n")
    left_out = choose_engine(None, tmp_path, 0.0)  # of a plugin that is not here
    assert left_out.name == "torch" and "without the run's recipe, its engine and its plugins' stages" in left_out.note
    entry = rlhf_ray.Engine(name="open", make=Spelling, words="", continuous=True, problem=lambda gpus: "no" if gpus else None)
    added(rlhf_ray.register_engine, ENGINES, entry)
    assert choose_engine(None, tmp_path, 0.0) == choose_engine("open", tmp_path, 0.0) == EngineChoice("open")
    assert choose_engine(None, tmp_path, 1.0) == EngineChoice("torch", "drawing with torch: no")
    with pytest.raises(UserError, match="did you mean 'open'"):
        choose_engine("opn", tmp_path, 0.0)


def test_a_server_loads_the_engine_it_was_told(added, folder):
    entry = rlhf_ray.Engine(name="open", make=Spelling, words="", continuous=True)
    added(rlhf_ray.register_engine, ENGINES, entry)
    options = EngineOptions(model=str(folder.stage("sft").model), engine="open", precision="float32")
    threads = torch.get_num_threads()
    try:
        runner, reader = load(options, Limits(max_rows=3))
    finally:
        torch.set_num_threads(threads)
    assert isinstance(runner.engine, Spelling) and runner.engine.setting.rows == 3 and reader.vocab_size == 300
    runner.close()


# -- model families ---------------------------------------------------------------------------------------------------


def neox_config(shape, token_ids):
    return GPTNeoXConfig(
        hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width, max_position_embeddings=shape.positions, hidden_dropout=0.0, attention_dropout=0.0,
        **token_ids,
    )  # fmt: skip


def test_a_family_of_ones_own_trains_from_random_weights(added, tmp_path):
    family = rlhf_ray.Family(name="gpt_neox", words="GPT-NeoX", config=neox_config, gated=False)
    added(rlhf_ray.register_family, FAMILIES, family)
    recipe = tiny_recipe(
        model={"from_scratch": {"architecture": "gpt_neox"}}, ppo={"steps": 1, "lora": {"target_modules": ["dense"]}},
    )  # fmt: skip
    assert not shape_of_model(recipe).gated and check_model(recipe) == []
    folder = write_start(recipe, RunFolder(tmp_path))
    assert load_config(folder.stage("sft").model).model_type == "gpt_neox"
    roles, metrics = train(recipe, folder)
    assert metrics[-1]["policy/mismatch_max"] < 1e-4 and len(roles.policy.roles[0].engine.optimizer.param_groups[0]["params"]) == 4


def test_a_family_that_does_not_start_from_random_weights_is_refused():
    with pytest.raises(ValueError, match="'mistral' is a model family that can't be used here; there are gpt2, llama, qwen2"):
        tiny_recipe(model={"from_scratch": {"architecture": "mistral"}})
    with pytest.raises(ValueError, match="did you mean 'qwen2'"):
        tiny_recipe(model={"from_scratch": {"architecture": "qwn2"}})


# -- figures ----------------------------------------------------------------------------------------------------------


def letters(evidence):
    """A number from the texts and one from the prompts' columns."""
    numbers = zip(evidence.responses.texts, evidence.columns["number"], strict=True)
    return evidence.mean([len(text) + 1000 * int(number) for text, number in numbers])


def nowhere(evidence):
    return None


def on_level(prompts, responses, *, level):
    return {"level_told": [float(each[0]) for each in level]}


def test_a_figure_of_ones_own_is_in_summary_report_closing_table_and_pages(added, folder):
    """Both models are the same one, so what differs is nothing."""
    figures = (
        rlhf_ray.Figure(name="letters", measure=letters, label="Letters", unit="and numbers", definition="Letters and more.",
                        better=1, ratio=True, short="letters in all"),
        rlhf_ray.Figure(name="nowhere", measure=nowhere, label="Nowhere", unit="", absent="Nobody can measure this."),
    )  # fmt: skip
    for figure in figures:
        added(rlhf_ray.register_figure, FIGURES, figure)
    (folder.path / "ppo").symlink_to(folder.stage("sft").path)
    recipe = tiny_recipe(
        evaluation={"prompts": 5, "seeds": (0, 1), "bootstrap": 20, "trait_function": f"{HERE}:on_level"},
        ppo={"reward_function": f"{HERE}:right_number", "critic_init": "sft"}, reward=None,
    )  # fmt: skip
    summary = evaluate(recipe, folder)
    samples = [json.loads(line) for line in (folder.path / "evaluation" / "samples.jsonl").read_text().splitlines()]
    expected = np.mean([len(row["ppo"]["response"]) + 1000 * int(row["prompt"].split()[-1]) for row in samples])
    assert len(samples) == 10 and summary["ppo"]["letters"]["mean"] == pytest.approx(expected)
    assert summary["ppo"]["score"]["mean"] == 1.0  # every response was scored beside its own number
    assert summary["ppo"]["trait/level_told"]["mean"] == np.mean([len(row["prompt"]) for row in samples])
    assert summary["difference"]["letters"]["mean"] == 0 and summary["ratio"]["letters"]["mean"] == 1
    assert summary["definitions"]["letters"] == "Letters and more."
    assert summary["ppo"]["nowhere"] is None and summary["missing"]["nowhere"] == "Nobody can measure this."
    (row,) = [row for row in table(summary) if row["label"] == "Letters"]
    assert row["unit"] == "and numbers" and len(row["cells"]) == 2
    for figure in figures:  # as for `rlhf-ray report` later on, which imports no plugin
        FIGURES.remove(figure.name)
    assert row in table(json.loads((folder.path / "evaluation" / "summary.json").read_text()))
    console = Console(width=160)
    with console.capture() as capture:
        console.print(summary_table(summary))
    assert "letters in all" in capture.get() and "level told" in capture.get() and "Nowhere" not in capture.get()
    for name in ("environment.json", "timings.json"):
        (folder.path / name).write_text('{"cpus": 2, "cpu": "x", "gpus": []}' if name.startswith("env") else "{}")
    assert any(line.startswith("| letters in all | PPO |") for line in _readme("x", {0: summary}, [folder]))
    for figure in figures:
        rlhf_ray.register_figure(figure)


def test_figures_of_a_group_follow_their_figure():
    keys = ["length", "trait/on_topic", "score/gaps", "judge", "score", "unknown"]
    shown = [(each.name, each.label, each.short) for each in shown_figures(keys)]
    assert shown == [
        ("score", "Reward-model score", "reward-model score"),
        ("score/gaps", "Reward “gaps”", None),
        ("judge", "Judge's score", "judge's score"),
        ("trait/on_topic", "Trait: on topic", "on topic"),
        ("length", "Length", "tokens"),
    ]

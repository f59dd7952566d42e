"""`data.votes` of a recipe: pairs for the reward model, held-out prompts that train nothing, and mistakes in words."""

import json
import shutil
import sqlite3
import sys

import pytest
import yaml
from command import rlhf_ray
from voted import answer, compare, prefer

from rlhf_ray.config import EvaluationConfig, Recipe
from rlhf_ray.config.recipe_file import build_recipe, load_recipe, path_fields
from rlhf_ray.data.data_problems import check_data
from rlhf_ray.data.paths import resolve_paths
from rlhf_ray.data.prepare import prepare
from rlhf_ray.data.role_files import has_role, read_role
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.votes.reading import held_out_prompts, read_judgements
from rlhf_ray.votes.store import VoteStore

QUESTIONS = [f"Question {number}?" for number in range(40)]


def recipe_of(folder, votes="votes.db", **data):
    """Its path stands for a database in the folder."""
    votes = {"url": votes} if isinstance(votes, str) else votes
    return Recipe.model_validate({
        "name": "t",
        "model": {"from_scratch": {"layers": 1, "width": 16, "heads": 2, "positions": 128, "vocab_size": 400}},
        "data": {"root": str(folder), "max_prompt_tokens": 32, "holdout": 0.2, "sft": [{"path": "sft.jsonl"}],
                 "votes": votes | {"url": str(folder / votes["url"])}} | data,
        "sft": {"max_length": 96}, "reward": {"max_length": 96},
    })  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    store = VoteStore(str(folder / "votes.db"), create=True, held_out_share=0.3)
    for place, question in enumerate(QUESTIONS):
        prompt = question if place % 2 else [{"role": "user", "content": question}]
        id = compare(store, prompt, answer(f" good {place}"), answer(f" bad {place}", "sft", "1"))
        prefer(store, id, "ann", "a")
        prefer(store, id, "bob", "a" if place % 4 else "tie")
    store.close()
    with open(folder / "sft.jsonl", "w") as file:
        for question in [*QUESTIONS, *(f"Other {number}?" for number in range(20))]:
            file.write(json.dumps({"prompt": question, "response": " an answer"}) + "\n")
    with open(folder / "pairs.jsonl", "w") as file:
        for question in [*QUESTIONS[:20], *(f"Other {number}?" for number in range(20))]:
            file.write(json.dumps({"prompt": question, "chosen": " from a file", "rejected": " no"}) + "\n")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """40 prompts with two votes each, every second one as messages; and files with the same prompts."""
    return shutil.copytree(original, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def store(folder):
    opened = VoteStore(str(folder / "votes.db"))
    yield opened
    opened.close()


def words_of(prompt):
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def question_in(text):
    """The question that a prepared prompt asks, whether it is plain or in the form of messages."""
    return text.removeprefix("User: ").removesuffix("\n\nAssistant:")


def questions(run, role):
    return {question_in(text) for text in read_role(run, role)["prompt"]}


def test_votes_alone_are_the_reward_models_pairs(folder, store):
    recipe, run = recipe_of(folder), RunFolder(folder / "run")
    assert check_data(recipe) == []
    summary = prepare(recipe, run)
    held_out = {words_of(prompt) for prompt in held_out_prompts(store.database)}
    assert 3 <= len(held_out) <= 25
    train, measured, held = (questions(run, f"reward_{part}") for part in ("train", "eval", "eval_votes"))
    assert held == held_out and train | measured == set(QUESTIONS) - held_out and not train & measured
    rows = read_role(run, "reward_train")
    assert {row["chosen"].split()[0] for row in rows} == {"good"} and {row["rejected"].split()[0] for row in rows} == {"bad"}
    assert any(row["prompt"].startswith("User: ") for row in rows) and any(row["prompt"].startswith("Question") for row in rows)
    # A held-out prompt trains nothing, in whatever list and whichever form it stands.
    for role in ("sft_train", "prompts"):
        assert not questions(run, role) & held_out
    assert summary["sources"]["sft"][0]["dropped"] == {"in_held_out_votes": len(held_out)}
    (source,) = summary["sources"]["preferences"]
    assert source["source"] == str(folder / "votes.db") and source["kept"] == 40 - len(held_out) == source["read"]
    assert source["note"].startswith("left out: ") and " ties" in source["note"]


def test_who_is_held_out_does_not_depend_on_the_seed_of_the_run(folder):
    held = []
    for seed in (0, 1):
        run = RunFolder(folder / f"run{seed}")
        prepare(recipe_of(folder).model_copy(update={"seed": seed}), run)
        held.append(questions(run, "reward_eval_votes"))
    assert held[0] == held[1] != set()


def test_votes_beside_a_file_by_weight(folder, store):
    recipe = recipe_of(folder, {"url": "votes.db", "weight": 1.0}, preferences=[{"path": "pairs.jsonl", "weight": 1.0}])
    assert check_data(recipe) == []
    summary = prepare(recipe, RunFolder(folder / "run"))
    held_out = {words_of(prompt) for prompt in held_out_prompts(store.database)}
    file, votes = summary["sources"]["preferences"]
    assert file["kept"] == votes["kept"] and file["dropped"]["in_held_out_votes"] == len(held_out & set(QUESTIONS[:20]))
    run = RunFolder(folder / "run")
    assert not (questions(run, "reward_train") | questions(run, "reward_eval")) & held_out
    problems = check_data(recipe_of(folder, preferences=[{"path": "pairs.jsonl", "weight": 1.0}]))
    assert problems == ["some of data.preferences have a weight and some have none; give a weight to all or to none"]


def test_the_prompts_held_out_may_be_what_the_evaluation_asks(folder, store):
    """They come first, and as many others as the evaluation takes."""
    recipe, run = recipe_of(folder, {"url": "votes.db", "evaluate": True}), RunFolder(folder / "run")
    held_out = {words_of(prompt) for prompt in held_out_prompts(store.database)}
    others = recipe_of(folder), RunFolder(folder / "others")
    prepare(*others)
    summary = prepare(recipe.model_copy(update={"evaluation": EvaluationConfig(prompts=len(held_out) + 2)}), run)
    asked = [question_in(text) for text in read_role(run, "eval_prompts")["prompt"]]
    assert set(asked[: len(held_out)]) == held_out and len(asked) == len(held_out) + 2
    assert set(asked[len(held_out) :]) <= questions(others[1], "eval_prompts") and not questions(run, "prompts") & set(asked)
    newest = max(each.voted_at for each in read_judgements(store.database))
    assert summary["votes"] == {"train": 80 - 2 * len(held_out), "held_out": 2 * len(held_out), "newest": newest}
    few = RunFolder(folder / "few")
    prepare(recipe.model_copy(update={"evaluation": EvaluationConfig(prompts=1)}), few)
    assert questions(few, "eval_prompts") == held_out  # of which the evaluation draws its number


BUILDER = """
from datasets import Dataset
def build(root, seed):
    asked = [f"Question {number}?" for number in range(40)] + [f"Other {number}?" for number in range(40)]
    sft = Dataset.from_dict({"prompt": asked, "response": [" it is"] * 80})
    pairs = {"prompt": asked, "chosen": [" built"] * 80, "rejected": [" no"] * 80}
    return {"sft": sft, "preferences": Dataset.from_dict(pairs), "prompts": Dataset.from_dict({"prompt": asked}),
            "preferences_eval": Dataset.from_dict({name: values[:9] for name, values in pairs.items()})}
"""


def test_votes_beside_a_builder(folder, store, monkeypatch):
    (folder / "voted_builder.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(folder)
    recipe, run = recipe_of(folder, builder="voted_builder:build", root=None, sft=[]), RunFolder(folder / "run")
    assert check_data(recipe) == []
    prepare(recipe, run)
    sys.modules.pop("voted_builder", None)
    held_out = {words_of(prompt) for prompt in held_out_prompts(store.database)}
    chosen = {row["chosen"].split()[0] for row in read_role(run, "reward_train")}
    assert chosen == {"built", "good"} and questions(run, "reward_eval_votes") == held_out
    assert len(read_role(run, "reward_eval")) == 9  # the builder's own
    for role in ("sft_train", "reward_train", "prompts"):
        assert not questions(run, role) & held_out


def test_filters_and_no_held_out_prompt(tmp_path, folder):
    store = VoteStore(str(tmp_path / "all.db"), create=True, held_out_share=0.0)
    for place, question in enumerate(QUESTIONS):
        id = compare(store, question, answer(f" good {place}"))
        prefer(store, id, "ann", "a")
        prefer(store, id, "bob", "b" if place < 10 else "a")
    store.close()
    run = RunFolder(folder / "run")
    prepare(recipe_of(folder, {"url": "all.db", "min_agreement": 0.6}), run)
    assert questions(run, "reward_train") | questions(run, "reward_eval") == set(QUESTIONS[10:])
    assert not has_role(run, "reward_eval_votes")
    bobs = RunFolder(folder / "bobs")
    prepare(recipe_of(folder, {"url": "all.db", "raters": ["bob"], "versions": ["ppo@2"], "since": "2020-01-01"}), bobs)
    assert {row["chosen"].split()[0] for row in read_role(bobs, "reward_train")} == {"good", "No."}


# -- mistakes


def test_each_mistake_is_a_sentence_before_anything_starts(folder):
    with sqlite3.connect(folder / "newer.db") as newer:
        newer.execute("CREATE TABLE votes_schema (one INTEGER, version INTEGER, held_out_share REAL)")
        newer.execute("INSERT INTO votes_schema VALUES (1, 9, 0.1)")
    VoteStore(str(folder / "empty.db"), create=True).close()
    for votes, words in (
        ("nowhere.db", "data.votes: there is no database of votes at"),
        ("newer.db", "data.votes: {here}/newer.db has schema 9, made by a newer rlhf_ray"),
        ("sft.jsonl", "sft.jsonl can't be opened as a database of votes"),
        ("empty.db", "{here}/empty.db has 0 votes to train on that the filters let through, and they make no pair (nothing;"),
        ({"url": "votes.db", "raters": ["cy"]}, "has 0 votes to train on that the filters let through"),
        ({"url": "votes.db", "until": "2020-01-01"}, "collect votes, or loosen the filters"),
    ):
        recipe = recipe_of(folder, votes)
        (problem,) = check_data(recipe)
        assert words.replace("{here}", str(folder)) in problem
        with pytest.raises(UserError) as refused:
            prepare(recipe, RunFolder(folder / "run"))
        assert str(refused.value) == problem
    assert not (folder / "run" / "data").exists()
    scores = recipe_of(folder).model_dump() | {"reward": {"objective": "scores", "max_length": 96}}
    (problem,) = check_data(Recipe.model_validate(scores))
    assert "data.votes: these are rows for the objective 'pairs'" in problem


@pytest.mark.thorough
def test_a_run_without_its_database_ends_with_2(folder):
    path = folder / "t.yaml"
    path.write_text(yaml.safe_dump(recipe_of(folder, "nowhere.db").model_dump(mode="json")))
    answer = rlhf_ray("doctor", str(path), "--run-dir", str(folder / "run"))
    assert answer.returncode == 2 and "data.votes: there is no database of votes at" in answer.stderr


def test_votes_by_name_or_as_a_section(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = build_recipe({"name": "t"}, ["data.votes=votes.db"], "t")
    assert short.data.votes is not None and short.data.votes.url == "votes.db" and not short.data.votes.is_url
    assert (("data", "votes", "url"), "votes.db") in list(path_fields(short))
    votes = resolve_paths(short.data).votes
    assert votes is not None and votes.url == str(tmp_path / "votes.db")
    remote = build_recipe({"name": "t"}, ["data.votes=postgresql://ann@host/votes"], "t")
    assert resolve_paths(remote.data) == remote.data and list(path_fields(remote)) == []
    votes = {"url": "v.db", "min_agreement": 0.7}
    section = build_recipe({"name": "t", "data": {"votes": votes}}, ["data.votes.since=2026-11-30"], "t")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(section.model_dump(mode="json")))
    assert load_recipe("again.yaml") == section and str(section.data.votes.since) == "2026-11-30"


@pytest.mark.parametrize(
    ("votes", "words"),
    [
        ("postgresql://ann:secret@host/votes", "holds a password, and the run folder keeps the recipe"),
        ("postgresql://ann@host/votes?password=secret", "holds a password"),
        ({"url": "v.db", "min_agreement": 70}, "'data.votes.min_agreement' is 70"),
        ({"url": "v.db", "rater": ["ann"]}, "unknown key 'data.votes.rater'; did you mean 'raters'?"),
        ({"url": "v.db", "since": "2026-12-01", "until": "2026-11-01"}, "give the days in order"),
        ({"raters": ["ann"]}, "'data.votes.url' is missing"),
    ],
)
def test_a_section_that_can_not_be_is_refused(votes, words):
    with pytest.raises(UserError) as refused:
        build_recipe({"name": "t", "data": {"votes": votes}}, [], "t")
    assert words in str(refused.value) and "secret" not in str(refused.value)

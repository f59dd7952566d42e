"""The data stage as a whole."""

import json
import re
import subprocess
import sys

import huggingface_hub
import pytest
from data_rows import CHATML, TEXT, USER, data_chat_tokenizer, data_tokenizer, limits_of, reply, write_jsonl  # noqa: F401 - fixtures
from datasets import Dataset
from transformers import GPT2Config

from rlhf_ray.config import Recipe, SourceConfig
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.data_problems import check_data
from rlhf_ray.data.formats import normalise
from rlhf_ray.data.prepare import prepare
from rlhf_ray.data.role_files import count_rows, read_prompts, read_role, write_role
from rlhf_ray.data.rules import Tally, apply_rules
from rlhf_ray.data.sources import load_source
from rlhf_ray.errors import UserError
from rlhf_ray.models.model_problems import check_model
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.runs.run_folder import RunFolder


def recipe_of(root, **data):
    return Recipe(
        name="t",
        model={"from_scratch": {"layers": 1, "width": 16, "heads": 2, "positions": 128, "vocab_size": 400}},
        data={"root": str(root), "max_prompt_tokens": 32, "holdout": 0.2} | data,
        sft={"max_length": 96},
        reward={"max_length": 96},
    )


@pytest.fixture
def pairs_file(tmp_path):
    rows = [{"prompt": f"Question {i}?", "chosen": f" good answer {i}", "rejected": f" bad {i}"} for i in range(60)]
    rows += [{"prompt": "Tie?", "chosen": "x", "rejected": "x"}, {"prompt": "Empty?", "chosen": "", "rejected": "x"}]
    return write_jsonl(tmp_path / "pairs.jsonl.gz", rows)


def test_prepare_from_one_file_of_pairs(tmp_path, pairs_file):
    recipe = recipe_of(tmp_path, sft=[{"path": "pairs.jsonl.gz"}], preferences=[{"path": "pairs.jsonl.gz"}])
    folders = [RunFolder(tmp_path / name) for name in ("run1", "run2")]
    summary = [prepare(recipe, folder) for folder in folders][0]
    assert summary["sources"]["preferences"] == [
        {"source": "pairs.jsonl.gz", "read": 62, "kept": 60, "dropped": {"empty_reply": 1, "tie": 1}, "cut": {}}
    ]
    assert (
        summary
        == json.loads((tmp_path / "run1" / "data" / "summary.json").read_text())
        == folders[0].stage("data").summary()
    )
    sets = {role: read_role(folders[0], role) for role in summary["roles"]}
    assert {role: rows.column_names for role, rows in sets.items()} == {
        "sft_train": ["prompt", "response"],
        "sft_eval": ["prompt", "response"],
        "reward_train": ["prompt", "chosen", "rejected"],
        "reward_eval": ["prompt", "chosen", "rejected"],
        "prompts": ["prompt"],
        "eval_prompts": ["prompt"],
    }
    assert {role: len(rows) for role, rows in sets.items()} == {role: s["rows"] for role, s in summary["roles"].items()}
    # What is evaluated was never trained on, in any role.
    held_out = set(sets["eval_prompts"]["prompt"])
    assert held_out == set(sets["reward_eval"]["prompt"]) and held_out
    for role in ("prompts", "sft_train", "reward_train"):
        assert not held_out & set(sets[role]["prompt"])
    for role in summary["roles"]:  # same recipe, same bytes
        assert folders[0].data(role).read_bytes() == folders[1].data(role).read_bytes()
    assert load_tokenizer(folders[0].tokenizer).pad_token_id != load_tokenizer(folders[0].tokenizer).eos_token_id


def test_a_finished_stage_is_not_run_again(tmp_path, pairs_file):
    recipe = recipe_of(tmp_path, sft=[{"path": "pairs.jsonl.gz"}], preferences=[{"path": "pairs.jsonl.gz"}])
    first = prepare(recipe, RunFolder(tmp_path / "run"))
    pairs_file.unlink()
    assert prepare(recipe, RunFolder(tmp_path / "run")) == first


def test_nothing_left_says_which_rule_dropped_how_many(tmp_path, pairs_file):
    write_jsonl(tmp_path / "ties.jsonl", [{"prompt": "a", "chosen": "x", "rejected": "x"}] * 3)
    recipe = recipe_of(tmp_path, sft=[{"path": "pairs.jsonl.gz"}], preferences=[{"path": "ties.jsonl"}])
    with pytest.raises(UserError, match=r"data.preferences\[0\]: of 3 rows none is left \(tie: 3\)"):
        prepare(recipe, RunFolder(tmp_path / "run"))


def test_where_no_turn_is_an_assistants_the_roles_are_named(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "model", "content": f"Ho {i}"}]}
        for i in range(3)
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    recipe = recipe_of(tmp_path, sft=[{"path": "a.jsonl"}], preferences=[{"path": "a.jsonl"}])
    with pytest.raises(
        UserError, match="a reply is a message of the role assistant, and the roles there are model, user$"
    ):
        prepare(recipe.model_copy(update={"reward": None}), RunFolder(tmp_path / "run"))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{% for m in messages %}{{ m.name.first }}{% endfor %}", "has no attribute 'name'"),
        ("{{ ''.__class__.__mro__ }}{% for m in messages %}{{ m.content }}{% endfor %}", "'__class__' of 'str' object is unsafe"),
    ],
)
def test_a_template_that_refuses_every_row_is_quoted(tmp_path, template, says):
    rows = [{"messages": [USER, reply(f"Fine {i}.")]} for i in range(3)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    recipe = recipe_of(tmp_path, sft=[{"path": "a.jsonl"}], preferences=[{"path": "a.jsonl"}])
    model = recipe.model.model_copy(update={"chat_template": template})
    with pytest.raises(UserError, match=r"none is left \(refused_by_template: 3\); the chat template says: .*" + re.escape(says)):
        prepare(recipe.model_copy(update={"reward": None, "model": model}), RunFolder(tmp_path / "run"))


def test_a_role_that_was_not_prepared_is_named(tmp_path):
    with pytest.raises(UserError, match="judge_train.parquet is not there"):
        read_role(RunFolder(tmp_path), "judge_train")


BUILDER = """
from datasets import Dataset
def build(root, seed, count=40):
    texts = {"prompt": [f"Say {i}" for i in range(count)], "response": [f" it is {i}" for i in range(count)]}
    scores = texts | {"score": [float(i % 7) for i in range(count)]}
    return {"sft": Dataset.from_dict(texts), "preferences": Dataset.from_dict(scores),
            "judge": Dataset.from_dict(scores), "preferences_eval_short": Dataset.from_dict(scores),
            "prompts": Dataset.from_dict({"prompt": [f"Say {i}" for i in range(count)]}),
            "eval_prompts": Dataset.from_dict({"prompt": ["Say 1", "Say more"]})}
def misnamed(root, seed):
    return {"sfd": Dataset.from_dict({"text": ["a"]})}
"""


@pytest.fixture
def builder_module(tmp_path, monkeypatch):
    (tmp_path / "my_builder.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_builder"
    sys.modules.pop("my_builder", None)


def test_prepare_with_a_builder_scores_and_a_judge(tmp_path, builder_module):
    recipe = recipe_of(tmp_path, builder="my_builder:build", builder_args={"count": 50})
    section = {"max_length": 96, "objective": "scores"}
    stages = {"fluency": {"max_length": 96}, "reward": section, "judge": section | {"base": "fluency"}}
    recipe = Recipe.model_validate(recipe.model_dump() | stages)
    assert check_data(recipe) == []
    summary = prepare(recipe, RunFolder(tmp_path / "run"))
    judge = read_role(RunFolder(tmp_path / "run"), "judge_train")
    assert judge.column_names == ["prompt", "response", "score"] and isinstance(judge[0]["score"], float)
    prompts = read_role(RunFolder(tmp_path / "run"), "prompts")["prompt"]
    assert "Say 1" not in prompts and len(prompts) == 49
    assert len(read_role(RunFolder(tmp_path / "run"), "reward_eval_short")) == 50
    assert summary["sources"]["prompts_not_in_eval"][0]["dropped"] == {"in_eval_prompts": 1}


def test_a_builders_mistakes_are_named(tmp_path, builder_module):
    with pytest.raises(UserError, match=r"returned a role 'sfd'.*did you mean 'sft'"):
        prepare(recipe_of(tmp_path, builder="my_builder:misnamed"), RunFolder(tmp_path / "run"))
    for changes, message in (
        ({"builder": "my_builder:biuld"}, "did you mean 'build'"),
        ({"builder": "no_such_module:build"}, "could not be imported"),
        ({"builder": "my_builder:build", "builder_args": {"counts": 3}}, "unexpected keyword argument 'counts'"),
        ({"builder": "my_builder:build", "sft": [{"path": "a.jsonl"}]}, "both set"),
    ):
        problems = check_data(recipe_of(tmp_path, **changes))
        assert len(problems) == 1 and message in problems[0]


def test_the_doctor_sees_every_data_problem_at_once(tmp_path, pairs_file):
    write_jsonl(tmp_path / "scored.jsonl", [{"prompt": "a", "response": "b", "score": 1}])
    recipe = recipe_of(
        tmp_path,
        sft=[{"path": "missing.jsonl"}, {"path": "pairs.jsonl.gz"}],
        preferences=[{"path": "scored.jsonl"}],
        prompts=[{"path": "pairs.jsonl.gz", "columns": {"prompt": "promt"}}],
    )
    problems = check_data(recipe)
    assert len(problems) == 3
    for problem, words in zip(problems, ("missing.jsonl", "objective: scores", "no column 'promt' for prompt"), strict=True):
        assert words in problem
    assert "not a folder" in check_data(recipe_of(tmp_path / "nowhere"))[0]
    assert len(check_data(recipe_of(tmp_path))) == 2  # no sft rows, no preferences
    assert not (tmp_path / "data").exists()


def test_a_hub_that_cannot_be_reached_is_said_in_words(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing.*data.root"):
        load_source(SourceConfig(path="nobody/nothing"), None, 0, "data.sft[0]", "sft")


def test_prompts_are_read_and_counted_without_the_library_of_data_sets(tmp_path):
    folder = RunFolder(tmp_path)
    write_role(folder, "prompts", [{"prompt": "a"}, {"prompt": "café\n"}, {"prompt": ""}], ("prompt",))
    code = (
        "import sys; from pathlib import Path; from rlhf_ray.data.role_files import count_rows, read_prompts\n"
        "from rlhf_ray.runs.run_folder import RunFolder; folder = RunFolder(Path(sys.argv[1]))\n"
        "assert read_prompts(folder) == ['a', 'café\\n', ''] and count_rows(folder, 'prompts') == 3\n"
        "assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for read in (read_prompts, count_rows):
        with pytest.raises(UserError, match="eval_prompts.parquet is not there .the run folder holds prompts"):
            read(folder, "eval_prompts")


def test_check_model_compares_lengths_with_positions(tmp_path, tokenizer):
    GPT2Config(n_positions=64).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    recipe = Recipe(name="t", model={"name_or_path": str(tmp_path)}, sft={"max_length": 64}, reward={"max_length": 80})
    problems = check_model(recipe)
    assert [problem.split(" ")[0] for problem in problems] == ["data.max_prompt_tokens", "reward.max_length"]
    assert "112 tokens is longer than the model's 64 positions" in problems[0]
    assert "there is no folder 'nobody/nothing' here" in check_model(recipe.model_copy(update={"model": recipe.model.model_copy(
        update={"name_or_path": "nobody/nothing"})}))[-1]  # fmt: skip


@pytest.mark.parametrize(
    "heads, keys, channels, gpus, says",
    [
        (28, 4, 18944, 4, None), (32, 8, 11008, 16, None),  # Qwen2.5-7B; two GPUs have a head of keys and values together
        (28, 4, 18944, 3, "28 heads, 4 of keys"), (6, 2, 4096, 4, "to 1 or 2"),  # heads
        (24, 6, 12288, 4, "to 1 or 2 or 3"),  # heads of keys and values
        (12, 4, 4096, 12, "to 1 or 2 or 4"),  # channels
    ],
)  # fmt: skip
def test_a_model_is_split_over_whole_heads(heads, keys, channels, gpus, says, tmp_path, tokenizer):
    """vLLM: heads and channels of the feed-forward divide by the GPUs; heads of keys and values by them, or they by these."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1,
              "hidden_size": 64 * heads, "intermediate_size": channels,
              "num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": 300}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(tmp_path)
    recipe = Recipe(name="t", model={"name_or_path": str(tmp_path)}, resources={"generation": {"gpus": gpus}},
                    generation={"engine": "vllm", "tensor_parallel": gpus})  # fmt: skip
    problems = check_model(recipe)
    assert bool(problems) == (says is not None)
    assert says is None or (f"tensor_parallel = {gpus} can't split" in problems[0] and says in problems[0])


def test_rows_read_back_are_the_rows_written(tmp_path, pairs_file):
    recipe = recipe_of(tmp_path, sft=[{"path": "pairs.jsonl.gz"}], preferences=[{"path": "pairs.jsonl.gz"}])
    prepare(recipe, RunFolder(tmp_path / "run"))
    rows = read_role(RunFolder(tmp_path / "run"), "reward_train")
    assert isinstance(rows, Dataset)
    for row in rows:
        number = row["prompt"].removeprefix("Question ").removesuffix("?")
        assert row == {
            "prompt": f"Question {number}?",
            "chosen": f" good answer {number}",
            "rejected": f" bad {number}",
        }


def test_a_row_that_the_template_refuses_is_dropped_and_counted(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    )
    system = {"role": "system", "content": "Be kind."}
    rows = [{"messages": [system, USER, reply("Fine.")]}, {"messages": [USER, reply("Fine.")]}]
    tally = Tally()
    normalised = normalise(rows, {"messages": "messages"}, "sft", ChatFormat(chat_tokenizer))
    assert len(apply_rules(normalised, "sft", limits_of(chat_tokenizer), tally)) == 1
    assert tally.dropped == {"refused_by_template": 1}


def test_prompts_of_preferences_without_a_reward_model(tmp_path, pairs_file):
    recipe = recipe_of(tmp_path, sft=[{"path": "pairs.jsonl.gz"}], preferences=[{"path": "pairs.jsonl.gz"}])
    changes = {"reward": None, "ppo": {"reward_function": "m:f", "critic_init": "sft"}}
    recipe = Recipe.model_validate(recipe.model_dump() | changes)
    assert check_data(recipe) == []
    summary = prepare(recipe, RunFolder(tmp_path / "run"))
    assert set(summary["roles"]) == {"sft_train", "sft_eval", "prompts", "eval_prompts"}
    assert summary["sources"]["preferences"][0]["kept"] == 62  # a tie or an empty reply is a prompt all the same


def test_dpo_gets_its_pairs_where_there_is_no_reward_model(tmp_path):
    rows = [
        {"prompt": f"Question {i}?", "chosen": " good", "rejected": " bad" * (1 + 40 * (i == 7))} for i in range(30)
    ]
    source = [{"path": write_jsonl(tmp_path / "pairs.jsonl", rows).name}]
    values = recipe_of(tmp_path, sft=source, preferences=source).model_dump()
    values |= {"reward": None, "ppo": {"reward_function": "a:b", "critic_init": "sft"}}
    with_dpo = values | {"dpo": {"max_length": 12}}
    summary = prepare(Recipe.model_validate(with_dpo), RunFolder(tmp_path / "run"))
    pairs = read_role(RunFolder(tmp_path / "run"), "reward_train")
    assert pairs.column_names == ["prompt", "chosen", "rejected"]
    assert summary["sources"]["preferences"][0]["dropped"] == {"over_long": 1}  # the one reply of more than 12 tokens
    assert "reward_train" not in prepare(Recipe.model_validate(values), RunFolder(tmp_path / "none"))["roles"]
    empty = with_dpo | {"data": values["data"] | {"preferences": ()}}
    assert check_data(Recipe.model_validate(empty)) == [
        "'dpo' is set and data.preferences is empty; give it rows, or set dpo: null"
    ]
    write_jsonl(tmp_path / "scored.jsonl", [{"prompt": "a", "response": "b", "score": 1}])
    scored = with_dpo | {"data": values["data"] | {"preferences": ({"path": "scored.jsonl"},)}}
    (problem,) = check_data(Recipe.model_validate(scored))
    assert "or give pairs, which DPO needs" in problem


def test_a_long_plain_text_stays_and_is_counted_unless_it_is_packed(tokenizer):
    for plain_text, kept, cut, dropped in (
        ("trainer_cuts", 2, {"text": 1}, {}),
        ("packed", 2, {}, {}),
        ("dropped", 1, {}, {"over_long": 1}),
    ):
        rows = [{"prompt": "", "response": text, "messages": None} for text in (TEXT * 9, "the cat")]
        tally = Tally()
        assert len(apply_rules(rows, "sft", limits_of(tokenizer, plain_text=plain_text), tally)) == kept
        assert (tally.cut, tally.dropped) == (cut, dropped)

"""Functions, judges and other people's reward models get the prompt that the data holds; people see turns, not templates."""

import json

import numpy as np
import pytest
from chat_models import KINDS, chat_tokenizer
from crossed import crossed
from test_chat_ends import Seen, language_model
from tiny import tiny_recipe
from transformers import AutoTokenizer

from rlhf_ray.config.columns import column_problems
from rlhf_ray.data.data_problems import check_data
from rlhf_ray.data.prepare import prepare
from rlhf_ray.data.role_files import read_prompt_columns, read_prompts, read_role, write_role
from rlhf_ray.data.tokens import encode_prompts
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.samples import Responses, write_samples
from rlhf_ray.messages import Chunk, RolloutBatch, Sequences
from rlhf_ray.models.load import build_reward_model, load_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.report.models import asked
from rlhf_ray.report.page import render
from rlhf_ray.rewards.isolated_function import IsolatedFunction
from rlhf_ray.rewards.scorer import FunctionScorer, RewardScorer
from rlhf_ray.roles.reward import Reward
from rlhf_ray.roles.rollout_text import response_text
from rlhf_ray.runs.run_folder import RunFolder

PROMPTS = [f"{start} number {i}" for i, start in enumerate(
    ["Two", " space before", "cafe\u0301", "\u212b ﬁ Ⅷ", "<|im_end|> </s> <eos>", "漢字 🙂", "a  b\n\n  c", "[INST] x"] * 3
)]  # fmt: skip
GOT: list = []


def note(prompts, responses):
    GOT.append((prompts, responses))
    return [0.0] * len(prompts)


def note_chat(prompts, responses, *, messages):
    GOT.append((prompts, messages))
    return [0.0] * len(prompts)


def a_run(tmp_path, name, kind, rows, function="note", **data):
    """A prepared run folder whose policy has that tokenizer, and its recipe."""
    start = tmp_path / "start"
    chat_tokenizer(name, kind).save_pretrained(start)
    policy = language_model(load_tokenizer(start), tmp_path / "policy")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe(
        model={"name_or_path": str(policy)}, sft=None, reward=None,
        ppo={"reward_function": f"test_stored_prompts:{function}", "critic_init": "sft"},
        data={"prompts": [{"path": str(tmp_path / "rows.jsonl")}], "holdout": 0.2, "max_prompt_tokens": 160} | data,
    )  # fmt: skip
    folder = RunFolder(tmp_path / "run")
    prepare(recipe, folder)
    return recipe, folder, policy


def rollout_of(folder, policy, texts, ended=True):
    """The policy's answers to all training prompts."""
    tokenizer = load_tokenizer(policy)
    prompts = read_prompts(folder)
    heads = [np.array(ids) for ids in encode_prompts(tokenizer, prompts)]
    answers = [np.array(tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * ended) for text in texts]
    answers = [answers[place % len(answers)] for place in range(len(prompts))]
    places = tuple(range(len(prompts)))
    sequences = Sequences.of(heads, answers)
    return RolloutBatch(
        chunk=Chunk(step=0, index=0, prompt_indices=places, sample_indices=(0,) * len(places)), policy_version=0,
        sequences=sequences, rollout_logprobs=np.zeros(len(sequences.response_ids), np.float32),
        ended=np.array([ended] * len(places)),
    )  # fmt: skip


def columns_of(folder):
    return read_prompt_columns(folder), read_prompt_columns(folder, "eval_prompts")


@crossed("kind, name", KINDS, ["base", "llama 2", "gemma"])
def test_a_function_gets_the_prompt_that_the_data_holds(name, kind, tmp_path):
    recipe, folder, policy = a_run(tmp_path, name, kind, [{"prompt": text} for text in PROMPTS])
    held = {*(row["prompt"] for row in json.loads("[" + ",".join((tmp_path / "rows.jsonl").read_text().splitlines()) + "]"))}
    assert held == set(PROMPTS)
    rollout = rollout_of(folder, policy, ["fine"])
    GOT.clear()
    Reward(FunctionScorer(recipe.ppo.reward_function), policy, columns=columns_of(folder)).score(rollout)
    ((prompts, _),) = GOT
    assert len(prompts) > 10 and set(prompts) <= held
    tokenizer = load_tokenizer(policy)
    decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rollout.sequences.prompts()]
    if kind != "bytes":
        assert decoded != prompts, "the case needs a tokenizer that does not give texts back"


def test_a_function_in_its_own_process_gets_it_too(tmp_path, monkeypatch):
    _, folder, policy = a_run(tmp_path, "llama 2", "legacy pieces", [{"prompt": text} for text in PROMPTS])
    (tmp_path / "known_prompts.py").write_text(
        f"HELD = set({PROMPTS!r})\ndef known(prompts, responses):\n    return [float(prompts[0] in HELD)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    scorer = IsolatedFunction("known_prompts:known", timeout_s=60.0, timeout_score=None, keys=("limit", "score"))
    try:
        found = Reward(scorer, policy, columns=columns_of(folder)).score(rollout_of(folder, policy, ["fine"]))
    finally:
        scorer.close()
    assert (found.total == 1.0).all()


CHATS = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Question <|im_end|> {i}?"}] for i in range(16)]


@pytest.mark.parametrize("name", ["chatml", "llama 3", "llama 2"])
def test_a_function_gets_a_templates_text_whole_and_the_messages(name, tmp_path):
    """The template's own BOS is part of the text; the messages are those of the data."""
    recipe, folder, policy = a_run(tmp_path, name, "bytes", [{"messages": chat} for chat in CHATS], "note_chat")
    assert check_data(recipe) == []
    GOT.clear()
    role = Reward(FunctionScorer(recipe.ppo.reward_function), policy, columns=columns_of(folder))
    rollout = rollout_of(folder, policy, ["fine"])
    role.score(rollout)
    ((prompts, messages),) = GOT
    tokenizer = AutoTokenizer.from_pretrained(policy)
    for prompt, chat in zip(prompts, messages, strict=True):
        assert chat in CHATS
        assert prompt == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert role.texts(rollout, 2) == [(chat[-1]["content"], "fine") for chat in messages[:2]]


def test_plain_prompts_have_no_messages(tmp_path):
    with pytest.raises(UserError, match="asks for the column 'messages', but data.prompts has no column"):
        a_run(tmp_path, "base", "bytes", [{"prompt": text} for text in PROMPTS], "note_chat")


def test_the_datas_own_column_of_that_name_stays(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"Hi {i}"}], "columns": {"messages": i}, "messages": [1]} for i in range(2)]
    rows = [row | {"prompt": "text"} for row in rows]
    write_role(RunFolder(tmp_path), "prompts", rows, ("prompt",))
    assert read_prompt_columns(RunFolder(tmp_path)).of([1, 0]) == {"messages": [1, 0]}
    assert read_prompt_columns(RunFolder(tmp_path)).messages([0]) == [None]
    assert column_problems(tiny_recipe(), [], "x") == []


@pytest.mark.parametrize("name, kind", [("llama 2", "pieces"), ("llama 2", "legacy pieces"), ("chatml, other eos", "unigram")])
def test_a_reward_model_with_another_tokenizer_reads_the_stored_text(name, kind, tmp_path):
    """It scores the ids that it would be trained on: those of the same text, as its own tokenizer encodes it."""
    rows = [{"messages": chat} for chat in CHATS]
    _, folder, policy = a_run(tmp_path, "gemma", "bytes", [{"prompt": row["messages"][1:]} for row in rows])
    chat_tokenizer(name, kind).save_pretrained(tmp_path / "other tokenizer")
    other = load_tokenizer(tmp_path / "other tokenizer")
    body = language_model(other, tmp_path / "other body")
    save_model(build_reward_model(load_causal_lm(body), other, seed=1), other, tmp_path / "other", "tiny")
    scorer = RewardScorer(tmp_path / "other")
    seen = Seen(scorer)
    Reward(scorer, policy, columns=columns_of(folder)).score(rollout_of(folder, policy, ["Seven apples."]))
    plain = AutoTokenizer.from_pretrained(tmp_path / "other tokenizer")
    opening = [plain.bos_token_id] if plain.bos_token else []
    names = {"<|im_end|>", "<|im_start|>", "<|endoftext|>", "</s>", "<s>", "<bos>"}
    for ids, prompt in zip(seen.rows, read_role(folder, "prompts")["prompt"], strict=True):
        text = prompt.replace("\ufdd0", "")
        head = plain(text, add_special_tokens=False, split_special_tokens=True).input_ids
        tail = plain("Seven apples.", add_special_tokens=False).input_ids
        assert any(one in text for one in names)
        if kind != "unigram":  # whose split_special_tokens finds the pieces that are named like special tokens
            assert ids == [*opening, *head, *tail, plain.eos_token_id]
        assert ids.count(plain.eos_token_id) == 1


# -- what people see --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["fine 🙂", "漢字", "é", "naïve 🙂🙂"])
def test_a_cut_character_is_left_out(text):
    tokenizer = chat_tokenizer("base")
    ids = np.array([tokenizer.convert_tokens_to_ids(one) for letter in text for one in tokenizer.tokenize(letter)])
    for size in range(len(ids) + 1):
        found = response_text(tokenizer, ids[:size])
        assert "\ufffd" not in found and text.startswith(found)
    assert response_text(tokenizer, ids) == text


def test_samples_show_turns_by_role(tmp_path):
    folder = RunFolder(tmp_path)
    drawn = Responses(
        prompt_ids=[np.array([1])] * 2, response_ids=[np.array([2])] * 2, texts=["one", "two"], ended=np.array([True] * 2)
    )
    chats = [[CHATS[0][0], {"role": "user", "content": f"<b>Question</b> {i}"}] for i in range(2)]
    scores = {"sft": {"score": np.zeros(2)}, "ppo": {"score": np.zeros(2)}}
    folder.stage("evaluation").path.mkdir(parents=True)
    path = folder.stage("evaluation").path / "samples.jsonl"
    raw = [f"<|im_start|>raw {i}" for i in range(2)]
    write_samples(path, raw, chats, [0], {"sft": drawn, "ppo": drawn}, scores)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [asked(row) for row in rows] == ["<b>Question</b> 0", "<b>Question</b> 1"]
    assert [row["prompt"] for row in rows] == raw
    page = render(folder)
    assert "im_start" not in page and page.count("Be kind.") == 1 and "(as above)" in page
    assert "&lt;b&gt;Question&lt;/b&gt; 1" in page and page.count("<b>User</b>") == 2 and page.count("<b>System</b>") == 2
    write_samples(path, raw, [None, None], [0], {"sft": drawn, "ppo": drawn}, scores)
    assert "im_start" in render(folder)
    assert asked(json.loads(path.read_text().splitlines()[0])) == raw[0]

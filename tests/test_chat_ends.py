"""Which token ends a reply: one per reply, the same in training, generation, scoring and the saved model."""

import json

import numpy as np
import pytest
import torch
from chat_models import KINDS, MODELS, chat_tokenizer, saved_tokenizer
from crossed import crossed
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.formats import normalise
from rlhf_ray.data.tokens import encode_prompt
from rlhf_ray.generation.engine import GenerationEngine
from rlhf_ray.messages import Chunk, RolloutBatch, Scores, Sequences
from rlhf_ray.models.chat_shape import chat_shape, end_ids
from rlhf_ray.models.load import build_reward_model, load_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.rewards.scorer import EnsembleScorer, RewardScorer, WeightedSum, WeightedTerm
from rlhf_ray.roles.reward import Reward
from rlhf_ray.serving.config import EngineOptions, Limits
from rlhf_ray.serving.loading import load
from rlhf_ray.supervised.rows import dpo_rows, pair_rows, score_rows, sft_rows

#: name -> what ends a reply to a prompt of the template
ENDS = {
    "chatml": "<|im_end|>", "chatml, pad is eos": "<|im_end|>", "chatml, other eos": "<|im_end|>", "llama 3": "<|eot_id|>",
    "gemma": "<end_of_turn>", "llama 2": "</s>", "thinking": "<|end|>", "lowered": "<|done|>",
}  # fmt: skip
QUESTION = [{"role": "user", "content": "How many apples are there?"}]


def reply(content):
    return [{"role": "assistant", "content": content}]


def loaded(name, folder, kind="bytes", ends=None):
    return load_tokenizer(saved_tokenizer(name, folder, kind, ends))


def language_model(tokenizer, folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return save_model(LlamaForCausalLM(config), tokenizer, folder, "tiny")


@pytest.mark.parametrize("name", ENDS)
def test_the_templates_end_of_a_turn_is_found(name):
    tokenizer = chat_tokenizer(name)
    assert chat_shape(tokenizer).end == ENDS[name]
    assert set(tokenizer.convert_ids_to_tokens(list(end_ids(tokenizer)))) == {tokenizer.eos_token, ENDS[name]}


def test_a_tokenizer_without_template_has_one_end():
    tokenizer = chat_tokenizer("base")
    assert end_ids(tokenizer) == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("name", MODELS)
def test_pad_ends_no_response(name, tmp_path):
    tokenizer = loaded(name, tmp_path, ends=None if name != "chatml" else ["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.pad_token_id not in end_ids(tokenizer)


@crossed("kind, name", KINDS, list(ENDS))
def test_a_reply_has_one_closing_token_in_every_kind_of_row(name, kind, tmp_path):
    """The prompt's ids are those of apply_chat_template, and the reply ends with what the template writes behind it."""
    tokenizer = loaded(name, tmp_path, kind)
    end = tokenizer.convert_tokens_to_ids(ENDS[name])
    chat = ChatFormat(tokenizer)
    raw = {"prompt": QUESTION, "chosen": reply("Seven apples."), "rejected": reply("None.")}
    (pair,) = normalise([raw], {column: column for column in raw}, "pairs", chat)
    rows = Dataset.from_list([pair | {"response": pair["chosen"], "score": 1.0, "messages": None, "columns": None}])
    head = tokenizer.apply_chat_template(QUESTION, tokenize=True, add_generation_prompt=True, return_dict=False)
    if tokenizer.bos_token is not None and head[0] != tokenizer.bos_token_id:
        head = [tokenizer.bos_token_id, *head]
    pairs = pair_rows(tokenizer, rows, max_length=128).dataset[0]
    sft, scored, dpo = (make(tokenizer, rows, max_length=128).dataset[0] for make in (sft_rows, score_rows, dpo_rows))
    for ids in (pairs["chosen_ids"], pairs["rejected_ids"], sft["input_ids"], scored["input_ids"]):
        assert ids[: len(head)] == head
        assert ids[-1] == end and not set(end_ids(tokenizer)) & set(ids[len(head) : -1])
    assert sft["labels"][len(head) :] == sft["input_ids"][len(head) :] and set(sft["labels"][: len(head)]) == {-100}
    assert dpo["prompt_ids"] == head and dpo["chosen_ids"] == pairs["chosen_ids"][len(head) :]
    text = tokenizer.decode(pairs["chosen_ids"][len(head) : -1])
    assert text.strip().lower() == "seven apples."


class Seen:
    """A reward model's pass that notes what it reads."""

    def __init__(self, scorer):
        self.rows = []
        scorer._raw = self.raw

    def raw(self, token_ids):
        self.rows += token_ids
        return np.arange(len(token_ids), dtype=np.float32)


@crossed("kind, name", KINDS, list(MODELS))
def test_the_ids_scored_in_ppo_are_those_trained_on(name, kind, tmp_path):
    """A policy that draws exactly a training row's reply: alone, in an ensemble, in a weighted sum."""
    tokenizer = loaded(name, tmp_path / "tokenizer", kind)
    policy = language_model(tokenizer, tmp_path / "policy")
    save_model(build_reward_model(load_causal_lm(policy), tokenizer, seed=1), tokenizer, tmp_path / "reward", "tiny")
    chat = ChatFormat(tokenizer)
    prompts = [chat.prompt(QUESTION), chat.prompt([{"role": "user", "content": "naïve cafe\u0301 <|im_end|> </s>"}]), "plain text"]
    replies = ["Seven apples.", "None.\n\nAt all 🙂", "  two  spaces"]
    table = Dataset.from_dict({"prompt": prompts, "chosen": replies, "rejected": ["no"] * len(replies)})
    trained = pair_rows(tokenizer, table, max_length=200).dataset["chosen_ids"]
    heads = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    assert all(row[: len(head)] == head for row, head in zip(trained, heads, strict=True))
    scorer = RewardScorer(tmp_path / "reward")
    seen = Seen(scorer)
    several = WeightedSum({"all": WeightedTerm(1.0, EnsembleScorer([scorer, scorer], combine="mean", std=1.0))})
    rollout = RolloutBatch(
        chunk=Chunk(step=0, index=0, prompt_indices=(0, 1, 2), sample_indices=(0, 0, 0)), policy_version=0,
        sequences=Sequences.of(
            [np.array(head) for head in heads],
            [np.array(row[len(head) :]) for row, head in zip(trained, heads, strict=True)],
        ),
        rollout_logprobs=np.zeros(sum(len(row) - len(head) for row, head in zip(trained, heads, strict=True)), np.float32),
        ended=np.array([True, True, True]),
    )  # fmt: skip
    for one in (scorer, several):
        assert isinstance(Reward(one, policy).score(rollout), Scores)
    assert seen.rows == [*trained] * 3


def test_a_stop_string_is_closed_as_a_whole_reply_is(tmp_path):
    tokenizer = loaded("chatml, other eos", tmp_path / "tokenizer")
    policy = language_model(tokenizer, tmp_path / "policy")
    save_model(build_reward_model(load_causal_lm(policy), tokenizer, seed=1), tokenizer, tmp_path / "reward", "tiny")
    prompts = [ChatFormat(tokenizer).prompt(QUESTION), "plain text"]
    heads = [np.array(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    drawn = np.array(tokenizer("Seven apples.\n\nHuman: x").input_ids)
    rollout = RolloutBatch(
        chunk=Chunk(step=0, index=0, prompt_indices=(0, 1), sample_indices=(0, 0)), policy_version=0,
        sequences=Sequences.of(heads, [drawn, drawn]), rollout_logprobs=np.zeros(2 * len(drawn), np.float32),
        ended=np.array([True, True]),
    )  # fmt: skip
    scorer = RewardScorer(tmp_path / "reward")
    seen = Seen(scorer)
    Reward(scorer, policy, stop=("\n\nHuman:",)).score(rollout)
    answer = tokenizer("Seven apples.").input_ids
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert seen.rows == [[*head.tolist(), *answer, end] for head, end in zip(heads, ends, strict=True)]


def test_a_reply_that_another_end_token_ended_is_scored_with_the_one_that_rewards_are_trained_on(tmp_path):
    """Llama 3's models end with <|end_of_text|> now and then, where a training row ends with <|eot_id|>."""
    tokenizer = loaded("llama 3", tmp_path / "tokenizer")
    policy = language_model(tokenizer, tmp_path / "policy")
    save_model(build_reward_model(load_causal_lm(policy), tokenizer, seed=1), tokenizer, tmp_path / "reward", "tiny")
    head = np.array(encode_prompt(tokenizer, ChatFormat(tokenizer).prompt(QUESTION)))
    answer, ends = tokenizer("Seven apples.", add_special_tokens=False).input_ids, end_ids(tokenizer)
    assert len(ends) == 2
    rollout = RolloutBatch(
        chunk=Chunk(step=0, index=0, prompt_indices=(0, 0), sample_indices=(0, 1)), policy_version=0,
        sequences=Sequences.of([head, head], [np.array([*answer, end]) for end in ends]),
        rollout_logprobs=np.zeros(2 * len(answer) + 2, np.float32), ended=np.array([True, True]),
    )  # fmt: skip
    scorer = RewardScorer(tmp_path / "reward")
    seen = Seen(scorer)
    Reward(scorer, policy).score(rollout)
    assert seen.rows == [[*head.tolist(), *answer, tokenizer.convert_tokens_to_ids("<|eot_id|>")]] * 2


# -- several end tokens -----------------------------------------------------------------------------------------------


@pytest.fixture
def two_ends(tmp_path):
    """A base model whose generation_config names a second end token."""
    tokenizer = chat_tokenizer("chatml, other eos")
    tokenizer.chat_template = None
    folder = language_model(tokenizer, tmp_path / "model")
    values = json.loads((folder / "generation_config.json").read_text())
    both = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    (folder / "generation_config.json").write_text(json.dumps(values | {"eos_token_id": both}))
    return folder, both


def only(model, token):
    """The model draws this token and no other."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 1.0
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(1.0)
    return model


def test_each_of_them_ends_a_response(two_ends):
    folder, both = two_ends
    tokenizer = load_tokenizer(folder)
    assert set(end_ids(tokenizer)) == set(both)
    for token in both:
        engine = GenerationEngine(only(load_causal_lm(folder), token), tokenizer)
        (drawn,) = engine.generate([[5, 6]], [0], SamplingParams(max_new_tokens=9, temperature=0.0))
        assert drawn.response_ids.tolist() == [token] and drawn.finish_reason == "eos"
    runner, _ = load(EngineOptions(model=str(folder), precision="float32"), Limits())
    assert set(runner.engine.eos_token_ids) == set(both)
    runner.close()


def test_they_stay_with_tokenizer_and_model_wherever_they_are_saved(two_ends, tmp_path):
    folder, both = two_ends
    load_tokenizer(folder).save_pretrained(tmp_path / "data")  # as the data stage does
    tokenizer = load_tokenizer(tmp_path / "data")
    assert set(end_ids(tokenizer)) == set(both)
    saved = save_model(load_causal_lm(folder), tokenizer, tmp_path / "again", "tiny")
    assert set(AutoModelForCausalLM.from_pretrained(saved).generation_config.eos_token_id) == set(both)
    reward = build_reward_model(load_causal_lm(folder), tokenizer, seed=1)
    save_model(reward, tokenizer, tmp_path / "reward", "tiny")
    assert set(end_ids(load_tokenizer(tmp_path / "reward"))) == set(both)


def test_a_list_that_only_the_model_knows_is_not_cut(two_ends, tmp_path):
    folder, both = two_ends
    plain = chat_tokenizer("base")
    model = load_causal_lm(folder)
    model.generation_config.eos_token_id = [plain.eos_token_id, 7]
    saved = save_model(model, plain, tmp_path / "again", "tiny")
    assert AutoModelForCausalLM.from_pretrained(saved).generation_config.eos_token_id == [plain.eos_token_id, 7]


def test_a_number_that_may_be_a_configs_default_ends_nothing(tmp_path):
    folder = saved_tokenizer("base", tmp_path)
    tokenizer = load_tokenizer(folder)
    letter = tokenizer.convert_tokens_to_ids("e")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": letter}))
    assert end_ids(load_tokenizer(folder)) == (tokenizer.eos_token_id,)


def test_generation_ends_at_the_templates_end_of_a_turn(tmp_path):
    """generation_config knows EOS alone, as that of a base model with a template does."""
    folder = language_model(loaded("chatml, other eos", tmp_path / "tokenizer"), tmp_path / "model")
    (folder / "generation_config.json").write_text("{}")
    tokenizer = load_tokenizer(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    engine = GenerationEngine(only(load_causal_lm(folder), end), tokenizer)
    (drawn,) = engine.generate([[5, 6]], [0], SamplingParams(max_new_tokens=9, temperature=0.0))
    assert drawn.response_ids.tolist() == [end] and drawn.finish_reason == "eos"


# -- replies under templates that render them otherwise ------------------------------------------------------------------


@pytest.mark.parametrize("content, expected", [
    ("Seven.", "Seven."), ("<think>\nCount.\n</think>\n\nSeven.", "Count.\n</think>\n\nSeven."), ("  Seven. ", "  Seven."),
])  # fmt: skip
def test_reasoning_that_the_prompt_opens_is_not_opened_twice(content, expected):
    chat = ChatFormat(chat_tokenizer("thinking"))
    assert chat.prompt(QUESTION).endswith("<|assistant|><think>\n")
    assert chat.reply(QUESTION, reply(content)) == expected

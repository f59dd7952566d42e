"""A reward model behind /get_reward: scores are transformers' own, of prompt, response and EOS."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest
import torch
from served_app import TEXTS
from transformers import AutoModelForSequenceClassification

from rlhf_ray.config import FromScratch, ModelConfig
from rlhf_ray.errors import UserError
from rlhf_ray.models.load import build_causal_lm, build_reward_model
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import load_tokenizer, train_tokenizer
from rlhf_ray.rewards.scorer import RewardScorer
from rlhf_ray.serving.config import Limits
from rlhf_ray.serving.model_folder import find_reward_model
from rlhf_ray.serving.reward_app import RewardRunner, build_reward_routes
from rlhf_ray.serving.served import served_reward_model

PROMPTS, RESPONSES = ["the cat", "the dog sat", "then"], [" sat on the mat", " on the log", " they both slept"]
LIMITS = Limits(max_rows=4, max_waiting_rows=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = train_tokenizer(TEXTS, 320)
    shape = FromScratch(layers=2, width=32, heads=2, positions=96, vocab_size=320)
    model = build_reward_model(build_causal_lm(ModelConfig(from_scratch=shape), tokenizer, seed=0), tokenizer, seed=0)
    with torch.no_grad():
        model.score.weight.normal_()
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    return save_model(model, tokenizer, tmp_path_factory.mktemp("run") / "reward" / "model", "tiny")


@pytest.fixture(scope="module")
def expected(folder):
    """[3], one row at a time, in float64."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).double().eval(), load_tokenizer(folder)
    scores = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = [*tokenizer(prompt).input_ids, *tokenizer(response).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            scores.append(float(model(torch.tensor([ids])).logits[0, 0]))
    return (np.array(scores) - 0.5) / 2.0


def ask(folder, *bodies, limits=LIMITS, **more):
    app = build_reward_routes(RewardRunner(RewardScorer(folder), str(folder), limits), "reward")

    async def inside():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await asyncio.gather(*(client.post("/get_reward", json=body, **more) for body in bodies))

    return asyncio.run(inside())


def test_scores_of_queries_with_their_prompts(folder, expected):
    queries = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    eos = load_tokenizer(folder).eos_token
    plain, with_eos = ask(
        folder, {"query": queries, "prompts": PROMPTS, "labels": ["", None, "x"]},
        {"query": [query + eos for query in queries], "prompts": PROMPTS, "of_a_later_version": 1},
    )  # fmt: skip
    np.testing.assert_allclose(plain.json()["rewards"], expected, atol=1e-5)
    assert with_eos.json() == plain.json()


def test_an_answer_that_did_not_end_is_scored_without_its_end(folder, expected):
    body = {"query": [PROMPTS[0] + RESPONSES[0]], "prompts": PROMPTS[:1]}
    (open_, ended) = ask(folder, body | {"ended": [False]}, body | {"ended": [True]})
    assert abs(open_.json()["rewards"][0] - expected[0]) > 1e-3
    np.testing.assert_allclose(ended.json()["rewards"], expected[:1], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "query"), ({"query": "text"}, "query"), ({"query": [1]}, "query"), ([], "object"),
        ({"query": ["a"], "prompts": []}, "prompts has 0 entries"), ({"query": ["a"] * 9}, "at most 8"),
    ],
)  # fmt: skip
def test_what_is_refused(folder, body, words):
    (answer,) = ask(folder, body)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_no_queries_have_no_rewards_and_too_many_at_once_are_told_to_wait(folder):
    (none,) = ask(folder, {"query": []})
    assert none.json() == {"rewards": []}
    answers = ask(folder, *[{"query": ["a"] * 4}] * 4)
    assert sorted({answer.status_code for answer in answers}) == [200, 429]


def test_which_folder(folder, tmp_path):
    assert find_reward_model(folder.parents[1]) == find_reward_model(folder) == folder
    (model,) = served_reward_model(folder.parents[1], None)
    assert model.folder == folder and model.version().id == model.version().id
    with pytest.raises(UserError, match="holds no reward model"):
        find_reward_model(tmp_path)

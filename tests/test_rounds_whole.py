"""A round from votes to decision without Ray: the real data stage, PPO in one process, the real evaluation; tiny models."""

import json
import math

import pytest
import torch
from fake_rounds import new_votes
from tiny import tiny_recipe, write_start
from transformers import AutoModelForSequenceClassification

from rlhf_ray.algorithms.intervals import wilson
from rlhf_ray.data.prepare import prepare
from rlhf_ray.data.role_files import read_prompts, read_role
from rlhf_ray.evaluation.evaluate import evaluate
from rlhf_ray.evaluation.outcome import read_summary
from rlhf_ray.models.load import build_reward_model, load_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.ppo.single_process import SingleProcessPPO
from rlhf_ray.rounds.making import make_round
from rlhf_ray.runs.resume import write_recipe
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.votes.database import Database
from rlhf_ray.votes.reading import held_out_prompts


def stages(recipe, path):
    """What `rlhf-ray run` does for a round, on one process, with an untrained reward model and two steps of PPO."""
    folder = RunFolder(path)
    write_recipe(recipe, folder.recipe)
    prepare(recipe, folder)
    tokenizer = load_tokenizer(folder.tokenizer)
    reward = build_reward_model(load_causal_lm(recipe.reward.base), tokenizer, seed=3)
    reward.config.reward_mean, reward.config.reward_std = 0.0, 1.0
    for name in ("reward", "ppo"):
        folder.stage(name).path.mkdir()
    save_model(reward, tokenizer, folder.stage("reward").model, "untrained")
    folder.stage("reward").finish({"steps": 1, "planned_steps": 1, "accuracy": 0.5, "pairs": 4})
    single = SingleProcessPPO(recipe, folder)
    for step in range(2):
        single.step(step)
    save_model(single.policy.model, tokenizer, folder.stage("ppo").model, "two steps")
    folder.stage("ppo").finish({"steps": 2})
    evaluate(recipe, folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rounds = {"least_held_out": 3, "reference": "first"}
    recipe = tiny_recipe(rounds=rounds, evaluation={"prompts": 8, "bootstrap": 200, "seeds": (0,)}, ppo={"steps": 2})
    run = write_start(recipe, RunFolder(tmp_path_factory.mktemp("rounds") / "run"))
    write_recipe(recipe, run.recipe)
    policy = load_causal_lm(run.stage("sft").model)
    with torch.no_grad():
        policy.transformer.wte.weight *= 1.5
    run.stage("ppo").path.mkdir()
    save_model(policy, load_tokenizer(run.stage("sft").model), run.stage("ppo").model, "round 1")
    for name in ("data", "ppo"):
        run.stage(name).finish({"steps": 2})
    return run


def test_a_round_from_votes_to_its_decision(run, tmp_path):
    url = str(tmp_path / "votes.db")
    new_votes(url, 40)
    made = make_round(run.path, url, ["ppo.kl_coef=0.01"], train=stages, say=lambda line: None)
    database = Database(url)
    asked = set(held_out_prompts(database))
    database.close()
    # Held-out prompts are asked, and train nothing.
    assert set(read_prompts(made.folder, "eval_prompts")) >= asked and not set(read_prompts(made.folder)) & asked
    assert set(read_role(made.folder, "reward_eval_votes")["prompt"]) == asked
    summary, outcome = read_summary(made.folder.stage("evaluation").path), made.outcome()
    assert summary["prompts"] == 8 and summary["names"]["has_sft"] is False
    # How often the reward model agrees with the held-out votes, by transformers.
    right = [score > other for score, other in zip(*scores_of(made.folder), strict=True)]
    share = sum(right) / len(right)
    assert summary["held_out_votes"]["pairs"] == len(asked) == len(right)
    assert outcome.verdict.accuracy is not None and outcome.verdict.accuracy.mean == pytest.approx(share)
    assert outcome.verdict.accuracy.low == pytest.approx(wilson(share, len(right))[0])
    assert outcome.verdict.measured_on == "held-out votes" and outcome.verdict.scorer == "reward_model"
    # The decision follows from the two by hand.
    rate = summary["win_rate"]["reward_model"]
    low = outcome.verdict.accuracy.low
    better = low > 0.5 and 0.5 + (2 * low - 1) * (rate["low"] - 0.5) > 0.5
    assert outcome.verdict.better == better and outcome.starts_from == str(run.stage("ppo").model)
    # One vote per comparison here.
    assert (outcome.votes.train + outcome.votes.held_out, outcome.votes.held_out, outcome.votes.new) == (40, len(asked), 40)
    assert json.loads((made.folder.path / "data" / "summary.json").read_text())["votes"]["newest"] == outcome.votes.newest
    assert math.isfinite(summary["kl"])


def scores_of(folder):
    """Raw scores of the held-out votes' chosen and rejected answers, each read at its EOS."""
    tokenizer = load_tokenizer(folder.stage("reward").model)
    model = AutoModelForSequenceClassification.from_pretrained(folder.stage("reward").model).eval()
    rows = read_role(folder, "reward_eval_votes")

    def score(prompt, answer):
        ids = [*tokenizer(prompt).input_ids, *tokenizer(answer).input_ids, tokenizer.eos_token_id]
        return float(model(torch.tensor([ids])).logits)

    with torch.no_grad():
        return [[score(row["prompt"], row[side]) for row in rows] for side in ("chosen", "rejected")]

"""Perplexity of text that nothing trains on: what tuning cost elsewhere."""

import json
import math

import pytest
import torch
from served_app import save_tiny
from test_evaluation import recipe, run_folder  # noqa: F401 - a fixture

from rlhf_ray.config import Recipe
from rlhf_ray.data.prepare import prepare
from rlhf_ray.data.role_files import read_role, write_role
from rlhf_ray.evaluation.evaluate import evaluate
from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.runs.run_folder import RunFolder

TEXTS = [
    ("", "the cat sat on the mat and the dog sat on the log"), ("a dog ", "sat on the mat"), ("", "x"), ("the cat ", "sat " * 200),
]  # fmt: skip


def by_transformers(folder, positions):
    """exp of the mean loss of a token, one text at a time, by the model's own forward pass in float64."""
    model, tokenizer = load_causal_lm(folder, torch.float64), load_tokenizer(folder)
    total = count = 0.0
    for prompt, reply in TEXTS:
        # Prompt and reply each by itself, as everywhere in a run: generation ends the prompt's last token before the reply.
        ids = tokenizer(prompt)["input_ids"] + tokenizer(reply)["input_ids"] + [tokenizer.eos_token_id]
        start = max(len(tokenizer(prompt)["input_ids"]), 1)
        ids = ids[:positions]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(start, len(ids)):
            total, count = total - float(logprobs[place - 1, ids[place]]), count + 1
    return math.exp(total / count)


def test_each_models_perplexity_is_transformers(run_folder, tmp_path):  # noqa: F811
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for stage in ("sft", "ppo", "reward"):
        (folder.path / stage).symlink_to(run_folder.path / stage)
    (folder.path / "data").mkdir()
    (folder.path / "data" / "eval_prompts.parquet").symlink_to(run_folder.data("eval_prompts"))
    write_role(folder, "other_text", [{"prompt": prompt, "response": reply} for prompt, reply in TEXTS], ("prompt", "response"))
    summary = evaluate(recipe(judge=None, fluency=None), folder)
    for model in ("sft", "ppo"):
        found = summary[model]["perplexity_other_text"]
        assert found["mean"] == pytest.approx(by_transformers(folder.stage(model).model, 64), rel=1e-4)
        assert found["low"] < found["mean"] < found["high"]
    ratio = summary["ratio"]["perplexity_other_text"]["mean"]
    assert ratio == pytest.approx(summary["ppo"]["perplexity_other_text"]["mean"] / summary["sft"]["perplexity_other_text"]["mean"])


def test_without_such_text_there_is_no_figure(run_folder):  # noqa: F811
    summary = evaluate(recipe(), run_folder)
    assert summary["sft"]["perplexity_other_text"] is None and "perplexity_other_text" not in summary["missing"]


def test_a_recipes_other_text_is_stored_and_makes_no_prompts(tmp_path):
    text = tmp_path / "other.jsonl"
    text.write_text("".join(json.dumps({"text": f"some other text, number {number}"}) + "\n" for number in range(5)))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"a prompt, number {number}"}) + "\n" for number in range(20)))
    made = Recipe.model_validate({
        "name": "other", "sft": None, "reward": None,
        "model": {"name_or_path": str(save_tiny(tmp_path / "model"))},
        "data": {"other_text": [{"path": str(text)}], "prompts": [{"path": str(prompts)}]},
        "ppo": {"reward_function": "builtins:len", "critic_init": "sft"},
    })  # fmt: skip
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    prepare(made, folder)
    rows = read_role(folder, "other_text")
    assert sorted(rows["response"]) == [f"some other text, number {number}" for number in range(5)] and set(rows["prompt"]) == {""}
    stored = [prompt for role in ("prompts", "eval_prompts") for prompt in read_role(folder, role)["prompt"]]
    assert len(stored) == 20 and all(prompt.startswith("a prompt") for prompt in stored)

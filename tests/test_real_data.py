"""The recipes imdb and hh on a slice of the real data, all stages, where the data is there."""

import json
import subprocess
import sys

import pytest
from real_data import DATA

SLICE = {
    "model.from_scratch.layers": 2, "model.from_scratch.width": 64, "model.from_scratch.vocab_size": 800,
    "fluency.max_steps": 3, "sft.max_steps": 5, "reward.max_steps": 4, "judge.max_steps": 4, "sft.eval_rows": 16,
    "fluency.eval_rows": 16, "reward.eval_rows": 32, "judge.eval_rows": 32, "reward.normalise_samples": 16,
    "judge.normalise_samples": 16, "generation.max_new_tokens": 12, "ppo.steps": 1, "ppo.rollout_batch_size": 8,
    "ppo.minibatch_size": 8, "ppo.microbatch_size": 4, "ppo.ppo_epochs": 1, "ppo.eval_prompts": 4,
    "generation.chunk_size": 8, "evaluation.prompts": 8, "evaluation.samples": 2, "evaluation.seeds": "[0]",
    "evaluation.bootstrap": 200,
}  # fmt: skip
BUILDER = {
    "imdb": {"data.builder_args.max_reviews": 400, "data.builder_args.prompts": 60, "data.builder_args.eval_prompts": 40,
             "data.builder_args.sft_eval": 20},
    "hh": {"data.builder_args.max_rows": 500, "data.builder_args.max_prompts": 60},
}  # fmt: skip


@pytest.mark.realdata
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(560)
@pytest.mark.parametrize(("recipe", "folder"), [("imdb", "imdb"), ("hh", "hh-rlhf")])
def test_recipe_runs_end_to_end_on_a_slice(recipe, folder, tmp_path):
    if not (DATA / folder).exists():
        pytest.skip(f"no {DATA / folder}")
    settings = SLICE | BUILDER[recipe] | {"data.root": str(DATA / folder)}
    arguments = [f"--set={key}={value}" for key, value in settings.items()]
    done = subprocess.run([sys.executable, "-m", "rlhf_ray.cli.main", "run", recipe, "--run-dir", str(tmp_path / "run"),
                           *arguments], capture_output=True, text=True, timeout=540, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "evaluation" / "summary.json").read_text())
    for model in ("sft", "ppo"):
        for figure in ("score", "judge", "perplexity", "perplexity_independent", "relevance", "distinct_2"):
            assert summary[model][figure]["low"] <= summary[model][figure]["mean"] <= summary[model][figure]["high"]
    reward = json.loads((tmp_path / "run" / "reward" / "DONE").read_text())
    assert 0 <= reward["accuracy"] <= 1 and 0 <= reward["longer_accuracy"] <= 1
    if recipe == "imdb":
        assert -1 <= reward["spearman"] <= 1 and "accuracy" in reward["openings"]
        assert summary["ppo"]["judge_positive"] is not None

"""An evaluation whose process ends goes on at the chunk where it stopped, and ends in the same figures."""

import json
import shutil

import numpy as np
import pytest
from test_evaluation import recipe, run_folder  # noqa: F401 - a fixture

from rlhf_ray.config.sampling_params import Completion
from rlhf_ray.evaluation import evaluate as evaluation
from rlhf_ray.evaluation.kept import KeptParts, inputs_of
from rlhf_ray.messages import Scores
from rlhf_ray.runs.run_folder import RunFolder


class Died(BaseException):
    """Stands for a process that ends."""


@pytest.fixture
def folder(run_folder, tmp_path):  # noqa: F811
    shutil.copytree(run_folder.path, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    return RunFolder(tmp_path / "run")


def figures(folder, made, progress=None):
    """The summary and the samples, without what depends on time."""
    summary = evaluation.evaluate(made, folder, progress)
    return summary | {"seconds": None}, (folder.path / "evaluation" / "samples.jsonl").read_text()


def dies_at(doing, step):
    def progress(state):
        if (state["doing"], state["step"]) == (doing, step):
            raise Died

    return progress


TRUNCATED = recipe(generation={"max_new_tokens": 8, "chunk_size": 4, "temperature": 0.8, "top_k": 50})


@pytest.mark.parametrize("made", [
    pytest.param(recipe(), id="all tokens"), pytest.param(TRUNCATED, id="top_k", marks=pytest.mark.thorough),
])  # fmt: skip
def test_it_goes_on_at_its_chunk(folder, made, monkeypatch):
    undisturbed = figures(folder, made)
    shutil.rmtree(folder.path / "evaluation")
    for place in (("SFT samples", 8), ("PPO samples", 4), ("judge", 0), ("relevance", 0)):
        with pytest.raises(Died):
            figures(folder, made, dies_at(*place))
    parts = folder.path / "evaluation" / "parts"
    drawn = {path.name: path.stat().st_mtime_ns for path in parts.glob("drawn-*")}
    assert sorted(drawn) == [f"drawn-{name}-{start:06d}.npz" for name in ("ppo", "sft") for start in (0, 4, 8)]
    rated = []

    def watched(model, *args):
        rated.append(args)
        return original(model, *args)

    original = evaluation.LanguageModel.rate_tokens
    monkeypatch.setattr(evaluation.LanguageModel, "rate_tokens", watched)
    summary, samples = figures(folder, made)
    assert {key for key in summary if summary[key] != undisturbed[0][key]} == set()
    assert samples == undisturbed[1]
    assert len(rated) == 2  # the relevance of two models; all else was there
    assert not parts.exists()


def test_parts_of_other_models_or_another_recipe_are_not_taken(folder):
    made = recipe()
    before = inputs_of(made, folder)
    assert inputs_of(recipe(seed=5), folder) != before == inputs_of(recipe(), folder)
    parts = KeptParts(folder.path / "parts", before)
    parts.array("kl", lambda: np.arange(3.0))
    assert KeptParts(folder.path / "parts", before).array("kl", lambda: np.zeros(3)).tolist() == [0, 1, 2]
    weights = folder.stage("ppo").model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    after = inputs_of(made, folder)
    assert after != before
    assert KeptParts(folder.path / "parts", after).array("kl", lambda: np.zeros(3)).tolist() == [0, 0, 0]


def test_a_damaged_part_is_made_again(tmp_path):
    parts = KeptParts(tmp_path / "parts", "of")
    parts.array("kl", lambda: np.arange(100.0))
    path = tmp_path / "parts" / "kl.npz"
    path.write_bytes(path.read_bytes()[:200])
    assert parts.array("kl", lambda: np.ones(2)).tolist() == [1, 1] == parts.array("kl", lambda: np.zeros(2)).tolist()


def test_what_is_kept_comes_back_as_it_was(tmp_path):
    parts = KeptParts(tmp_path / "parts", "of")
    made = [
        Completion(
            response_ids=np.arange(count, dtype=np.int32), logprobs=np.linspace(-1, 0, count, dtype=np.float32),
            finish_reason=reason, support=[np.arange(place + 1, dtype=np.int32) for place in range(count)],
            log_mass=np.full(count, -0.5, np.float32),
        )
        for count, reason in ((3, "eos"), (1, "length"))
    ]  # fmt: skip
    parts.completions("drawn", lambda: made)
    for read, one in zip(parts.completions("drawn", list), made, strict=True):
        assert (read.finish_reason, read.response_ids.dtype) == (one.finish_reason, np.int32)
        for name in ("response_ids", "logprobs", "log_mass"):
            np.testing.assert_array_equal(getattr(read, name), getattr(one, name))
        assert [ids.tolist() for ids in read.support] == [ids.tolist() for ids in one.support]
    scores = Scores(total=np.ones(2, np.float32), terms={"allow_pickle": np.zeros(2, np.float32)}, late=np.array([True, False]))
    parts.scores("score", lambda: scores)
    read = parts.scores("score", lambda: None)
    assert read.terms["allow_pickle"].tolist() == [0, 0] and read.late.tolist() == [True, False] and read.disagreement is None
    assert json.dumps(read.total.tolist()) == "[1.0, 1.0]"

"""The evaluation's maths against hand-worked numbers, and the whole of it on tiny models."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.config import FromScratch, ModelConfig, Recipe
from rlhf_ray.config.columns import asked_columns
from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.data.role_files import write_role
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.estimates import Resampler, repetition, shuffled_partners, win_rate, words
from rlhf_ray.evaluation.evaluate import _Evaluation, evaluate
from rlhf_ray.evaluation.samples import Responses, draw_responses
from rlhf_ray.evaluation.scoring import LanguageModel
from rlhf_ray.evaluation.traits import all_trait_scores, trait_scores
from rlhf_ray.models.load import build_causal_lm, build_reward_model, load_causal_lm
from rlhf_ray.models.save import save_model
from rlhf_ray.models.tokenizer import load_tokenizer, train_tokenizer
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.storage import read_lines


def test_words_are_lower_case_with_punctuation_apart():
    assert words("The cat's naïve, 2nd hat!") == ["the", "cat", "'", "s", "naïve", ",", "2nd", "hat", "!"]
    assert words("我爱猫 cats") == ["我", "爱", "猫", "cats"]


def distinct_n(texts, n):
    """Different n-grams / all n-grams over all texts together."""
    grams = [tuple(words(text)[start : start + n]) for text in texts for start in range(len(words(text)) - n + 1)]
    return len(set(grams)) / len(grams)


def test_distinct_n_counts_over_all_texts():
    def point(texts, n):
        return Resampler(len(texts), 10).distinct([[text] for text in texts], n).point

    # bigrams: (a b) (b a) (a b) | (a b) (b c)  -> 3 different of 5
    assert point(["a b a b", "a b c"], 2) == distinct_n(["a b a b", "a b c"], 2) == 3 / 5
    assert point(["a b a b", "a b c"], 1) == 3 / 7
    assert np.isnan(point(["a", ""], 2))


def test_repetition_is_the_share_of_4_grams_said_before():
    # 1 2 3 4 | 2 3 4 1 | 3 4 1 2 | 4 1 2 3 | 1 2 3 4: the fifth stood before
    assert repetition("1 2 3 4 1 2 3 4") == pytest.approx(1 / 5)
    assert repetition("no no no no no no") == pytest.approx(2 / 3)
    assert repetition("too short") == 0.0


def test_win_rate_counts_ties_as_half():
    ours, theirs = np.array([[1.0, 2.0], [3.0, 0.0]]), np.array([[0.0, 2.0], [4.0, 0.0]])
    assert win_rate(ours, theirs).tolist() == [[1.0, 0.5], [0.0, 0.5]]


def bootstrap_interval(values, *, resamples, seed):
    return Resampler(len(values), resamples, seed).mean(values).figure()


def test_bootstrap_interval_is_seeded_and_agrees_with_the_normal_one():
    values = np.random.default_rng(5).normal(2.0, 3.0, size=400)
    figure = bootstrap_interval(values, resamples=4000, seed=1)
    assert figure == bootstrap_interval(values, resamples=4000, seed=1)
    assert figure != bootstrap_interval(values, resamples=4000, seed=2)
    error = values.std() / np.sqrt(400)
    assert figure["mean"] == pytest.approx(values.mean())
    assert figure["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert figure["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_bootstrap_interval_covers_the_truth_about_95_times_of_100():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        figure = bootstrap_interval(rng.exponential(1.0, size=100), resamples=400, seed=seed)
        covered += figure["low"] <= 1.0 <= figure["high"]
    assert 0.90 <= covered / 300 <= 0.98


def test_the_same_resamples_make_differences_paired():
    base = np.random.default_rng(0).normal(0, 10, size=50)
    draws = Resampler(50, 500, seed=3)
    difference = (draws.mean(base + 1) - draws.mean(base)).figure()
    # Prompt by prompt the difference is exactly 1, however widely the prompts differ.
    assert (difference["mean"], difference["low"], difference["high"]) == pytest.approx((1, 1, 1))


def test_prompts_are_resampled_not_responses():
    per_prompt = np.repeat(np.array([[0.0], [1.0]]), 1000, axis=1)  # 2 prompts, 1000 equal responses each
    figure = Resampler(2, 1000, seed=0).mean(per_prompt).figure()
    assert (figure["mean"], figure["low"], figure["high"]) == (0.5, 0.0, 1.0)


def test_perplexity_is_of_all_tokens_together():
    # 1 token at log 1/2 and 3 tokens at log 1/8 each: exp((log 2 + 3 log 8) / 4) = 2 ** (10 / 4)
    sums, tokens = np.log([0.5, 0.125**3]), np.array([1, 3])
    assert Resampler(2, 10).perplexity(sums, tokens).point == pytest.approx(2**2.5)


@pytest.mark.thorough
def test_distinct_interval_is_as_wide_as_fresh_corpora_differ():
    rng = np.random.default_rng(0)

    def corpus():
        return [[" ".join(f"w{i}" for i in rng.zipf(1.5, size=rng.integers(5, 25)) % 60)] for _ in range(80)]

    values = [distinct_n([row[0] for row in corpus()], 2) for _ in range(300)]
    figures = [Resampler(80, 200, seed=i).distinct(corpus(), 2).figure() for i in range(10)]
    assert all(figure["low"] < figure["mean"] < figure["high"] for figure in figures)
    half_widths = [(figure["high"] - figure["low"]) / 2 for figure in figures]
    assert np.mean(half_widths) == pytest.approx(1.96 * np.std(values), rel=0.35)


def test_shuffled_partners_never_pair_equal_prompts():
    prompts = ["a", "b", "a", "c", "a", "b", "d", "e"]
    for seed in range(20):
        partners = shuffled_partners(prompts, seed)
        assert all(prompts[partner] != prompts[i] for i, partner in enumerate(partners))
    different = list("abcdefgh")
    assert sorted(shuffled_partners(different, 0)) == list(range(8))
    assert shuffled_partners(["x", "x"], 0).tolist() in ([0, 1], [1, 0])


# -- the whole stage on tiny models -----------------------------------------------------------------------------------

PROMPTS = [
    "The cat sat on",
    "A dog ran to",
    "The sun is over",
    "My hat was under",
    "One bird sang in",
    "The cat sat on",
]
CORPUS = [
    f"{prompt} the {noun} and was {mood}. "
    for prompt in PROMPTS
    for noun in ("mat", "sea", "tree")
    for mood in ("glad", "sad", "warm")
]


def judge_by_length(prompts, responses):
    return [len(response) for response in responses]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder as the earlier stages leave it: random models of 2 layers, no training."""
    root = tmp_path_factory.mktemp("run")
    folder = RunFolder(root)
    tokenizer = train_tokenizer(CORPUS, 300)
    shape = {"layers": 2, "width": 32, "heads": 2, "positions": 64, "vocab_size": 300}
    for number, stage in enumerate(("sft", "ppo", "fluency", "dpo")):
        model = build_causal_lm(ModelConfig(from_scratch=FromScratch(**shape)), tokenizer, seed=number)
        for weight in model.parameters():  # far enough from uniform that two models differ measurably
            weight.data *= 3.0
        folder.stage(stage).path.mkdir()
        save_model(model, tokenizer, folder.stage(stage).model, "card")
    for number, stage in enumerate(("reward", "judge")):
        model = build_reward_model(folder.stage("sft").model, tokenizer, seed=number)
        model.config.reward_mean, model.config.reward_std = 0.25, 2.0
        folder.stage(stage).path.mkdir()
        save_model(model, tokenizer, folder.stage(stage).model, "card")
    write_role(folder, "eval_prompts", [{"prompt": prompt} for prompt in PROMPTS], ("prompt",))
    return folder


def recipe(**changes):
    settings = {
        "name": "tiny",
        "generation": {"max_new_tokens": 8, "chunk_size": 4, "temperature": 0.8},
        "data": {"max_prompt_tokens": 32},
        "judge": {},
        "fluency": {},
        "model": {"from_scratch": {"positions": 256}},
        "evaluation": {"prompts": 100, "seeds": [3, 4], "bootstrap": 50},
    }
    return Recipe.model_validate(settings | changes)


@pytest.fixture(scope="module")
def evaluated(run_folder):
    seen = []
    summary = evaluate(recipe(), run_folder, seen.append)
    samples = [json.loads(line) for line in (run_folder.path / "evaluation" / "samples.jsonl").read_text().splitlines()]
    return summary, samples, seen


def test_summary_has_the_form_that_people_script_against(evaluated, run_folder):
    summary, samples, seen = evaluated
    assert json.loads((run_folder.path / "evaluation" / "summary.json").read_text()) == summary
    assert run_folder.stage("evaluation").summary() == summary
    for model in ("sft", "ppo"):
        for key in (
            "score",
            "judge",
            "perplexity",
            "perplexity_independent",
            "relevance",
            "length",
            "eos_rate",
            "distinct_2",
            "repetition",
        ):
            figure = summary[model][key]
            assert set(figure) == {"mean", "low", "high"} and figure["low"] <= figure["mean"] <= figure["high"], key
    assert set(summary["win_rate"]) == {"reward_model", "judge", "at_equal_length"}
    assert (summary["prompts"], summary["seeds"], summary["missing"]) == (6, [3, 4], {})
    assert summary["kl"] == summary["kl_interval"]["mean"] > 0
    assert len(samples) == 12 and {"stage", "doing", "step", "total"} == set(seen[0])


def test_figures_follow_from_the_samples_file(evaluated):
    summary, samples, _ = evaluated
    for model in ("sft", "ppo"):
        rows = [row[model] for row in samples]
        assert summary[model]["score"]["mean"] == pytest.approx(np.mean([row["score"] for row in rows]), abs=1e-5)
        assert summary[model]["length"]["mean"] == pytest.approx(np.mean([row["tokens"] for row in rows]))
        assert summary[model]["eos_rate"]["mean"] == pytest.approx(np.mean([row["ended"] for row in rows]))
        assert summary[model]["distinct_2"]["mean"] == pytest.approx(distinct_n([row["response"] for row in rows], 2))
    wins = [
        (row["ppo"]["score"] > row["sft"]["score"]) + 0.5 * (row["ppo"]["score"] == row["sft"]["score"])
        for row in samples
    ]
    assert summary["win_rate"]["reward_model"]["mean"] == pytest.approx(np.mean(wins))


def plain_logprob(folder, prompt, response, ended, temperature=1.0):
    """Summed log-prob of a response and its token count, one row at a time with plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    head, tail = tokenizer(prompt).input_ids, tokenizer(response).input_ids + [tokenizer.eos_token_id] * ended
    with torch.no_grad():
        logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tail)[:, None]).sum().item(), len(tail)


def test_independent_perplexity_against_plain_transformers(evaluated, run_folder):
    summary, samples, _ = evaluated
    folder = run_folder.stage("fluency").model
    pairs = [plain_logprob(folder, row["prompt"], row["ppo"]["response"], row["ppo"]["ended"]) for row in samples]
    expected = np.exp(-sum(total for total, _ in pairs) / sum(count for _, count in pairs))
    assert summary["ppo"]["perplexity_independent"]["mean"] == pytest.approx(expected, rel=1e-4)


def test_each_response_is_rated_in_its_own_place(run_folder):
    path = run_folder.stage("sft").model
    model = LanguageModel(load_causal_lm(path), load_tokenizer(path), torch.float32)
    texts = ["the mat and was glad.", "", "sad"]  # the empty one was cut off: it has no token at all
    responses = Responses(prompt_ids=[], response_ids=[], texts=texts, ended=np.array([True, False, False]))
    prompt_ids, response_ids = model.encode(PROMPTS[:3], responses)
    expected = [
        plain_logprob(path, PROMPTS[0], texts[0], True)[0],
        0.0,
        plain_logprob(path, PROMPTS[2], texts[2], False)[0],
    ]
    assert model.rate_tokens(prompt_ids, response_ids) == pytest.approx(expected, rel=1e-4)


def test_the_recipes_microbatch_bounds_a_forward_pass(run_folder):
    """Logits are rows x tokens x vocabulary: 32 rows of a model that trained with 2 may not fit."""
    made = recipe(judge=None, fluency=None, ppo={"microbatch_size": 2, "rollout_batch_size": 4, "minibatch_size": 4})
    model = _Evaluation(made, run_folder, lambda state: None, torch.device("cpu"))._load(run_folder.stage("sft").model)
    rows = []
    model.model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[-2]))
    ids = [np.array([5, 6, 7], np.int32)] * 5
    model.rate_tokens(ids, ids)
    assert rows == [2 * 3, 2 * 3, 1 * 3]


def test_responses_stand_prompt_by_prompt(run_folder):
    path = run_folder.stage("sft").model
    tokenizer, counts = load_tokenizer(path), []

    def draw():
        return draw_responses(
            load_causal_lm(path),
            tokenizer,
            PROMPTS,
            (3, 4),
            SamplingParams(max_new_tokens=8),
            chunk_size=4,
            device="cpu",
            progress=counts.append,
        )

    drawn = draw()
    assert [tokenizer.decode(ids) for ids in drawn.prompt_ids] == [prompt for prompt in PROMPTS for _ in (3, 4)]
    assert counts == [4, 8, 12] and len(set(drawn.texts)) > 6
    assert draw().texts == drawn.texts


def test_kl_against_the_log_probs_that_were_sampled(evaluated, run_folder):
    summary, _, _ = evaluated
    sft, ppo = (load_causal_lm(run_folder.stage(stage).model) for stage in ("sft", "ppo"))
    tokenizer = load_tokenizer(run_folder.stage("ppo").model)
    params = SamplingParams(max_new_tokens=8, temperature=0.8)
    drawn = draw_responses(
        ppo, tokenizer, PROMPTS, (3, 4), params, chunk_size=4, device="cpu", progress=lambda count: None
    )
    differences = []
    for prompt, response in zip(drawn.prompt_ids, drawn.response_ids, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]))[None].long()
        with torch.no_grad():
            ours, theirs = ((model(ids).logits[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1) for model in (ppo, sft))
        tokens = torch.tensor(response, dtype=torch.long)[:, None]
        differences.append((ours.gather(1, tokens) - theirs.gather(1, tokens)).sum().item())
    assert summary["kl"] == pytest.approx(np.mean(differences), rel=1e-4)


def test_scores_against_plain_transformers(evaluated, run_folder):
    """The reward model has the policy's tokenizer: it reads the ids that were drawn."""
    _, samples, _ = evaluated
    folder = run_folder.stage("reward").model
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    sft, params = load_causal_lm(run_folder.stage("sft").model), SamplingParams(max_new_tokens=8, temperature=0.8)
    drawn = draw_responses(
        sft, tokenizer, PROMPTS, (3, 4), params, chunk_size=4, device="cpu", progress=lambda count: None
    )
    for row in samples[:4]:
        text, place = row["sft"], 2 * row["index"] + (3, 4).index(row["seed"])
        ids = tokenizer(row["prompt"]).input_ids + drawn.response_ids[place].tolist()
        assert (ids[-1] == tokenizer.eos_token_id) == text["ended"]
        with torch.no_grad():
            raw = model(torch.tensor([ids])).logits.item()
        assert text["score"] == pytest.approx((raw - 0.25) / 2.0, abs=1e-4)


def test_a_finished_stage_is_not_run_again(evaluated, run_folder):
    summary, _, _ = evaluated
    before = run_folder.stage("evaluation").done_file.stat().st_mtime_ns
    assert evaluate(recipe(), run_folder) == summary
    assert run_folder.stage("evaluation").done_file.stat().st_mtime_ns == before


@pytest.fixture
def same_model(run_folder, tmp_path):
    """A run in which PPO changed nothing."""
    for name in ("data", "sft", "reward"):
        (tmp_path / name).symlink_to(run_folder.path / name)
    (tmp_path / "ppo").symlink_to(run_folder.path / "sft")
    return RunFolder(tmp_path)


def test_equal_models_differ_in_nothing(same_model):
    summary = evaluate(recipe(judge=None, fluency=None), same_model)
    assert summary["kl"] == 0
    assert summary["win_rate"]["reward_model"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert all(figure == {"mean": 0, "low": 0, "high": 0} for figure in summary["difference"].values())
    assert summary["ratio"]["distinct_2"] == {"mean": 1, "low": 1, "high": 1}


@pytest.fixture(scope="module")
def with_dpo(run_folder, evaluated, tmp_path_factory):
    """(summary, samples) of the same run with a DPO model."""
    folder = RunFolder(tmp_path_factory.mktemp("dpo"))
    for name in ("data", "sft", "ppo", "fluency", "reward", "judge", "dpo"):
        (folder.path / name).symlink_to(run_folder.path / name)
    return evaluate(recipe(dpo={}), folder), read_lines(folder.path / "evaluation" / "samples.jsonl")


def test_dpo_adds_its_figures_and_changes_none(evaluated, with_dpo):
    before, summary = evaluated[0], with_dpo[0]
    added = {"dpo", "dpo_over_sft", "ppo_over_dpo"}
    assert set(summary) - set(before) == added == added & set(summary)
    for key in set(before) - {"definitions", "seconds"}:
        assert summary[key] == before[key], key
    assert set(summary["definitions"]) - set(before["definitions"]) == {"dpo_over_sft", "ppo_over_dpo"}
    assert set(summary["dpo"]) == set(summary["ppo"]) and summary["dpo"]["perplexity"] != summary["ppo"]["perplexity"]


def test_dpo_is_compared_by_what_the_samples_file_says(with_dpo):
    summary, samples = with_dpo
    assert set(summary["dpo_over_sft"]) == {"win_rate", "kl", "kl_interval", "difference", "ratio"}
    for scorer, key in (("reward_model", "score"), ("judge", "judge")):
        table = {model: np.array([row[model][key] for row in samples]) for model in ("sft", "dpo", "ppo")}
        for pair in ("dpo_over_sft", "ppo_over_dpo"):
            ours, theirs = (table[model] for model in pair.split("_over_"))
            expected = np.mean((ours > theirs) + 0.5 * (ours == theirs))
            assert summary[pair]["win_rate"][scorer]["mean"] == pytest.approx(expected), (pair, scorer)
    dpo, sft = (distinct_n([row[model]["response"] for row in samples], 2) for model in ("dpo", "sft"))
    assert summary["dpo_over_sft"]["ratio"]["distinct_2"]["mean"] == pytest.approx(dpo / sft)
    gained = np.mean([row["dpo"]["score"] - row["sft"]["score"] for row in samples])
    assert summary["dpo_over_sft"]["difference"]["score"]["mean"] == pytest.approx(gained, abs=1e-5)
    assert summary["dpo_over_sft"]["kl"] == summary["dpo_over_sft"]["kl_interval"]["mean"] > 0


def test_a_dpo_model_that_is_the_sft_model_has_gone_nowhere(run_folder, tmp_path):
    for name in ("data", "sft", "ppo", "reward"):
        (tmp_path / name).symlink_to(run_folder.path / name)
    (tmp_path / "dpo").symlink_to(run_folder.path / "sft")
    summary = evaluate(recipe(judge=None, fluency=None, dpo={}), RunFolder(tmp_path))
    over_sft = summary["dpo_over_sft"]
    assert over_sft["kl"] == 0 < summary["kl"] and over_sft["win_rate"]["judge"] is None
    assert over_sft["win_rate"]["reward_model"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert summary["ppo_over_dpo"]["win_rate"] == summary["win_rate"]


def test_what_was_not_measured_is_null_with_its_reason(same_model):
    summary = evaluate(recipe(judge=None, fluency=None), same_model)
    assert summary["sft"]["judge"] is summary["ppo"]["perplexity_independent"] is summary["win_rate"]["judge"] is None
    assert set(summary["missing"]) == {"judge", "perplexity_independent"}
    assert summary["sft"]["relevance"] is not None and "SFT model" in summary["definitions"]["relevance"]


def test_functions_take_the_place_of_models(same_model):
    function = f"{__name__}:judge_by_length"
    changed = recipe(
        judge=None,
        fluency=None,
        reward=None,
        ppo={"reward_function": function, "critic_init": "sft"},
        evaluation={"prompts": 4, "bootstrap": 20, "judge_function": function, "judge_positive_above": 10},
    )
    summary = evaluate(changed, same_model)
    samples = read_lines(same_model.path / "evaluation" / "samples.jsonl")
    assert [row["sft"]["score"] for row in samples] == [len(row["sft"]["response"]) for row in samples]
    assert summary["sft"]["score"] == summary["sft"]["judge"] and summary["prompts"] == 4
    assert summary["sft"]["judge_positive"]["mean"] == np.mean([len(row["sft"]["response"]) > 10 for row in samples])


def count_spaces(prompts, responses):
    return [float(response.count(" ")) for response in responses]


def test_terms_disagreement_and_length_are_figures(same_model):
    """Of an ensemble of the same model twice: they never disagree, and the sum follows from its terms."""
    (same_model.stage("reward").path / "member_1").symlink_to(same_model.stage("reward").path)
    terms = {
        "model": {"model": "reward", "weight": 0.5},
        "gaps": {"function": f"{__name__}:count_spaces", "weight": -1},
    }
    drawn = {"max_new_tokens": 8, "chunk_size": 4, "stop": ["e"]}  # responses of unlike length
    changed = recipe(
        judge=None, fluency=None, reward={"members": 2, "combine": "worst"}, ppo={"rewards": terms}, generation=drawn
    )
    summary = evaluate(changed, same_model)
    samples = read_lines(same_model.path / "evaluation" / "samples.jsonl")
    for model in ("sft", "ppo"):
        found, rows = summary[model], [row[model] for row in samples]
        assert found["score/gaps"]["mean"] == np.mean(count_spaces([], [row["response"] for row in rows]))
        total = 0.5 * found["score/model"]["mean"] - found["score/gaps"]["mean"]
        assert found["score"]["mean"] == pytest.approx(total, abs=1e-5)
        assert found["disagreement"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        scores, lengths = ([row[key] for row in rows] for key in ("score", "tokens"))
        assert found["score_length_corr"]["mean"] == pytest.approx(np.corrcoef(scores, lengths)[0, 1], abs=1e-4)
    assert summary["reward"] == "0.5 model + -1 gaps" and "score/gaps" in summary["difference"]


def test_a_correlation_and_its_resamples_are_those_of_numpy():
    rng = np.random.default_rng(3)
    x = rng.normal(1000.0, 1.0, (7, 3))
    y = 0.5 * x + rng.normal(size=(7, 3))
    resampler = Resampler(7, 20, seed=1)
    found = resampler.correlation(x, y)
    assert found.point == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    for weights, draw in zip(resampler.weights.astype(int), found.draws, strict=True):
        rows = np.repeat(np.arange(7), weights)
        assert draw == pytest.approx(np.corrcoef(x[rows].ravel(), y[rows].ravel())[0, 1])
    assert resampler.correlation(np.ones((7, 3)), y).figure() is None


def test_a_missing_stage_is_named(run_folder, tmp_path):
    (tmp_path / "data").symlink_to(run_folder.path / "data")
    with pytest.raises(UserError, match="run the stage 'sft'"):
        evaluate(recipe(), RunFolder(tmp_path))


def traits_of_text(prompts, responses):
    """A judge's traits: how many letters, and whether a space is there."""
    return {
        "letters": [len(response) for response in responses],
        "has_space": [float(" " in response) for response in responses],
    }


def test_traits_are_figures_of_every_model(same_model):
    summary = evaluate(
        recipe(judge=None, fluency=None, evaluation={"trait_function": f"{__name__}:traits_of_text", "bootstrap": 20}),
        same_model,
    )
    samples = read_lines(same_model.path / "evaluation" / "samples.jsonl")
    for model in ("sft", "ppo"):
        responses = [row[model]["response"] for row in samples]
        for name, expected in traits_of_text([], responses).items():
            figure = summary[model][f"trait/{name}"]
            assert figure["mean"] == pytest.approx(np.mean(expected))
            assert figure["low"] <= figure["mean"] <= figure["high"]
            assert [row[model][f"trait/{name}"] for row in samples] == expected
    assert summary["difference"]["trait/letters"]["mean"] == 0  # both are the same model


def first_letter(prompts, responses, *, letter):
    return {"first_letter": [float(response.startswith(each)) for response, each in zip(responses, letter, strict=True)]}


def test_several_functions_tell_traits_and_each_gets_its_columns():
    both = recipe(evaluation={"trait_function": [f"{__name__}:traits_of_text", f"{__name__}:first_letter"]})
    assert [asked.needed for asked in asked_columns(both).values()] == [(), ("letter",)]
    scores = all_trait_scores(both.evaluation.trait_functions, ["p", "q"], ["an apple", "no"], {"letter": ["a", "b"]})
    assert {name: values.tolist() for name, values in scores.items()} == {
        "letters": [8, 2], "has_space": [1, 0], "first_letter": [1, 0],
    }  # fmt: skip
    with pytest.raises(UserError, match="both return a trait 'letters'"):
        all_trait_scores([f"{__name__}:traits_of_text"] * 2, ["p"], ["one"])


@pytest.mark.parametrize(("returned", "told"), [
    ([1.0, 2.0], r"returned \[1.0, 2.0\]; return \{name: scores\}"),
    ({}, "return {name: scores}"),
    ({"kind": [1.0]}, r"returned 1 numbers for 2 responses: \[1.0\] as 'kind'"),
    ({"kind": [1.0, float("nan")]}, "returned nan as 'kind' of response 'second'"),
    ({"kind": ["a", "b"]}, r"returned \['a'\] as 'kind' of response"),
    (None, "returned None"),
])  # fmt: skip
def test_a_trait_function_that_returns_something_else_is_told(monkeypatch, returned, told):
    monkeypatch.setattr(sys.modules[__name__], "returns", lambda prompts, responses: returned, raising=False)
    with pytest.raises(UserError, match=told if told.startswith("returned") else re.escape(told)):
        trait_scores(f"{__name__}:returns", ["p", "p"], ["first", "second"])
    monkeypatch.setattr(sys.modules[__name__], "returns", lambda prompts, responses: 1 / 0, raising=False)
    with pytest.raises(UserError, match=r"evaluation\.trait_function .* raised ZeroDivisionError"):
        trait_scores(f"{__name__}:returns", ["p"], ["first"])

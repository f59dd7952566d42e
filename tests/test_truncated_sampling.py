"""top_k, top_p and min_p in training: log-probs, importance, KL and gradient are those of what was sampled from.

The brute force is float64 and token by token: it ranks, cuts and renormalises by the definition (`reference_distribution`).
"""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from differences import saw
from in_process import LocalRoles
from loops import run_real
from test_generation import VOCAB, brute_force, build, make_engine, ragged_prompts, reference_distribution
from tiny import tiny_recipe, write_start

from rlhf_ray.algorithms.logprobs import selected_logprobs, selected_logprobs_and_entropy
from rlhf_ray.config import GenerationConfig, Recipe
from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.errors import UserError
from rlhf_ray.messages import Sequences, Support
from rlhf_ray.ppo.single_process import SingleProcessPPO
from rlhf_ray.ppo.step import cut_chunks
from rlhf_ray.runs.run_folder import RunFolder

CUTS = {
    "top_p .9": {"top_p": 0.9}, "top_p .5": {"top_p": 0.5}, "top_k 5": {"top_k": 5}, "min_p .95": {"min_p": 0.95},
    "all three": {"top_k": 40, "top_p": 0.8, "min_p": 0.1, "temperature": 0.7},
}  # fmt: skip
each_cut = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_start(tiny_recipe(), RunFolder(tmp_path_factory.mktemp("truncated")))


def recipe_of(cut, **ppo):
    return tiny_recipe(generation=cut, ppo={"steps": 2, "minibatch_size": 8, "microbatch_size": 4, "ppo_epochs": 1, **ppo})


# -- what the engine tells --------------------------------------------------------------------------------------------


@each_cut
def test_the_engine_says_what_each_token_was_drawn_among(cut):
    model = build("gpt2")
    params = SamplingParams(max_new_tokens=12, tells_support=True, **cut)
    prompts = ragged_prompts()
    told = make_engine(model).generate(prompts, range(len(prompts)), params)
    plain = make_engine(model).generate(prompts, range(len(prompts)), replace(params, tells_support=False))
    for seed, (prompt, completion, other) in enumerate(zip(prompts, told, plain, strict=True)):
        assert completion.response_ids.tolist() == other.response_ids.tolist() and other.support is None
        assert (completion.logprobs == other.logprobs).all(), "bit for bit"
        tokens, logprobs, _ = brute_force(model, prompt, seed, params)
        assert completion.response_ids.tolist() == tokens
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5, rtol=0)
        ids = list(prompt)
        for place, token in enumerate(tokens):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].double().numpy()
            untruncated = SamplingParams(temperature=params.temperature)
            cut_probs, whole = (reference_distribution(logits, each) for each in (params, untruncated))
            kept = np.flatnonzero(cut_probs)
            assert completion.support[place].tolist() == kept.tolist() and token in kept and len(kept) < VOCAB
            assert completion.log_mass[place] == pytest.approx(math.log(whole[kept].sum()), abs=1e-5)
            ids.append(token)


def test_rows_that_come_and_go_keep_their_own(folder):
    """An open batch with requests that ask and one that does not, of other lengths, cancelled in between."""
    engine = make_engine(build("gpt2"), max_rows=3)
    asks = SamplingParams(max_new_tokens=6, top_k=4, tells_support=True)
    wanted = engine.generate([[3, 4], [5], [6, 7, 8]], [0, 1, 2], asks)
    numbers = [engine.submit(ids, seed, asks) for ids, seed in (([3, 4], 0), ([5], 1))]
    engine.submit([2], 9, SamplingParams(max_new_tokens=2))
    gone = engine.submit([9], 4, asks)
    numbers.append(engine.submit([6, 7, 8], 2, asks))
    found = {}
    for step in range(40):
        if step == 4:
            engine.cancel(gone)
        found |= {event.request_id: event.completion for event in engine.step() if event.completion is not None}
    for number, one in zip(numbers, wanted, strict=True):
        assert found[number].response_ids.tolist() == one.response_ids.tolist()
        assert [ids.tolist() for ids in found[number].support] == [ids.tolist() for ids in one.support]


# -- log-probs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_log_probs_entropy_and_gradients_within_a_support(dtype, near):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 13, generator=generator).to(dtype)
    support = torch.rand(5, 3, 13, generator=generator) < 0.4
    ids = torch.randint(0, 13, (5, 3), generator=generator)
    support.scatter_(-1, ids[..., None], True)
    exact = logits.double().requires_grad_()
    within = torch.where(support, exact / 0.7, -torch.inf).log_softmax(-1)
    wanted = within.gather(-1, ids[..., None]).squeeze(-1)
    shares = within.exp()
    wanted_entropy = -(shares * torch.where(support, within, 0.0)).sum(-1)
    slopes = torch.randn(5, 3, generator=generator, dtype=torch.float64)

    def both_with_gradients(x):
        return selected_logprobs_and_entropy(x, ids, temperature=0.7, support=support, entropy_gradient=True)

    for function, theirs in (
        (lambda x: selected_logprobs(x, ids, temperature=0.7, support=support), wanted),
        (lambda x: selected_logprobs_and_entropy(x, ids, temperature=0.7, support=support)[0], wanted),
        (lambda x: both_with_gradients(x)[0], wanted),
        (lambda x: both_with_gradients(x)[1], wanted_entropy),
    ):
        mine = logits.clone().requires_grad_()
        found = function(mine)
        torch.testing.assert_close(found.double(), theirs, atol=near, rtol=0)
        (gradient,) = torch.autograd.grad((found.double() * slopes).sum(), mine)
        (expected,) = torch.autograd.grad((theirs * slopes).sum(), exact, retain_graph=True)
        torch.testing.assert_close(gradient.double(), expected, atol=near, rtol=0)
        assert (gradient[~support] == 0).all()
    both = selected_logprobs_and_entropy(logits, ids, temperature=0.7, support=support)[1]
    torch.testing.assert_close(both.double(), wanted_entropy.detach(), atol=near, rtol=0)


def test_untruncated_log_probs_would_train_even_where_no_reply_is_better_than_another():
    """The mean gradient of log-probs over what is drawn is 0. Of the untruncated ones it is q - p, by hand, for q the cut and p the
    whole distribution: at top_k 2 of p = (.5, .25, .15, .1) it is (1/6, 1/12, -.15, -.1). Hence the refusal below.
    """
    whole = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    drawn, kept = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64), torch.tensor([True, True, False, False])
    for support, expected in ((kept.expand(2, 4), [0.0] * 4), (None, [1 / 6, 1 / 12, -0.15, -0.1])):
        logits = whole.log().requires_grad_()
        found = selected_logprobs(logits.expand(2, 4), torch.tensor([0, 1]), temperature=1.0, support=support)
        (gradient,) = torch.autograd.grad((drawn * found).sum(), logits)
        assert gradient.tolist() == pytest.approx(expected, abs=1e-12)


# -- messages ---------------------------------------------------------------------------------------------------------


def test_a_support_goes_with_its_rows():
    ids = [np.array(each) for each in ([1], [2, 3], [4, 5])]
    tokens = [[np.array([1, 9])], [np.array([2]), np.array([3, 4, 5])], [np.array([4]), np.array([5, 6])]]
    supports = [Support.of(each, np.arange(len(each), dtype=np.float32)) for each in tokens]
    both = Sequences.join([Sequences.of(ids[:2], ids[:2], supports[:2]), Sequences.of(ids[2:], ids[2:], supports[2:])])
    chosen = both.rows([2, 0, 2])
    assert chosen.support.counts.tolist() == [1, 2, 2, 1, 2] and chosen.support.ids.tolist() == [4, 5, 6, 1, 9, 4, 5, 6]
    assert [one.ids.tolist() for one in chosen.supports()] == [[4, 5, 6], [1, 9], [4, 5, 6]]
    assert Sequences.join([Sequences.of(ids, ids)]).rows([1]).support is None


# -- the update -------------------------------------------------------------------------------------------------------


def gathered(folder, recipe):
    """What the roles make of the first step: (roles, rollouts, statistics, the policy's shard)."""
    roles = LocalRoles(recipe, folder)
    rollouts = roles.generation.generate(cut_chunks(0, range(8), 1, 4))
    scores, ref = roles.reward.score(rollouts), roles.reference.logprobs(rollouts)
    old, values = roles.policy.logprobs(rollouts), roles.critic.values(rollouts)
    stats, (shard,), _ = roles.experience.assemble(rollouts, scores, ref, old, values, recipe.ppo.kl_coef)
    return roles, rollouts, stats, shard


def exact_logprobs(model, sequences, params):
    """Per row: log-probs [T] under the cut and renormalised distribution of this model, in float64 with its graph; and the
    mean log kept mass over all tokens."""
    rows, masses = [], []
    for prompt, response in zip(sequences.prompts(), sequences.responses(), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        logits = model(ids[:, :-1]).logits[0, len(prompt) - 1 :] / params.temperature
        whole = logits.log_softmax(-1)
        kept = torch.stack([
            torch.from_numpy(reference_distribution(line.detach().numpy() * params.temperature, params) > 0) for line in logits
        ])  # fmt: skip
        within = torch.where(kept, whole, -torch.inf).log_softmax(-1)
        rows.append(within.gather(-1, torch.from_numpy(response.astype(np.int64))[:, None])[:, 0])
        masses += torch.where(kept, whole, -torch.inf).logsumexp(-1).tolist()
    return rows, float(np.mean(masses))


@each_cut
def test_at_the_generators_own_weights_the_gradient_is_that_of_what_was_sampled_from(folder, cut):
    """Its norm over the brute force's is 1, with and without the correction; the importance weights are all 1."""
    norms = {}
    for corrects in (False, True):
        recipe = recipe_of(cut, importance_correction=corrects)
        roles, rollouts, stats, shard = gathered(folder, recipe)
        exact = copy.deepcopy(roles.policy.roles[0].engine.module.model).double()
        rows, mass = exact_logprobs(exact, shard.sequences, recipe.generation.sampling)
        tokens = len(shard.advantages)
        parts = np.split(shard.advantages, np.cumsum(shard.sequences.response_lengths)[:-1])
        loss = -sum((torch.from_numpy(part).double() * row).sum() for part, row in zip(parts, rows, strict=True)) / tokens
        gradient = torch.autograd.grad(loss, list(exact.parameters()), allow_unused=True)
        norm = math.sqrt(sum(float((one**2).sum()) for one in gradient if one is not None))
        found = roles.policy.update([shard], 1e-3, 0.0)[0]
        norms[corrects] = found["policy/grad_norm"]
        assert saw("gradient norm under truncation over float64's, less 1", abs(norms[corrects] / norm - 1)) < 1e-4
        assert stats["rollout/log_kept_mass"] == pytest.approx(mass, abs=1e-5) and mass < -0.05
        assert found["first_policy/ratio"] == pytest.approx(1.0, abs=1e-5)
        if corrects:
            assert stats["rollout/importance_mean"] == pytest.approx(1.0, abs=1e-5)
        assert stats["policy/mismatch_max"] < 1e-4 and stats["objective/kl"] == pytest.approx(0.0, abs=1e-5)
        drawn = np.concatenate([rollout.rollout_logprobs for rollout in rollouts])
        np.testing.assert_allclose(drawn, torch.cat(rows).detach().numpy(), atol=1e-4)
    assert norms[True] == pytest.approx(norms[False], rel=1e-4)


def test_the_kl_is_that_of_the_renormalised_distributions_and_not_negative(folder):
    """A policy away from its reference: summed over what could be drawn, which is what the sampled mean estimates."""
    recipe = recipe_of({"top_p": 0.5})
    roles = LocalRoles(recipe, folder)
    engine = roles.policy.roles[0].engine
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    roles.generation.load_weights(roles.policy.weights(), 0)
    (rollout,) = roles.generation.generate(cut_chunks(0, range(16), 1, 16))
    (ours,), (theirs,) = roles.policy.logprobs([rollout]), roles.reference.logprobs([rollout])
    policy = copy.deepcopy(engine.module.model).double()
    reference = copy.deepcopy(roles.reference.roles[0].model).double()
    exact, naive, estimates, place = [], [], ours.values - theirs.values, 0
    drawn = rollout.sequences
    for prompt, response, support in zip(drawn.prompts(), drawn.responses(), drawn.supports(), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None, :-1]
        with torch.no_grad():
            p, q = (model(ids).logits[0, len(prompt) - 1 :].log_softmax(-1) for model in (policy, reference))
        for t, kept in enumerate(np.split(support.ids, np.cumsum(support.counts)[:-1])):
            inside = [each[t, kept].log_softmax(-1) for each in (p, q)]
            shares, gap = inside[0].exp(), inside[0] - inside[1]
            exact.append(float((shares * gap).sum()))
            naive.append(float((shares * (p[t, kept] - q[t, kept])).sum()))
            where = int(np.flatnonzero(kept == response[t])[0])
            assert estimates[place] == pytest.approx(float(gap[where]), abs=1e-4)
            place += 1
    assert min(exact) >= -1e-12 and np.mean(exact) > 0.01
    error = np.std(estimates - np.array(exact)) / math.sqrt(len(exact))
    assert abs(np.mean(estimates) - np.mean(exact)) < 4 * error
    assert abs(np.mean(naive) - np.mean(exact)) > 0.01, "untruncated log-probs count what moved in or out of the set, too"


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [
    pytest.param(cut, id=name, marks=() if name == "all three" else pytest.mark.thorough) for name, cut in CUTS.items()
])  # fmt: skip
def test_a_run_passes_the_gates_and_one_process_takes_the_same_steps(folder, cut):
    recipe = tiny_recipe(generation=cut, ppo={"max_mismatch": 1e-3})
    roles, diary = run_real(recipe, folder)
    single = SingleProcessPPO(recipe, folder)
    for step in range(4):
        metrics, theirs = single.step(step), diary.records[step + 1][1]
        for name in ("objective/kl", "rollout/log_kept_mass"):
            assert metrics[name] == pytest.approx(theirs[name], abs=1e-4), (step, name)
    for name, tensor in single.policy.named_parameters():
        assert float((roles.weights()[f"0/{name}"] - tensor).detach().abs().max()) < 1e-4, name


@pytest.mark.parametrize("ppo", [
    {"steps_ahead": 1, "max_mismatch": 1e-3}, {"reuse_forward": True, "minibatch_size": 8}, {"microbatch_tokens": 40},
    {"kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.01}, {"lora": {"rank": 2}},
    {"advantage": "grpo", "samples_per_prompt": 2, "rollout_batch_size": 4, "dynamic_sampling_rounds": 2},
])  # fmt: skip
def test_other_ways_through_the_update_know_the_support_too(folder, ppo):
    """In each of them the first ratio and the importance of the policy's own samples are 1."""
    recipe = tiny_recipe(generation={"top_p": 0.6}, ppo={"steps": 2, **ppo})
    _, diary = run_real(recipe, folder)
    for _, metrics in diary.records[1:]:
        assert metrics["first_policy/ratio"] == pytest.approx(1.0, abs=1e-4)
        assert metrics["rollout/log_kept_mass"] < -0.1
    first = diary.records[1][1]
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert first.get("rollout/importance_mean", 1.0) == pytest.approx(1.0, abs=1e-4)


def test_without_truncation_nothing_is_told_and_no_figure_appears(folder):
    roles, diary = run_real(tiny_recipe(ppo={"steps": 1}), folder)
    assert roles.generation.generate(cut_chunks(0, [0], 1, 1))[0].sequences.support is None
    assert "rollout/log_kept_mass" not in diary.records[1][1]


def test_the_final_evaluations_kl_is_that_of_the_renormalised_distributions(folder):
    from rlhf_ray.evaluation.samples import draw_responses
    from rlhf_ray.evaluation.scoring import LanguageModel
    from rlhf_ray.models.load import load_causal_lm
    from rlhf_ray.models.tokenizer import load_tokenizer

    path, params = folder.stage("sft").model, SamplingParams(max_new_tokens=8, top_k=5)
    model, tokenizer = load_causal_lm(path), load_tokenizer(path)
    drawn = draw_responses(
        model, tokenizer, ["please tell", "me"], [0, 1], params, chunk_size=4, device="cpu", progress=lambda count: None
    )
    rated = LanguageModel(model, tokenizer, torch.float32).rate_tokens(drawn.prompt_ids, drawn.response_ids, 1.0, drawn.supports)
    rows, _ = exact_logprobs(copy.deepcopy(model).double(), Sequences.of(drawn.prompt_ids, drawn.response_ids), params)
    np.testing.assert_allclose(rated, [float(row.detach().sum()) for row in rows], atol=1e-4)


# -- engines that don't tell ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_an_engine_that_does_not_say_what_it_kept_is_refused(cut):
    with pytest.raises(ValueError, match="vllm does not say which.*generation.engine to torch"):
        GenerationConfig(engine="vllm", **cut)
    Recipe.model_validate({"name": "x", "generation": {"engine": "vllm"}})


def test_the_likeliest_token_has_no_support():
    with pytest.raises(UserError, match="temperature is 0"):
        SamplingParams(temperature=0.0, tells_support=True)

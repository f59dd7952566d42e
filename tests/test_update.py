"""One whole update of policy and critic against brute force in float64, parameter by parameter.

The brute force knows the formulas only: loops over rows and tokens for rewards, GAE, whitening and losses, finite differences
for the gradients, Adam and clipping written out. Of the product it shares the models' forward pass, which is transformers'.
"""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from differences import saw
from in_process import TorchEngine
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ray.algorithms.experience import AdvantageConfig
from rlhf_ray.messages import Chunk, RolloutBatch, Scores, Sequences
from rlhf_ray.roles.configs import PolicyLossConfig
from rlhf_ray.roles.critic_trainer import CriticTrainer
from rlhf_ray.roles.experience_maker import ExperienceConfig, ExperienceMaker
from rlhf_ray.roles.policy_trainer import PolicyTrainer
from rlhf_ray.tables.advantages import ADVANTAGES
from rlhf_ray.training.forward import LogprobModel, ValueModel

VOCAB, TEMPERATURE, KL_COEF, LR = 7, 0.7, 0.3, 0.02
GAMMA, LAMBDA, CLIP, VALUE_CLIP, VF_COEF, EPS, MAX_NORM = 0.9, 0.8, 0.2, 0.1, 0.5, 1e-5, 1.0
PROMPTS = [[1, 2], [3], [4, 5, 6], [2]]
RESPONSES = [[3, 0], [5, 6, 1], [2], [1, 1, 4, 0]]  # 0 is EOS; the second and third don't end
SCORES, ENDED = [1.0, -0.5, 0.3, 2.0], [True, False, False, True]
SCHEDULE_SEED = 5


class Body(torch.nn.Module):
    """A critic: GPT-2's hidden states and a linear head, in float64 too."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, input_ids, **inputs):
        return self.head(self.backbone(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state).squeeze(-1)


def models():
    """(policy, reference, critic) of a few hundred parameters each."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=8, n_embd=4, n_layer=1, n_head=2, n_inner=4, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, initializer_range=0.6, attn_implementation="eager",
    )  # fmt: skip
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    critic = Body(GPT2LMHeadModel(config).transformer, torch.nn.Linear(4, 1))
    return policy.eval(), reference.eval(), critic.eval()


# -- brute force ------------------------------------------------------------------------------------------------------


def log_softmax_at(logits, token):
    scaled = logits / TEMPERATURE
    return scaled[token] - math.log(np.exp(scaled).sum())


def plain_logprobs(model, rows):
    """Log-prob of each response token, row by row without padding."""
    result = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[row] + RESPONSES[row]])).logits[0].numpy()
        start = len(PROMPTS[row])
        result.append([log_softmax_at(logits[start + t - 1], token) for t, token in enumerate(RESPONSES[row])])
    return result


def plain_entropies(model, rows):
    result = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[row] + RESPONSES[row]])).logits[0].numpy()
        start = len(PROMPTS[row])
        each = []
        for t in range(len(RESPONSES[row])):
            p = [math.exp(log_softmax_at(logits[start + t - 1], token)) for token in range(VOCAB)]
            each.append(-sum(q * math.log(q) for q in p))
        result.append(each)
    return result


def plain_values(model, rows):
    result = []
    for row in rows:
        with torch.no_grad():
            values = model(torch.tensor([PROMPTS[row] + RESPONSES[row]]))[0].tolist()
        start = len(PROMPTS[row])
        result.append([values[start + t - 1] for t in range(len(RESPONSES[row]))])
    return result


def plain_targets(old, ref, values, penalty):
    """Whitened advantages and returns, from the definitions: sums of discounted deltas."""
    advantages, returns = [], []
    for row in range(4):
        rewards = [-KL_COEF * (a - b) for a, b in zip(old[row], ref[row], strict=True)]
        rewards[-1] += SCORES[row] - (0.0 if ENDED[row] else penalty)
        after = [*values[row][1:], 0.0]
        deltas = [r + GAMMA * n - v for r, n, v in zip(rewards, after, values[row], strict=True)]
        steps = range(len(deltas))
        mine = [sum((GAMMA * LAMBDA) ** (k - t) * deltas[k] for k in steps if k >= t) for t in steps]
        advantages.append(mine)
        returns.append([a + v for a, v in zip(mine, values[row], strict=True)])
    every = [a for row in advantages for a in row]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / len(every) + 1e-8)
    return [[(a - mean) / deviation for a in row] for row in advantages], returns


def plain_policy_loss(model, rows, old, advantages, ref, extra, drawn):
    """Decoupled PPO (arXiv 2110.00641) with IMPALA's truncation; without a cap plain PPO."""
    now = plain_logprobs(model, rows)
    entropies = plain_entropies(model, rows) if extra["entropy_coef"] else now
    total, tokens = 0.0, sum(len(RESPONSES[row]) for row in rows)
    for place, row in enumerate(rows):
        length = len(RESPONSES[row])
        weight = 1 / tokens if extra["aggregation"] == "token" else 1 / (len(rows) * length)
        for t in range(length):
            ratio, advantage = math.exp(now[place][t] - old[row][t]), advantages[row][t]
            loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - CLIP), 1 + CLIP))
            if extra["cap"] is not None:
                loss *= min(math.exp(old[row][t]) / math.exp(drawn[row][t]), extra["cap"])
            if extra["kl_loss"] == "k3":
                gap = ref[row][t] - now[place][t]
                loss += KL_COEF * (math.exp(gap) - 1 - gap)
            total += weight * (loss - extra["entropy_coef"] * entropies[place][t])
    return total


def plain_value_loss(model, rows, old_values, returns):
    now = plain_values(model, rows)
    total, tokens = 0.0, sum(len(RESPONSES[row]) for row in rows)
    for place, row in enumerate(rows):
        for v, old, target in zip(now[place], old_values[row], returns[row], strict=True):
            clipped = min(max(v, old - VALUE_CLIP), old + VALUE_CLIP)
            total += 0.5 * max((v - target) ** 2, (clipped - target) ** 2) / tokens
    return VF_COEF * total


def plain_train(model, loss, schedule):
    """Finite differences, clipping of the global norm, Adam: `model` (float64) is changed in place."""
    parameters = list(model.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step, rows in enumerate(schedule, start=1):
        gradients = []
        for parameter in parameters:
            flat, gradient = parameter.data.view(-1), torch.zeros(parameter.numel(), dtype=torch.float64)
            for i in range(flat.numel()):
                middle = flat[i].item()
                flat[i] = middle + 1e-6
                up = loss(model, rows)
                flat[i] = middle - 1e-6
                down = loss(model, rows)
                flat[i] = middle
                gradient[i] = (up - down) / 2e-6
            gradients.append(gradient.view_as(parameter))
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        factor = min(1.0, MAX_NORM / (norm + 1e-6))
        for parameter, gradient, (m, v) in zip(parameters, gradients, moments, strict=True):
            gradient = gradient * factor
            m.mul_(0.9).add_(0.1 * gradient)
            v.mul_(0.999).add_(0.001 * gradient**2)
            corrected = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + EPS)
            parameter.data -= LR * corrected


# -- the product ------------------------------------------------------------------------------------------------------


def shards_of(settings, policy, reference, critic, drawn=None):
    """What the roles make of two chunks with the four rows. drawn: each row's rollout_logprobs."""
    drawn = [[0.0] * len(ids) for ids in RESPONSES] if drawn is None else drawn
    chunks = []
    for chunk, rows in enumerate(((0, 1, 2), (3,))):
        sequences = Sequences.of(*([np.array(ids[row]) for row in rows] for ids in (PROMPTS, RESPONSES)))
        chunk = Chunk(step=0, index=chunk, prompt_indices=rows, sample_indices=(0,) * len(rows))
        chunks.append(RolloutBatch(
            chunk=chunk, policy_version=0, sequences=sequences, ended=np.array([ENDED[row] for row in rows]),
            rollout_logprobs=np.array([value for row in rows for value in drawn[row]], np.float32),
        ))  # fmt: skip
    scores = [Scores(total=np.array(part, np.float32)) for part in (SCORES[:3], SCORES[3:])]
    old = [policy.logprobs(chunk) for chunk in chunks]
    ref = [reference.logprobs(chunk) for chunk in chunks]
    values = [critic.values(chunk) for chunk in chunks]
    return ExperienceMaker(settings).assemble(chunks, scores, ref, old, values, KL_COEF)


PLAIN = PolicyLossConfig(
    clip_range=CLIP, clip_range_high=CLIP, dual_clip=None, aggregation="token", max_new_tokens=4, kl_loss=None,
    entropy_coef=0.0, max_approx_kl=None,
)  # fmt: skip


def policy_trainer(model, microbatch_size, options):
    module = LogprobModel(model, temperature=TEMPERATURE, compute_dtype=torch.float32)
    return PolicyTrainer(TorchEngine(module, MAX_NORM), microbatch_size=microbatch_size, config=options)


def critic_trainer(critic, microbatch_size):
    module = ValueModel(critic, compute_dtype=torch.float32)
    return CriticTrainer(
        TorchEngine(module, MAX_NORM), microbatch_size=microbatch_size, value_clip_range=VALUE_CLIP, vf_coef=VF_COEF
    )


EXTRAS = {
    "ppo": {"kl_loss": None, "aggregation": "token", "entropy_coef": 0.0, "cap": None},
    "kl in the loss, means of means, entropy": {
        "kl_loss": "k3", "aggregation": "sequence_mean", "entropy_coef": 0.05, "cap": None,
    },
    "an older policy drew, kl in the loss": {
        "kl_loss": "k3", "aggregation": "sequence_mean", "entropy_coef": 0.05, "cap": 1.3,
    },
}  # fmt: skip


@pytest.mark.parametrize("extra", [
    pytest.param(extra, id=name, marks=pytest.mark.thorough if name.startswith("kl in") else ()) for name, extra in EXTRAS.items()
])  # fmt: skip
def test_one_update_is_that_of_the_formulas(extra):
    policy, reference, critic = models()
    options = AdvantageConfig(
        advantage=ADVANTAGES["gae"], group_size=1, kl_in_reward=extra["kl_loss"] is None, kl_estimator="k1", gamma=GAMMA,
        gae_lambda=LAMBDA, score_clip=None, missing_eos_penalty=0.4,
        missing_eos_score=None, overlong_buffer=0, max_new_tokens=4, whiten_rewards=False,
        whiten_advantages=True,
    )  # fmt: skip
    settings = ExperienceConfig(
        advantages=options, minibatch_size=2, ppo_epochs=2, policy_ranks=1, critic_ranks=1, seed=SCHEDULE_SEED,
        importance_cap=extra["cap"],
    )  # fmt: skip
    exact = [copy.deepcopy(model).double() for model in (policy, reference, critic)]

    drawn = plain_logprobs(exact[1], range(4))  # any other model will do
    mine = replace(PLAIN, **{name: value for name, value in extra.items() if name != "cap"})
    trainers = policy_trainer(policy, 1, mine), critic_trainer(critic, 2)
    frozen = policy_trainer(reference, 4, mine)
    told, (policy_shard,), (critic_shard,) = shards_of(settings, trainers[0], frozen, trainers[1], drawn)
    schedule = [step.rows.tolist() for step in policy_shard.schedule]
    assert sorted(sum(schedule[:2], [])) == sorted(sum(schedule[2:], [])) == [0, 1, 2, 3]
    stats = trainers[0].update(policy_shard, LR, KL_COEF)
    trainers[1].update(critic_shard, LR)
    assert 0.0 < stats["policy/clip_frac"] < 1.0, "an update that clips nothing would prove less"

    old, ref = plain_logprobs(exact[0], range(4)), plain_logprobs(exact[1], range(4))
    values = plain_values(exact[2], range(4))
    if extra["kl_loss"] is None:
        advantages, returns = plain_targets(old, ref, values, penalty=0.4)
    else:
        advantages, returns = plain_targets(old, old, values, penalty=0.4)  # no KL in the reward
    if extra["cap"] is not None:
        weights = [
            math.exp(a - b) for row, other in zip(old, drawn, strict=True) for a, b in zip(row, other, strict=True)
        ]
        capped = sum(weight > extra["cap"] for weight in weights) / len(weights)
        assert 0.0 < capped < 1.0 and told["rollout/importance_capped_frac"] == pytest.approx(capped)
    starts = [copy.deepcopy(model) for model in exact]
    plain_train(exact[0], lambda m, rows: plain_policy_loss(m, rows, old, advantages, ref, extra, drawn), schedule)
    trained_models = [(policy, exact[0], starts[0])]
    if extra == EXTRAS["ppo"]:  # the others change the policy's loss alone
        plain_train(exact[2], lambda m, rows: plain_value_loss(m, rows, values, returns), schedule)
        trained_models.append((critic, exact[2], starts[2]))
    for trained, wanted, start in trained_models:
        for (name, ours), theirs, before in zip(
            trained.named_parameters(), wanted.parameters(), start.parameters(), strict=True
        ):
            assert float((theirs - before).detach().abs().max()) > LR / 4, name
            gap = float((ours.double() - theirs).detach().abs().max())
            keys = name.endswith("c_attn.bias")
            saw(
                f"weights after one update at rate 2e-2: float64 brute force{', biases of the keys' if keys else ''}",
                gap,
            )
            # The bias of the keys cancels in the softmax: its gradient is nothing but rounding, which Adam blows up.
            assert gap < (LR / 100 if keys else LR / 1000), f"{name}: {gap}"


def test_the_update_stops_when_the_policy_has_moved_far_enough():
    """At a small rate approx_kl of the minibatches rises from 0, so their mean lies between two of them."""
    options = AdvantageConfig(
        advantage=ADVANTAGES["gae"], group_size=1, kl_in_reward=True, kl_estimator="k1", gamma=1.0, gae_lambda=0.95,
        score_clip=None, missing_eos_penalty=0.0,
        missing_eos_score=None, overlong_buffer=0, max_new_tokens=4, whiten_rewards=False, whiten_advantages=True,
    )  # fmt: skip
    settings = ExperienceConfig(
        advantages=options, minibatch_size=4, ppo_epochs=6, policy_ranks=1, critic_ranks=1, seed=SCHEDULE_SEED
    )

    def update(max_approx_kl, of_other_ranks=0.0):
        policy, reference, critic = models()
        mine = replace(PLAIN, max_approx_kl=max_approx_kl)
        policy, reference = (policy_trainer(model, 4, mine) for model in (policy, reference))
        policy.engine.sum_over_ranks = lambda value: value + of_other_ranks
        _, (shard,), _ = shards_of(settings, policy, reference, critic_trainer(critic, 4))
        return policy.update(shard, 0.002, KL_COEF)

    whole = update(None)
    assert whole["policy/optimiser_steps"] == 6
    assert update(1e-12)["policy/optimiser_steps"] == 2
    assert update(0.5, of_other_ranks=1.0)["policy/optimiser_steps"] == 1, "ranks stop together or wait for ever"
    assert 2 < update(whole["policy/approx_kl"])["policy/optimiser_steps"] < 6

"""What must not matter: how a minibatch is cut, the order of its rows, how it is padded, how many ranks share it.

Properties over random batches of random lengths on the real roles, to float tolerance; contract: the same step, the same
result. Bitwise claims (which actor a chunk goes to, a resumed run) are in test_loop.py, ZeRO stages in
test_deepspeed_engine.py and test_ppo_ray.py.
"""

import copy

import numpy as np
import pytest
import torch
from differences import saw
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import TorchEngine
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ray.algorithms.experience import AdvantageConfig
from rlhf_ray.messages import Chunk, RolloutBatch, Scores, Sequences, TokenValues
from rlhf_ray.roles.configs import PolicyLossConfig
from rlhf_ray.roles.experience_maker import ExperienceConfig, ExperienceMaker
from rlhf_ray.roles.policy_trainer import PolicyTrainer
from rlhf_ray.tables.advantages import ADVANTAGES
from rlhf_ray.training.forward import LogprobModel

VOCAB, LONGEST = 11, 6
CONFIG = GPT2Config(
    vocab_size=VOCAB, n_positions=16, n_embd=8, n_layer=1, n_head=2, initializer_range=0.4, attn_pdrop=0, embd_pdrop=0,
    resid_pdrop=0, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
)  # fmt: skip
AGGREGATIONS = ("token", "sequence_sum", "sequence_mean", "constant")


@st.composite
def batches(draw):
    """(prompts, responses, what the other roles say about them) of 2 to 8 rows in groups of two."""
    rows = 2 * draw(st.integers(1, 4))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))

    def ids(longest):
        return [generator.integers(0, VOCAB, generator.integers(1, longest + 1)) for _ in range(rows)]

    prompts, responses = ids(5), ids(LONGEST)
    floats = [[generator.normal(size=len(ids)).astype(np.float32) for ids in responses] for _ in range(2)]
    return prompts, responses, *floats, generator.normal(size=rows).astype(np.float32), generator.random(rows) < 0.5


def start_model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(CONFIG).eval()


START = start_model()


class Gradients(TorchEngine):
    """An engine that adds gradients up and takes no step."""

    def step(self, microbatches, loss_of, *, learning_rate):
        for inputs, rest in microbatches:
            loss_of(self.module(*inputs), rest).backward()
        return 0.0

    def gradients(self):
        return torch.cat([parameter.grad.flatten() for parameter in self.module.parameters()])


def gradients(
    batch, order=None, *, microbatch_size=8, tokens=None, packed=True, ranks=1, cuts=(), aggregation="token", advantage="gae",
    kl="k2",
):  # fmt: skip
    """The gradient of one update over all rows as one minibatch, and the statistics.

    order: of the rows, which come as chunks that end at `cuts`.
    """
    prompts, responses, ref, values, scores, ended = batch
    order = list(range(len(prompts))) if order is None else order
    config = PolicyLossConfig(
        clip_range=0.2, clip_range_high=0.3, dual_clip=2.0, aggregation=aggregation, max_new_tokens=LONGEST, kl_loss=kl,
        entropy_coef=0.1, max_approx_kl=None,
    )  # fmt: skip
    model = copy.deepcopy(START)
    module = LogprobModel(model, temperature=0.9, compute_dtype=torch.float32)
    module.packed = packed
    trainer = PolicyTrainer(Gradients(module), microbatch_size=microbatch_size, microbatch_tokens=tokens, config=config)
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(order)}), len(order)]
    chunks = []
    for chunk, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        rows = order[first:last]
        sequences = Sequences.of([prompts[row] for row in rows], [responses[row] for row in rows])
        chunks.append(RolloutBatch(
            chunk=Chunk(step=0, index=chunk, prompt_indices=tuple(rows), sample_indices=(0,) * len(rows)),
            policy_version=0, sequences=sequences, ended=ended[rows],
            rollout_logprobs=np.zeros(len(sequences.response_ids), np.float32),
        ))  # fmt: skip

    def told(what, chunk):
        return TokenValues(values=np.concatenate([what[row] for row in chunk.chunk.prompt_indices]))

    assemble = AdvantageConfig(
        advantage=ADVANTAGES[advantage], group_size=1 if advantage in ("gae", "reinforce_pp") else 2, kl_in_reward=kl is None,
        kl_estimator="k1", gamma=0.95, gae_lambda=0.9, score_clip=None, missing_eos_penalty=0.5,
        missing_eos_score=None, overlong_buffer=2,
        max_new_tokens=LONGEST, whiten_rewards=False, whiten_advantages=advantage == "gae",
    )  # fmt: skip
    experience = ExperienceMaker(ExperienceConfig(
        advantages=assemble, minibatch_size=len(order), ppo_epochs=1, policy_ranks=ranks, critic_ranks=1, seed=0,
    ))  # fmt: skip
    ref = [told(ref, chunk) for chunk in chunks]
    old = [told([row - 0.3 for row in trainer_logprobs(trainer, batch)], chunk) for chunk in chunks]
    stats, shards, _ = experience.assemble(
        chunks, [Scores(total=scores[list(chunk.chunk.prompt_indices)]) for chunk in chunks], ref, old,
        [told(values, chunk) for chunk in chunks] if advantage == "gae" else [], kl_coef=0.1,
    )  # fmt: skip
    parts = [trainer.update(shard, 0.0, 0.1) for shard in shards]
    summed = {
        name: sum(part[name] for part in parts) for name in ("policy/loss", "policy/clip_frac", "policy/approx_kl")
    }
    return trainer.engine.gradients(), stats | summed


def trainer_logprobs(trainer, batch):
    """Each row's log-probs by itself, whatever chunk it will be in."""
    prompts, responses, *_ = batch
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        chunk = RolloutBatch(
            chunk=Chunk(step=0, index=0, prompt_indices=(0,), sample_indices=(0,)), policy_version=0,
            sequences=Sequences.of([prompt], [response]), ended=np.array([True]),
            rollout_logprobs=np.zeros(len(response), np.float32),
        )  # fmt: skip
        rows.append(trainer.logprobs(chunk).values)
    return rows


def same(one, other, what):
    largest = float(one[0].abs().max())
    assert largest > 1e-4, "a gradient of nothing proves nothing"
    saw(f"gradient, share of its largest entry: {what}", float((one[0] - other[0]).abs().max()) / max(largest, 1.0))
    torch.testing.assert_close(one[0], other[0], atol=2e-5, rtol=1e-4)
    for name, value in one[1].items():
        assert other[1][name] == pytest.approx(value, abs=2e-5, rel=1e-4, nan_ok=True), name


@settings(max_examples=20, deadline=None)
@given(batch=batches(), microbatch_size=st.integers(1, 8), aggregation=st.sampled_from(AGGREGATIONS))
def test_how_a_minibatch_is_cut_changes_nothing(batch, microbatch_size, aggregation):
    """Rows alone have no padding at all, rows together have that of the longest."""
    whole = gradients(batch, aggregation=aggregation)
    same(whole, gradients(batch, aggregation=aggregation, microbatch_size=microbatch_size), "microbatches")
    padded = gradients(batch, aggregation=aggregation, microbatch_size=microbatch_size, packed=False)
    same(whole, padded, "padded or packed")


@settings(max_examples=15, deadline=None)
@given(batch=batches(), tokens=st.integers(8, 40), ranks=st.integers(1, 2))
def test_a_token_budget_changes_nothing(batch, tokens, ranks):
    same(gradients(batch), gradients(batch, tokens=tokens, ranks=min(ranks, len(batch[0]))), "token budget")


@settings(max_examples=20, deadline=None)
@given(batch=batches(), ranks=st.integers(2, 4), aggregation=st.sampled_from(AGGREGATIONS))
def test_how_many_ranks_share_it_changes_nothing(batch, ranks, aggregation):
    """Ranks hold different numbers of rows and tokens here; their gradients and statistics add up to the whole's."""
    ranks = min(ranks, len(batch[0]))
    shared = gradients(batch, aggregation=aggregation, ranks=ranks)
    same(gradients(batch, aggregation=aggregation), shared, "ranks that share a minibatch")


@settings(max_examples=20, deadline=None)
@given(batch=batches(), data=st.data(), advantage=st.sampled_from(["gae", "reinforce_pp", "rloo", "grpo", "dr_grpo"]))
def test_the_order_of_prompts_and_units_changes_nothing(batch, data, advantage):
    """Groups of two samples stay together and change places; chunks end anywhere, within groups too."""
    groups = data.draw(st.permutations(range(len(batch[0]) // 2)))
    cuts = data.draw(st.lists(st.integers(1, 7), max_size=3))
    order = [row for group in groups for row in (2 * group, 2 * group + 1)]
    plain = gradients(batch, advantage=advantage, kl=None)
    other = gradients(batch, order, cuts=cuts, advantage=advantage, kl=None)
    same(plain, other, "order of prompts, chunks")

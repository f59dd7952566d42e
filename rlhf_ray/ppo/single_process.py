"""PPO from human feedback in one process. Start here, and read from top to bottom: no Ray, no DeepSpeed, no actors.

    python -m rlhf_ray.ppo.single_process runs/demo --steps 5

The run folder needs a trained SFT model and a trained reward model. Policy and critic stay in memory; nothing is written.

The distributed run calls the same algorithm functions in the same order. So both take the same steps, and
tests/test_single_process.py compares their weights. REPORT.md, section 3, explains each step.

Shapes: B responses in the batch, T tokens of the longest response. Rows are padded on the right. `action_mask` [B, T] is
True on the tokens of a response and False in the padding, so padding never counts.
"""

from __future__ import annotations

# torch annotates backward, step and from_numpy in part only.
# pyright: reportUnknownMemberType=false
import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_ray.algorithms.experience import Assembled, assemble
from rlhf_ray.algorithms.finite_values import BadNumber
from rlhf_ray.algorithms.losses import policy_loss, token_weights, value_loss
from rlhf_ray.algorithms.schedule import draw_seed, linear_anneal, minibatch_rows
from rlhf_ray.config import Recipe
from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.data.role_files import read_prompt_columns, read_prompts
from rlhf_ray.errors import NotFinite, RunFailed, UserError
from rlhf_ray.messages import RolloutBatch, unflatten
from rlhf_ray.models.critic import build_critic
from rlhf_ray.models.finite_weights import refuse_bad
from rlhf_ray.models.load import disable_dropout, load_causal_lm
from rlhf_ray.ppo.single_process_keys import refuse_other_keys
from rlhf_ray.ppo.step import check_enough, cut_chunks, step_prompts
from rlhf_ray.rewards.from_recipe import reward_scorer
from rlhf_ray.rewards.standing import refuse_weak_reward
from rlhf_ray.roles.configs import experience_config
from rlhf_ray.roles.experience_maker import EXPERIENCE_REMEDY, support_stats
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.reward import Reward
from rlhf_ray.roles.trainer import UPDATE_REMEDY
from rlhf_ray.runs.run_folder import RunFolder, reference_of, start_model
from rlhf_ray.training.forward import LogprobModel, ValueModel, token_batch
from rlhf_ray.training.padding import pad_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeUpdate:
    """What the models say about each token before the update. All [B, T]."""

    action_mask: torch.Tensor  # True where the policy chose the token
    old_logprobs: torch.Tensor  # of the policy
    ref_logprobs: torch.Tensor  # of the reference
    old_values: torch.Tensor  # of the critic


class SingleProcessPPO:
    """The five models of PPO and one method, `step`. Everything is computed in float32.

    Raises UserError if the recipe sets a key that this page does not act on (see `single_process_keys`).
    """

    def __init__(self, recipe: Recipe, folder: RunFolder):
        refuse_other_keys(recipe)
        refuse_weak_reward(recipe, folder)
        ppo, generation = recipe.ppo, recipe.generation
        self.recipe = recipe
        start = start_model(recipe, folder)
        prompts = read_prompts(folder)
        self.prompts = len(prompts)
        check_enough(self.prompts, ppo.rollout_batch_size)

        # The generator draws the responses, with a KV cache. It gets the policy's weights after every step.
        self.generator = Generator(
            start, prompts, [], sampling=generation.sampling, seed=recipe.ppo_seed, dtype=torch.float32
        )

        # The reward model reads a prompt and a response and gives one score. It is frozen.
        scorer = reward_scorer(recipe, folder, torch.float32, "cpu")
        columns = read_prompt_columns(folder), read_prompt_columns(folder, "eval_prompts")  # for functions that ask
        self.reward = Reward(scorer, start, stop=generation.stop, columns=columns)

        # The policy is trained. The reference is the model that the policy starts from, unless ppo.reference names another one;
        # it is frozen. Both give the log-probs [B, T] of responses.
        policy, reference = load_causal_lm(start), load_causal_lm(reference_of(recipe, folder))

        # The critic is trained beside the policy. Before each token it predicts the reward still to come, [B, T].
        critic_start = str(folder.stage("reward").model) if ppo.critic_init == "reward" else start
        critic = build_critic(critic_start, ppo.critic_init)

        for model in (policy, reference, critic):
            disable_dropout(model)  # with dropout, old and new log-probs of the same weights would differ
        self.policy = LogprobModel(policy, temperature=generation.temperature, compute_dtype=torch.float32)
        self.reference = LogprobModel(reference, temperature=generation.temperature, compute_dtype=torch.float32)
        self.critic = ValueModel(critic, compute_dtype=torch.float32)
        self.policy_adam = torch.optim.AdamW(self.policy.parameters(), lr=0.0, eps=ppo.adam_eps, weight_decay=0.0)
        self.critic_adam = torch.optim.AdamW(self.critic.parameters(), lr=0.0, eps=ppo.adam_eps, weight_decay=0.0)

    def step(self, step: int) -> dict[str, float]:
        """One iteration of PPO. Returns its metrics."""
        rollout = self.draw(step)  # 1. a response to each prompt of this step
        scores = self.score(rollout)  # 2. how good each response is, [B]
        before = self.evaluate(rollout)  # 3. log-probs and values of each token, [B, T]
        targets = self.assemble(rollout, scores, before)  # 4. advantages and returns, [B, T]
        stats = self.update(step, rollout, before, targets)  # 5. several passes over the batch
        self.sync()  # 6. the generator gets the new weights
        return targets.stats | stats | support_stats(rollout.sequences)

    def draw(self, step: int) -> RolloutBatch:
        """1. Draw the responses. Every draw has its own seed, made from (seed, step, prompt, sample)."""
        ppo = self.recipe.ppo
        prompts = step_prompts(step, self.prompts, ppo.rollout_batch_size, self.recipe.ppo_seed)
        (chunk,) = cut_chunks(step, prompts, ppo.samples_per_prompt, ppo.rollouts_per_step)
        return self.generator.generate(chunk)

    def score(self, rollout: RolloutBatch) -> torch.Tensor:
        """2. Score the texts: one number per response, [B]."""
        return torch.from_numpy(self.reward.score(rollout).total)

    @torch.no_grad()
    def evaluate(self, rollout: RolloutBatch) -> BeforeUpdate:
        """3. One forward pass of policy, reference and critic over the whole batch."""
        sequences = rollout.sequences
        batch = token_batch(sequences.prompts(), sequences.responses(), sequences.supports(), packed=False)
        return BeforeUpdate(
            action_mask=batch.action_mask,
            old_logprobs=self.policy(batch),
            ref_logprobs=self.reference(batch),
            old_values=self.critic(batch),
        )

    def assemble(self, rollout: RolloutBatch, scores: torch.Tensor, before: BeforeUpdate) -> Assembled:
        """4. Rewards, then advantages and returns.

        The reward of a token is -kl_coef * (old_logprob - ref_logprob). The last token of a response gets the score too, clipped
        and less the penalty for a response that did not end (`experience.penalise`). GAE makes advantages and returns from
        rewards and values. The advantages are whitened over the batch.
        """
        rollout_logprobs = unflatten(rollout.rollout_logprobs, rollout.sequences.response_lengths)
        try:
            return assemble(
                scores, torch.from_numpy(rollout.ended), pad_tokens(rollout_logprobs), before.old_logprobs,
                before.ref_logprobs, before.old_values, before.action_mask, experience_config(self.recipe).advantages,
                kl_coef=self.recipe.ppo.kl_coef,
            )  # fmt: skip
        except BadNumber as error:
            raise NotFinite(f"{error} ({rollout.chunk.where(error.row)}); {EXPERIENCE_REMEDY}") from error

    def update(
        self, step: int, rollout: RolloutBatch, before: BeforeUpdate, targets: Assembled
    ) -> dict[str, float]:
        """5. ppo_epochs passes over the batch, one optimiser step per minibatch. Returns statistics of the last one.

        In the first minibatch the ratio of new to old probabilities is 1. After that the policy has moved away from the
        one that drew the responses. The clip keeps it from moving too far.
        """
        ppo = self.recipe.ppo
        rate = linear_anneal(1.0, step, ppo.steps) if ppo.anneal else 1.0
        seed = draw_seed(self.recipe.ppo_seed, "minibatches", step)
        stats: dict[str, torch.Tensor] = {}
        for rows in minibatch_rows(len(rollout.sequences), ppo.minibatch_size, ppo.ppo_epochs, seed):
            stats = self._optimiser_step(rows, rate, rollout, before, targets)
        return {name: float(value) for name, value in stats.items()}

    def _optimiser_step(
        self, rows: list[int], rate: float, rollout: RolloutBatch, before: BeforeUpdate, targets: Assembled
    ) -> dict[str, torch.Tensor]:
        """One optimiser step of policy and critic on `rows` of the batch, b of them. `rate` scales the learning rates."""
        ppo = self.recipe.ppo
        assert targets.returns is not None  # GAE always gives returns
        minibatch = rollout.sequences.rows(rows)
        batch = token_batch(minibatch.prompts(), minibatch.responses(), minibatch.supports(), packed=False)
        longest = batch.action_mask.shape[1]  # of the minibatch: T or less
        mask, old_logprobs, old_values, advantages, returns = (
            tensor[rows, :longest]
            for tensor in (before.action_mask, before.old_logprobs, before.old_values, targets.advantages, targets.returns)
        )
        num_tokens = int(mask.sum())

        weights = token_weights(
            mask, ppo.loss_aggregation, num_tokens=num_tokens, num_sequences=len(rows),
            max_new_tokens=self.recipe.generation.max_new_tokens,
        )  # fmt: skip
        loss, policy_stats = policy_loss(
            self.policy(batch), old_logprobs, advantages, mask, weights, clip_range=ppo.clip_range,
            clip_range_high=ppo.clip_range_high or ppo.clip_range, dual_clip=ppo.dual_clip, num_tokens=num_tokens,
        )  # fmt: skip
        self._descend(loss, self.policy_adam, ppo.learning_rate * rate)

        loss, value_stats = value_loss(
            self.critic(batch), old_values, returns, mask, value_clip_range=ppo.value_clip_range, num_tokens=num_tokens
        )
        self._descend(ppo.vf_coef * loss, self.critic_adam, ppo.critic_learning_rate * rate)
        return policy_stats | value_stats

    def _descend(self, loss: torch.Tensor, adam: torch.optim.AdamW, learning_rate: float) -> None:
        """One step of Adam down the gradient of `loss`, whose norm is clipped."""
        (group,) = adam.param_groups
        group["lr"] = learning_rate
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(group["params"], self.recipe.ppo.max_grad_norm or float("inf"))
        if not (torch.isfinite(loss) and torch.isfinite(norm)):  # one such step would make every weight NaN
            raise NotFinite(f"the loss is {float(loss.detach())} and the norm of its gradient {float(norm)}; {UPDATE_REMEDY}")
        adam.step()

    def sync(self) -> None:
        """6. The generator gets the policy's weights, so the next responses are the new policy's."""
        refuse_bad(self.policy.model.named_parameters(), "the policy's weights are not given to the generator")
        self.generator.engine.load_weights(dict(self.policy.model.named_parameters()))


def train(recipe: Recipe, folder: RunFolder, steps: int) -> Iterator[dict[str, float]]:
    """Take the first `steps` steps. Yields the metrics of each."""
    if steps < 1:
        raise UserError(f"{steps} PPO steps train nothing; give --steps 1 or more")
    ppo = SingleProcessPPO(recipe, folder)
    for step in range(steps):
        yield ppo.step(step)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_ray.ppo.single_process", description="PPO in one process, from a run's SFT and reward models."
    )
    parser.add_argument("run_dir", type=Path, help="a run folder whose sft and reward stages are done")
    parser.add_argument("--steps", type=int, default=5, help="PPO steps")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run_dir.absolute())
    try:
        recipe = load_recipe(str(folder.recipe))
        for step, metrics in enumerate(train(recipe, folder, arguments.steps), start=1):
            score, kl, length = (metrics[f"objective/{name}"] for name in ("score", "kl", "response_length"))
            print(f"step {step}   score {score:.3f}   kl {kl:.3f} nats   length {length:.1f}")
    except (UserError, RunFailed) as error:
        print(f"single_process: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()

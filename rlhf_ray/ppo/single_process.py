"""PPO from human feedback on one process, to be read from top to bottom: no Ray, no DeepSpeed, no actors.

It calls the algorithm functions that the distributed loop calls, in the same order, and takes the same steps
(tests/test_plain_ppo.py compares the weights). REPORT.md, section 3, walks through it. From a run folder whose SFT model and
reward model are trained:

    python -m rlhf_ray.ppo.single_process runs/demo --steps 5

Shapes: B responses, T tokens of the longest one. The policy and the critic stay in memory; nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from rlhf_ray.algorithms.experience import assemble
from rlhf_ray.algorithms.losses import Stats, policy_loss, token_weights, value_loss
from rlhf_ray.algorithms.schedule import draw_seed, linear_anneal, minibatch_rows
from rlhf_ray.config import Recipe
from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.data.store import read_prompts
from rlhf_ray.errors import UserError
from rlhf_ray.messages import unflatten
from rlhf_ray.models.critic import build_critic
from rlhf_ray.models.load import disable_dropout, load_causal_lm
from rlhf_ray.ppo.step import cut_chunks, step_prompts
from rlhf_ray.rewards.scorer import RewardScorer
from rlhf_ray.roles.configs import experience_config
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.reward import Reward
from rlhf_ray.runs.run_folder import RunFolder, start_model
from rlhf_ray.training.forward import LogprobModel, ValueModel, token_batch
from rlhf_ray.training.padding import pad_tokens


class PlainPPO:
    """The models of PPO and one method, `step`. float32 throughout, whatever the recipe says.

    Raises UserError for a recipe of another algorithm than PPO with a critic and the KL in the reward.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder):
        ppo, temperature = recipe.ppo, recipe.generation.temperature
        parts = [key for key in (*recipe.adapters, *recipe.frozen_layers) if key.startswith("ppo.")]
        if parts:
            raise UserError(
                f"plain_ppo trains all weights, and the recipe sets {', '.join(parts)}; run it with rlhf-ray run"
            )
        if ppo.steps_ahead > 0:
            raise UserError(
                f"plain_ppo draws and trains in turn, and ppo.steps_ahead is {ppo.steps_ahead}; set it to 0, or run it with "
                "rlhf-ray run"
            )
        members = 0 if recipe.reward is None else recipe.reward.members
        scored_otherwise = bool(ppo.rewards) or ppo.reward_function is not None or members != 1
        if not ppo.has_critic or ppo.kl_in != "reward" or ppo.entropy_coef > 0 or scored_otherwise:
            raise UserError(
                "plain_ppo shows PPO with a critic, one reward model and the KL in the reward; the recipe has "
                f"ppo.advantage {ppo.advantage}, kl_in {ppo.kl_in}; run it with rlhf-ray run"
            )
        self.recipe = recipe
        start = start_model(recipe, folder)
        prompts = read_prompts(folder)
        self.prompts = len(prompts)

        # Five models, three of them trained or copied from what is trained:
        #   generator  draws the responses (with a KV cache); gets the policy's weights after every step
        #   reward     reads a text and says how good it is; frozen
        #   reference  the model that PPO started from; frozen
        #   policy     what is trained; forward() gives the log-probs [B, T] of responses
        #   critic     guesses, before each token, the reward still to come [B, T]; trained beside the policy
        self.generator = Generator(
            start, prompts, [], sampling=recipe.generation.sampling, seed=recipe.ppo_seed, dtype=torch.float32
        )
        self.reward = Reward(RewardScorer(folder.stage("reward").model), start, stop=recipe.generation.stop)
        policy, reference = load_causal_lm(start), load_causal_lm(start)
        critic_start = folder.stage("reward").model if ppo.critic_init == "reward" else start
        critic = build_critic(critic_start, ppo.critic_init)
        for model in (policy, reference, critic):
            disable_dropout(model)  # else old and new log-probs of the same weights would differ
        self.policy, self.reference = (
            LogprobModel(model, temperature=temperature, compute_dtype=torch.float32) for model in (policy, reference)
        )
        self.critic = ValueModel(critic, compute_dtype=torch.float32)
        self.policy_adam, self.critic_adam = (
            torch.optim.AdamW(model.parameters(), lr=0.0, eps=ppo.adam_eps, weight_decay=0.0)
            for model in (self.policy, self.critic)
        )

    def step(self, step: int) -> dict[str, float]:
        """One iteration: draw responses, score them, compute advantages, update -> metrics."""
        recipe, ppo = self.recipe, self.recipe.ppo

        # 1. Draw a response to each prompt of this step. Every draw has a seed of its own: (seed, step, prompt, sample).
        rows = step_prompts(step, self.prompts, ppo.rollout_batch_size, recipe.ppo_seed)
        (chunk,) = cut_chunks(step, rows, ppo.samples_per_prompt, ppo.rollouts_per_step)
        rollout = self.generator.generate(chunk)
        sequences = rollout.sequences

        # 2. Score the texts. One number a response, [B].
        scores = torch.from_numpy(self.reward.score(rollout).total)

        # 3. What the models say about each token before the update, all [B, T]. Rows are padded on the right; what stands
        #    in the padding never counts, because action_mask is False there.
        batch = token_batch(sequences.prompts(), sequences.responses(), packed=False)
        mask = batch.action_mask
        with torch.no_grad():
            old_logprobs, ref_logprobs, old_values = self.policy(batch), self.reference(batch), self.critic(batch)

        # 4. Rewards, advantages and returns: -kl_coef * (log p - log p_ref) at every token and the score at the last one;
        #    GAE; whitening over the batch.
        drawn = pad_tokens(unflatten(rollout.rollout_logprobs, sequences.response_lengths))
        config = experience_config(recipe)
        targets = assemble(
            scores, torch.from_numpy(rollout.ended), drawn, old_logprobs, ref_logprobs, old_values, mask, config.advantages,
            kl_coef=ppo.kl_coef,
        )  # fmt: skip

        assert targets.returns is not None, "there is a critic"

        # 5. Several passes over the batch in minibatches. In the first one the ratio is 1; then the policy has moved, and
        #    the clip keeps it from moving too far on old data.
        anneal = linear_anneal(1.0, step, ppo.steps) if ppo.anneal else 1.0
        seed = draw_seed(recipe.ppo_seed, "minibatches", step)
        stats: Stats = {}
        value_stats: Stats = {}
        for minibatch in minibatch_rows(len(sequences), ppo.minibatch_size, ppo.ppo_epochs, seed):
            rows = sequences.rows(minibatch)
            part = token_batch(rows.prompts(), rows.responses(), packed=False)
            width = part.action_mask.shape[1]  # the longest response of the minibatch
            picked = (old_logprobs, targets.advantages, old_values, targets.returns, mask)
            old, advantages, values_before, returns, counts = (tensor[minibatch, :width] for tensor in picked)
            num_tokens = int(counts.sum())
            weights = token_weights(
                counts, ppo.loss_aggregation, num_tokens=num_tokens, num_sequences=len(minibatch),
                max_new_tokens=recipe.generation.max_new_tokens,
            )  # fmt: skip
            loss, stats = policy_loss(
                self.policy(part), old, advantages, counts, weights, clip_range=ppo.clip_range,
                clip_range_high=ppo.clip_range_high or ppo.clip_range, dual_clip=ppo.dual_clip, num_tokens=num_tokens,
            )  # fmt: skip
            self._descend(loss, self.policy_adam, ppo.learning_rate * anneal)
            loss, value_stats = value_loss(
                self.critic(part), values_before, returns, counts, value_clip_range=ppo.value_clip_range,
                num_tokens=num_tokens,
            )  # fmt: skip
            self._descend(ppo.vf_coef * loss, self.critic_adam, ppo.critic_learning_rate * anneal)

        # 6. The generator gets the new weights, so the next step's responses are the new policy's.
        self.generator.engine.load_weights(dict(self.policy.model.named_parameters()))
        return targets.stats | {name: float(value) for name, value in (stats | value_stats).items()}

    def _descend(self, loss: torch.Tensor, adam: torch.optim.AdamW, learning_rate: float) -> None:
        group = adam.param_groups[0]
        group["lr"] = learning_rate
        adam.zero_grad()
        loss.backward()
        limit = self.recipe.ppo.max_grad_norm or float("inf")
        torch.nn.utils.clip_grad_norm_(group["params"], limit)
        adam.step()


def train(recipe: Recipe, folder: RunFolder, steps: int) -> Iterator[dict[str, float]]:
    """Metrics of each of the first `steps` steps."""
    ppo = PlainPPO(recipe, folder)
    for step in range(steps):
        yield ppo.step(step)


def main() -> None:
    parser = argparse.ArgumentParser(description="PPO on one process, from the SFT and reward model of a run folder.")
    parser.add_argument("run_dir", type=Path, help="a run folder whose sft and reward stages are done")
    parser.add_argument("--steps", type=int, default=5, help="PPO steps")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run_dir.absolute())
    try:
        recipe = load_recipe(str(folder.recipe))
        for step, metrics in enumerate(train(recipe, folder, arguments.steps), start=1):
            score, kl = metrics["objective/score"], metrics["objective/kl"]
            print(
                f"step {step}   score {score:.3f}   kl {kl:.3f} nats   length {metrics['objective/response_length']:.1f}"
            )
    except UserError as error:
        print(f"plain_ppo: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

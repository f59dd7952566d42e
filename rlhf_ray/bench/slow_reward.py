"""Does a slow reward function hold generation up?   python -m rlhf_ray.bench.slow_reward [steps]

A random 4.3 M-parameter GPT-2 answers 32 prompts of 32 tokens with 48 each, in chunks of 8, over real actors; a function
in a process of its own sleeps 0.1 s for each. Prints, for each step after the first, the seconds of generation, those that
the reward actor was busy, and those from the first prompt to the last score: their sum where nothing overlaps.
"""

import sys
import tempfile
import time
from pathlib import Path

SLEEP_S = 0.1


def sleepy(prompts, responses):
    time.sleep(SLEEP_S)
    return [float(len(responses[0]))]


def main(steps: int) -> None:
    from rlhf_ray.actors.ppo_stage import ray_roles
    from rlhf_ray.actors.session import ray_session
    from rlhf_ray.actors.wait import Waiter
    from rlhf_ray.bench.random_run import write_random_run
    from rlhf_ray.config import Recipe
    from rlhf_ray.ppo.step import StepConfig, cut_chunks, ppo_step, sync_weights
    from rlhf_ray.runs.run_folder import RunFolder

    role = {"cpus": 0.1, "threads": 1}
    recipe = Recipe.model_validate({
        "name": "slow-reward", "data": {"max_prompt_tokens": 32}, "generation": {"max_new_tokens": 48, "chunk_size": 8},
        "ppo": {"rollout_batch_size": 32, "minibatch_size": 32, "microbatch_size": 16, "ppo_epochs": 1,
                "precision": "float32", "reward_function": "slow_reward:sleepy", "reward_timeout_s": 30},
        "resources": dict.fromkeys(("generation", "reward", "reference", "policy", "critic"), role),
    })  # fmt: skip
    waiter = Waiter(600, "look at what else runs on this machine")
    with tempfile.TemporaryDirectory() as path, ray_session(None):
        folder = RunFolder(Path(path))
        write_random_run(recipe, folder, prompts=32, length=32)
        with ray_roles(recipe, folder, waiter) as roles:
            sync_weights(roles, 0)
            for step in range(steps + 1):
                metrics = ppo_step(roles, cut_chunks(step, range(32), 1, 8), StepConfig(
                    step=step, kl_coef=0.05, learning_rate=1e-5, critic_learning_rate=1e-5,
                    max_mismatch=100.0, max_mismatch_kl=100.0, max_first_approx_kl=1.0,
                )) | waiter.take_totals()  # fmt: skip
                if step > 0:
                    both = metrics["time/generate_s"] + metrics["time/score_s"]
                    print(
                        f"generation {metrics['busy/generation_s']:.2f} s   reward {metrics['busy/reward_s']:.2f} s   "
                        f"from the first prompt to the last score {both:.2f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)

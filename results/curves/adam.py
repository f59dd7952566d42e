"""Torch's Adam against TensorFlow's, whose epsilon is not bias-corrected: how far the first update moves a policy.

    python results/curves/adam.py runs/imdb [DATA]

The same rollouts, seed by seed, and two epochs of 128 episodes as one minibatch; then the k3 estimate of the KL to the policy
that drew them, and the share of clipped tokens. runs/imdb is a finished run of the recipe imdb (DATA: its data.root). Writes
adam.json beside this file; a setting that is there is not done again. Huang et al. 2024 ("The N implementation details of
RLHF with PPO") print 2.37e-3 against 3.75e-4 and 2.02 % against 0.52 % for GPT-2.
"""

import json
import sys
from pathlib import Path

import torch
import yaml

from rlhf_ray.config import Recipe
from rlhf_ray.ppo.single_process import SingleProcessPPO
from rlhf_ray.runs.run_folder import RunFolder

SEEDS = range(5)
SETTINGS = ((1e-5, 1e-5), (1e-4, 1e-5), (1e-5, 5e-5))  # learning rate, epsilon
OUT = Path(__file__).with_name("adam.json")


def first_update(run: Path, data: dict, *, seed: int, form: str, rate: float, eps: float) -> dict[str, float]:
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["data"] |= data
    values["generation"] |= {"max_new_tokens": 24, "min_new_tokens": 24, "temperature": 0.7}
    values["ppo"] |= {
        "seed": seed, "ppo_epochs": 3, "rollout_batch_size": 128, "minibatch_size": 128, "microbatch_size": 128,
        "learning_rate": rate, "adam_eps": eps, "kl_coef": 0.15, "whiten_rewards": True, "max_grad_norm": 0.0,
        "critic_init": "sft",
    }  # fmt: skip
    ppo = SingleProcessPPO(Recipe.model_validate(values), RunFolder(run))

    def as_in_tensorflow(adam: torch.optim.Adam, *_) -> None:
        steps = next((int(state["step"]) for state in adam.state.values()), 0) + 1
        adam.param_groups[0]["eps"] = eps / (1 - 0.999**steps) ** 0.5

    if form == "tensorflow":
        ppo.policy_adam.register_step_pre_hook(as_in_tensorflow)
    return ppo.step(0)  # its statistics are those of the last minibatch, the third: what two epochs have moved


def main() -> None:
    run, data = Path(sys.argv[1]).absolute(), {"root": sys.argv[2]} if len(sys.argv) > 2 else {}
    results = json.loads(OUT.read_text()) if OUT.exists() else []
    done = {(row["learning_rate"], row["adam_eps"]) for row in results}
    for rate, eps in SETTINGS:
        if (rate, eps) in done:
            continue
        row = {"learning_rate": rate, "adam_eps": eps}
        for form in ("torch", "tensorflow"):
            found = [first_update(run, data, seed=seed, form=form, rate=rate, eps=eps) for seed in SEEDS]
            for key in ("policy/approx_kl", "policy/clip_frac"):
                row[f"{form}/{key}"] = [one[key] for one in found]
        pairs = list(zip(row["torch/policy/approx_kl"], row["tensorflow/policy/approx_kl"], strict=True))
        row["ratio/policy/approx_kl"] = [one / other for one, other in pairs]
        results.append(row)
        OUT.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

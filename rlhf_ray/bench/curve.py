"""Whether `rlhf-ray bench ppo` and TRL's PPOTrainer learn alike: the score of each iteration, over seeds.

    python -m rlhf_ray.bench.curve [--size 4m] [--iterations 30] [--seeds 3]

The work of the benchmark (64 prompts of 32 tokens, 48 new ones, 4 epochs, one minibatch) with a vocabulary of 260, small enough
to learn something in a few minutes. Both read their models from the same folder: a random policy, and a reward model. Each token
of the vocabulary has a number; the reward model has learned their mean over a response. The critic starts from it. The learning
rate falls to zero, the KL coefficient is 0.05; TRL in float32, ours in the precision that it chooses. Writes curve_SIZE.json and
curve_SIZE.png beside this file; a seed whose result is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

from rlhf_ray.bench.flops import SIZES, Shape, Work, shape_of
from rlhf_ray.bench.random_run import bench_recipe, write_random_run
from rlhf_ray.bench.trl import SCRIPT, arguments, environment_folder, trl_python
from rlhf_ray.runs.run_folder import RunFolder

LEARNING_RATE, KL_COEF, MICROBATCH, VOCABULARY = 1e-4, 0.05, 32, 260
RESULTS = Path("results/bench")


def train_reward(folder: RunFolder, work: Work, seed: int, steps: int = 120) -> float:
    """Teach the random reward model its number. -> correlation of its scores with the number on fresh rows."""
    import torch

    from rlhf_ray.models.load import load_reward_model
    from rlhf_ray.models.save import save_model
    from rlhf_ray.models.tokenizer import load_tokenizer

    path = folder.stage("reward").model
    model = load_reward_model(path, None, False)
    generator = torch.Generator().manual_seed(seed)
    worth = 5 * torch.randn(VOCABULARY, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps + 1):
        ids = torch.randint(0, VOCABULARY - 2, (work.rows, work.prompt + work.response), generator=generator)
        score = model(input_ids=ids).logits.squeeze(-1)
        wanted = worth[ids[:, work.prompt :]].mean(1)
        if step == steps:
            break
        optimizer.param_groups[0]["lr"] = 5e-4 * min(1.0, step / 20, 2 * (1 - step / steps))
        (score - wanted).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, load_tokenizer(path), path, "Learned the mean of a random number per token, for a benchmark.\n")
    return float(torch.corrcoef(torch.stack([score.detach(), wanted]))[0, 1])


def run_ours(recipe, folder: RunFolder, work: Work, iterations: int) -> dict[str, list[float]]:
    from rlhf_ray.actors.ppo_stage import ray_roles
    from rlhf_ray.actors.session import ray_session
    from rlhf_ray.actors.wait import Waiter
    from rlhf_ray.ppo.step import StepConfig, cut_chunks, ppo_step, sync_weights

    found = []
    waiter = Waiter(1800, "look at what else runs on this machine")
    with ray_session(None), ray_roles(recipe, folder, waiter) as roles:
        sync_weights(roles, 0)
        for step in range(iterations):
            rate = LEARNING_RATE * (1 - step / iterations)
            chunks = cut_chunks(step, range(step * work.rows, (step + 1) * work.rows), 1, work.rows)
            config = StepConfig(step=step, kl_coef=KL_COEF, learning_rate=rate, critic_learning_rate=rate,
                              max_mismatch=1.0, max_mismatch_kl=1.0, max_first_approx_kl=1.0)  # fmt: skip
            found.append(ppo_step(roles, chunks, config))
    return {name: [metrics[f"objective/{name}"] for metrics in found] for name in ("score", "kl")}


def run_trl(shape: Shape, work: Work, iterations: int, folder: Path, seed: int) -> dict[str, list[float]]:
    command = [str(trl_python(environment_folder(), print)), "-P", str(SCRIPT),
               *arguments(shape, work, MICROBATCH, iterations - 1, 0), "--models", str(folder),
               "--learning-rate", str(LEARNING_RATE), "--seed", str(seed)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["curve"]


def run_seed(shape: Shape, work: Work, iterations: int, seed: int) -> dict:
    recipe = bench_recipe(shape, work, microbatch=MICROBATCH, precision="auto", resources={})
    recipe = recipe.model_copy(update={"seed": seed})
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_curve_") as path:
        folder = RunFolder(Path(path))
        write_random_run(recipe, folder, prompts=work.rows * iterations, length=work.prompt)
        corr = train_reward(folder, work, seed)
        print(f"seed {seed}: the reward model's correlation with its number is {corr:.3f}", flush=True)
        trl = run_trl(shape, work, iterations, folder.path, seed)
        ours = run_ours(recipe, folder, work, iterations)
    print(f"seed {seed}: score of the last five iterations {statistics.mean(ours['score'][-5:]):.3f}, "
          f"TRL's {statistics.mean(trl['score'][-5:]):.3f}", flush=True)  # fmt: skip
    return {"seed": seed, "reward_model_corr": corr, "rlhf_ray": ours, "trl": trl}


def plot(size: str, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, name, label in zip(axes, ("score", "kl"), ("score", "KL to the reference, nats per response"), strict=True):
        for system, colour in (("rlhf_ray", "#1f77b4"), ("trl", "#d62728")):
            for row in rows:
                first = row is rows[0]
                axis.plot(
                    row[system][name],
                    color=colour,
                    alpha=0.8,
                    label=system.replace("trl", "TRL 1.11") if first else None,
                )
        axis.set_xlabel("iteration")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(RESULTS / f"curve_{size}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="4m", choices=SIZES)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    shape = shape_of(given.size, layers=None, width=None, heads=None, vocabulary=VOCABULARY)
    work = Work(rows=64, prompt=32, response=48, epochs=4)
    out = RESULTS / f"curve_{given.size}.json"
    rows = json.loads(out.read_text()) if out.exists() else []
    for seed in range(given.seeds):
        if all(row["seed"] != seed for row in rows):
            rows.append(run_seed(shape, work, given.iterations, seed))
            out.write_text(json.dumps(rows) + "\n")
    plot(given.size, rows)


if __name__ == "__main__":
    main()

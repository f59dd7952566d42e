"""Three rounds with fresh feedback in the demo world, beside one PPO of the same total length on the first reward model alone.

    python results/rounds/rounds.py runs/rounds --seed 0               # a quiet machine: about an hour on two cores
    python results/rounds/rounds.py runs/rounds-weak --seed 0 --kl-coef 0.01 [--start-from runs/rounds/seed0]
    python results/rounds/rounds.py runs/rounds-small --seed 0 --small # minutes; shows that it goes through, and nothing else
    python results/rounds/rounds.py --table                            # README.md's table from the seeds that are done

Round 1 is a run of the recipe demo with a small first set of preferences. Before each further round six simulated raters
(raters.py) vote over HTTP on pairs of answers of the policy that is served; then `rlhf-ray round` trains on all votes there are.
The raters' noise and bias are known; the true utility decides nothing, it only measures. Every step that is done is skipped, so the
same command goes on where it stopped. The draws of the served answers are the server's own: a second run of a seed has other votes.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
KL_COEF = 0.05
ROUNDS, STEPS, VOTES = 3, 24, 1200  # rounds in all, PPO steps of each, votes before each further round
BASE = {
    "data.builder_args.pairs": 1600, "ppo.steps": STEPS, "ppo.judge_evaluations": "true",
    "rounds.decided_by": "reward_model", "rounds.reference": "first", "evaluation.max_kl": "null",
}  # fmt: skip
SMALL = {
    "model.from_scratch.layers": 2, "model.from_scratch.width": 64, "model.from_scratch.heads": 4,
    "model.from_scratch.vocab_size": 600, "model.from_scratch.positions": 128, "data.builder_args.sft_rows": 300,
    "data.builder_args.pairs": 120, "data.builder_args.prompts": 64, "data.builder_args.eval_prompts": 16,
    "data.builder_args.eval_rows": 40, "data.max_prompt_tokens": 64, "sft.max_steps": 6, "sft.max_length": 128, "fluency": "null",
    "reward.max_steps": 4, "reward.max_length": 128, "reward.normalise_samples": 16, "reward.eval_rows": 16, "sft.eval_rows": 16,
    "generation.max_new_tokens": 12, "generation.chunk_size": 8, "ppo.steps": 2, "ppo.rollout_batch_size": 8,
    "ppo.minibatch_size": 8, "ppo.microbatch_size": 8, "ppo.ppo_epochs": 1, "ppo.eval_every": 2, "ppo.eval_prompts": 8,
    "ppo.accept_weak_reward": "true", "evaluation.prompts": 16, "evaluation.bootstrap": 200, "evaluation.samples": 3,
    "evaluation.seeds": "[0]", "rounds.least_new_votes": 5,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, help="where the run folders go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--votes", type=int, default=None, help=f"before each further round; default {VOTES}")
    parser.add_argument("--kl-coef", type=float, default=KL_COEF, help=f"default {KL_COEF}, the demo's")
    parser.add_argument("--start-from", type=Path, help="a run of the same seed, whose stages before PPO are taken over")
    parser.add_argument("--small", action="store_true", help="the smallest size that goes through")
    parser.add_argument("--table", action="store_true", help="write README.md's table, and do nothing else")
    asked = parser.parse_args()
    if asked.table:
        return write_table()
    if asked.runs is None:
        parser.error("give a folder for the runs")
    settings = BASE | {"ppo.kl_coef": asked.kl_coef} | (SMALL if asked.small else {})
    votes = asked.votes or (24 if asked.small else VOTES)
    run = (asked.runs / f"seed{asked.seed}").absolute()
    database, told = run.parent / f"votes{asked.seed}.db", [f"--set={key}={value}" for key, value in settings.items()]
    told.append(f"--set=seed={asked.seed}")
    if not (run / "evaluation" / "DONE").exists():
        say("round 1: the recipe demo")
        rlhf_ray("run", "demo", "--run-dir", run, *told, *(["--start-from", asked.start_from] if asked.start_from else []))
    policies = {"SFT": run / "sft" / "model", "round 1": run / "ppo" / "model"}
    for number in range(2, asked.rounds + 1):
        folder = run / "rounds" / str(number)
        if not (folder / "round.json").exists():
            if not (folder / "data" / "DONE").exists():
                tie = {"tie": 0.0} if asked.small else {}  # so small a model writes nothing that is of any use
                gather(current(run), database, votes * (number - 1), asked.seed, run.parent, **tie)
            say(f"round {number}")
            rlhf_ray("round", run, "--votes", database)
        policies[f"round {number}"] = folder / "ppo" / "model"
    steps = int(settings["ppo.steps"]) * asked.rounds
    long = run.with_name(f"{run.name}-long")
    if not (long / "evaluation" / "DONE").exists():
        say(f"one PPO of {steps} steps on the first reward model")
        rlhf_ray("run", "demo", "--start-from", run, "--run-dir", long, *told, f"--set=ppo.steps={steps}")
    policies[f"one PPO of {steps} steps"] = long / "ppo" / "model"
    say("true utility of every policy")
    found = {
        "seed": asked.seed, "settings": settings, "votes_per_round": votes, "small": asked.small,
        "utility": utilities(run, policies, settings_seeds(asked.small)),
        "rounds": {number: decision(run / "rounds" / str(number)) for number in range(2, asked.rounds + 1)},
    }  # fmt: skip
    out = (run if asked.small else HERE) / f"seed{asked.seed}-kl{asked.kl_coef:g}.json"
    out.write_text(json.dumps(found, indent=2) + "\n")
    say(f"{out}: {json.dumps({name: round(each['mean'], 2) for name, each in found['utility'].items()})}")


def decision(round_: Path) -> dict:
    """What became of a round: what `round.json` holds, without the places where it ran."""
    told = json.loads((round_ / "round.json").read_text())
    return {name: told[name] for name in ("votes", "reward_accuracy", "verdict")}


def current(run: Path) -> Path:
    """The run folder of the policy that the next round starts from."""
    better = [
        path.parent
        for path in sorted((run / "rounds").glob("*/round.json"), key=lambda path: int(path.parent.name))
        if json.loads(path.read_text())["verdict"]["better"]
    ]
    return better[-1] if better else run


def gather(served: Path, database: Path, total: int, seed: int, place: Path, **taste: float) -> None:
    """Serve a policy and let the raters vote until the database holds `total` votes."""
    from raters import collect

    limit = int(re.search(r"max_new_tokens: (\d+)", (served / "recipe.yaml").read_text())[1])
    log = place / f"serve{seed}.log"
    with open(log, "w") as out:
        server = subprocess.Popen(
            [sys.executable, "-u", "-m", "rlhf_ray", "serve", str(served), "--name", "policy", "--port", "0",
             "--votes", str(database), "--votes-per-minute", "1000000"], stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            if server.poll() is not None:
                raise SystemExit(f"the server ended: {log.read_text()[-2000:]}")
            time.sleep(0.5)
        say(f"raters vote on {served.name}'s answers until there are {total} votes")
        collect(found[0], total, seed, limit, lambda count: say(f"  {count} of {total} votes"), **taste)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(180)


def settings_seeds(small: bool) -> list[int]:
    return [0] if small else [0, 1]


def utilities(run: Path, policies: dict[str, Path], seeds: list[int]) -> dict[str, dict]:
    """Mean true utility (0 to 10) of each policy on the run's held-out prompts, with its 95 % interval, and less the last policy's.

    The same prompts and random numbers for all, and one bootstrap: differences are paired.
    """
    import torch

    from rlhf_ray.config.recipe_file import load_recipe
    from rlhf_ray.data.world import utility
    from rlhf_ray.evaluation.estimates import Resampler
    from rlhf_ray.evaluation.evaluate import held_out_prompts
    from rlhf_ray.evaluation.samples import draw_responses
    from rlhf_ray.models.control_tokens import shown
    from rlhf_ray.models.load import load_causal_lm
    from rlhf_ray.models.tokenizer import load_tokenizer
    from rlhf_ray.runs.run_folder import RunFolder

    recipe = load_recipe(str(run / "recipe.yaml"))
    held_out = held_out_prompts(recipe, RunFolder(run))
    prompts = held_out.prompts(range(len(held_out)))
    resampler, found = Resampler(len(prompts), recipe.evaluation.bootstrap, recipe.seed), {}
    for name, folder in policies.items():
        drawn = draw_responses(
            load_causal_lm(folder, torch.float32), load_tokenizer(folder), prompts, seeds, recipe.generation.sampling,
            chunk_size=recipe.generation.chunk_size, device="cpu", progress=lambda done: None, folder=folder,
        )  # fmt: skip
        asked = [shown(prompt) for prompt in prompts for _ in seeds]
        scores = torch.tensor(utility(asked, drawn.texts), dtype=torch.float64).view(len(prompts), len(seeds)).numpy()
        found[name] = resampler.mean(scores)
        say(f"  {name}: {found[name].point:.2f}")
    last = found[list(found)[-1]]
    return {name: each.figure() | {"less_long": (each - last).figure()} for name, each in found.items()}


def write_table() -> None:
    """Between the marks of README.md, for each KL coefficient: a row per policy, a column per seed."""
    page, mark = HERE / "README.md", "<!-- table -->"
    before, _, rest = page.read_text().partition(mark)
    _, _, after = rest.partition(mark)
    all_found = [json.loads(path.read_text()) for path in sorted(HERE.glob("seed*.json"))]
    tables = ["No seed has been run to its end yet."] if not all_found else []
    for coefficient in sorted({found["settings"]["ppo.kl_coef"] for found in all_found}, reverse=True):
        tables.append(table([found for found in all_found if found["settings"]["ppo.kl_coef"] == coefficient], coefficient))
    page.write_text(f"{before}{mark}\n" + "\n\n".join(tables) + f"\n{mark}{after}")


def table(seeds: list[dict], coefficient: float) -> str:
    names, last = list(seeds[0]["utility"]), list(seeds[0]["rounds"])[-1]
    rows = {name: [said(found["utility"][name]) for found in seeds] for name in names}
    rows[f"round {last} less the long PPO"] = [said(found["utility"][f"round {last}"]["less_long"]) for found in seeds]
    for number in seeds[0]["rounds"]:
        rows[f"round {number} was taken for better"] = [
            "yes" if found["rounds"][number]["verdict"]["better"] else "no" for found in seeds
        ]
    columns = " | ".join(f"seed {found['seed']}" for found in seeds)
    lines = [f"| true utility, 0 to 10; `kl_coef` {coefficient:g} | {columns} |", "|---|" + "---|" * len(seeds)]
    lines += [f"| {name} | " + " | ".join(row) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def said(figure: dict) -> str:
    return f"{figure['mean']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def rlhf_ray(*arguments) -> None:
    done = subprocess.run([sys.executable, "-m", "rlhf_ray", *map(str, arguments)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


if __name__ == "__main__":
    main()

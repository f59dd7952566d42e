"""Which kinds of rule the replies of an evaluation follow, for runs of the recipe `smollm2-instructions`.

    python -m rlhf_ray.evaluation.rule_kinds RUN_DIR

Prints a Markdown table: how many replies were asked to follow each kind (`rlhf_ray/data/instruction_rules.py`), and the share
of each model's that do. Kinds that no training prompt has come last.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from rlhf_ray.data.instruction_rules import KINDS, follows
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.outcome import models_of_sample, read_samples
from rlhf_ray.runs.run_folder import RunFolder


def by_kind(run: RunFolder) -> dict[str, tuple[int, dict[str, float]]]:
    """Kind -> (replies of each model, the share that follows it by model). UserError for a run without rules or samples."""
    prompts, samples = run.data("eval_prompts"), read_samples(run.stage("evaluation").path)
    table = pd.read_parquet(prompts) if prompts.exists() else pd.DataFrame()
    if "rules" not in table or not samples:
        raise UserError(f"{run.path} has no samples whose prompts have rules; give a finished run of smollm2-instructions")
    rules = {prompt: json.loads(each) for prompt, each in zip(table["prompt"], table["rules"], strict=True)}
    found: dict[str, dict[str, list[bool]]] = {}
    for sample in samples:
        for rule in rules[sample["prompt"]]:
            for model in models_of_sample(sample):
                answers = found.setdefault(rule["kind"], {}).setdefault(model, [])
                answers.append(follows(sample[model]["response"], rule))
    counts = {kind: len(next(iter(models.values()))) for kind, models in found.items()}
    order = sorted(found, key=lambda kind: (KINDS[kind].held_out, kind))
    return {kind: (counts[kind], {name: sum(each) / len(each) for name, each in found[kind].items()}) for kind in order}


def table_of(shares: dict[str, tuple[int, dict[str, float]]]) -> Iterator[str]:
    models = list(next(iter(shares.values()))[1])
    yield f"| kind | replies | {' | '.join(models)} |"
    yield "|---|---|" + "---|" * len(models)
    for kind, (count, of) in shares.items():
        name = f"{kind} (held out)" if KINDS[kind].held_out else kind
        yield f"| {name.replace('_', ' ')} | {count} | {' | '.join(f'{of[model]:.2f}' for model in models)} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_ray.evaluation.rule_kinds", description=str(__doc__).partition("\n")[0])
    parser.add_argument("run_dir", type=Path)
    given = parser.parse_args(arguments)
    try:
        print("\n".join(table_of(by_kind(RunFolder(given.run_dir.absolute())))))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

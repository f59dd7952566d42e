"""The benchmark commands at a tiny size."""

import json

from command import rlhf_ray

MODEL = ("--layers", "1", "--width", "32", "--heads", "2", "--vocab", "260")
LENGTHS = ("--prompt", "6", "--response", "5")


def answered(*arguments) -> dict:
    answer = rlhf_ray("bench", *arguments, "--json")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.strip().splitlines()[-1])

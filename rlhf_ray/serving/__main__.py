"""`python -m rlhf_ray.serving FOLDER`: the server without the rest of the command line."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from rlhf_ray.errors import UserError
from rlhf_ray.serving.config import Limits
from rlhf_ray.serving.launch import serve


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_ray.serving", description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key")
    parser.add_argument("--name")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus", type=float)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--engine")
    parser.add_argument("--allow-special-tokens", action="store_true")
    for name, default in asdict(Limits()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    given = vars(parser.parse_args(arguments))
    try:
        limits = Limits(**{name: given.pop(name) for name in Limits.__slots__})
        serve(**given, limits=limits)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

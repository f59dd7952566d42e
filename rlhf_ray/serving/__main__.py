"""`python -m rlhf_ray.serving FOLDER`: the server without the rest of the command line."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from rlhf_ray.errors import UserError
from rlhf_ray.serving.config import API_KEY_VARIABLE, Limits, Notes, given_key
from rlhf_ray.serving.launch import DRAIN_S, serve
from rlhf_ray.serving.served import named_folders


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_ray.serving", description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key-file", help=f"a file with the key; else it is that of {API_KEY_VARIABLE}")
    parser.add_argument("--api-key", help=argparse.SUPPRESS)
    parser.add_argument("--allowed-host", action="append", default=[])
    parser.add_argument("--cors-origin", action="append", default=[])
    parser.add_argument("--drain-s", type=float, default=DRAIN_S)
    parser.add_argument("--name")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus", type=float)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--engine")
    parser.add_argument("--allow-special-tokens", action="store_true")
    parser.add_argument("--stage", choices=("policy", "reward"), default="policy")
    parser.add_argument("--request-log", type=Path)
    parser.add_argument("--log-texts", action="store_true")
    parser.add_argument("--judge")
    parser.add_argument("--model", action="append", default=[])
    for name, default in asdict(Limits()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    given = vars(parser.parse_args(arguments))
    try:
        limits = Limits(**{name: given.pop(name) for name in Limits.__slots__})
        key = given_key(given.pop("api_key"), given.pop("api_key_file"))
        hosts, origins = given.pop("allowed_host"), given.pop("cors_origin")
        notes = Notes(**{name: given.pop(name) for name in Notes.__slots__})
        more = named_folders(given.pop("model"))
        serve(**given, more_models=more, api_key=key, allowed_hosts=hosts, cors_origins=origins, limits=limits, notes=notes)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

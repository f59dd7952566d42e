"""The command line in this process: another one would import everything first."""

import contextlib
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

from typer import testing
from typer.main import get_command

from rlhf_ray.cli.main import app

command_of = cache(get_command)  # the runner would make the tree of commands anew at each call, for 50 ms


@dataclass(frozen=True)
class Answer:
    returncode: int
    stdout: str
    stderr: str


def rlhf_ray(*args, cwd=None) -> Answer:
    with contextlib.chdir(cwd or "."), patch.object(testing, "_get_command", command_of):
        result = testing.CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Answer(result.exit_code, result.stdout, result.stderr)

"""The command line in this process: another one would import everything first."""

import contextlib
from dataclasses import dataclass

from typer.testing import CliRunner

from rlhf_ray.cli.main import app


@dataclass(frozen=True)
class Answer:
    returncode: int
    stdout: str
    stderr: str


def rlhf_ray(*args, cwd=None) -> Answer:
    with contextlib.chdir(cwd or "."):
        result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Answer(result.exit_code, result.stdout, result.stderr)

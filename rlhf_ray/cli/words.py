"""How a command ends: the user's mistakes in one sentence on stderr, failures likewise, never a traceback for either."""

from __future__ import annotations

import functools
import os
import sys

import typer
from rich.console import Console

from rlhf_ray.errors import RunFailed, StageStopped, UserError
from rlhf_ray.runs.interrupt import EXIT_CODE

console, errors = Console(), Console(stderr=True)


def in_words(command):
    """User's mistakes: one sentence each on stderr, exit code 2. Ctrl-C: 130."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except UserError as error:
            for line in str(error).splitlines():
                errors.print(f"rlhf-ray: {line}", style="red", highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except RunFailed as failure:
            errors.print(f"rlhf-ray: {failure}", style="red", highlight=False, markup=False, soft_wrap=True)
            if failure.process_must_end:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)
            raise typer.Exit(1) from None
        except StageStopped as stopped:
            console.print(f"{stopped}; the same command goes on from there", highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_CODE) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_CODE) from None

    return wrapped

"""How a command ends: the user's mistakes in one sentence on stderr, failures likewise, never a traceback for either."""

from __future__ import annotations

import errno
import functools
import os
import sys
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from rlhf_ray.errors import RunFailed, StageStopped, UserError
from rlhf_ray.runs.interrupt import EXIT_CODE

console, errors = Console(), Console(stderr=True)

#: what a path alone may be to blame for, wherever a command comes upon it
OF_A_PATH = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EROFS}


def in_words(command):
    """User's mistakes: one sentence each on stderr, exit code 2. Ctrl-C: 130."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except UserError as error:
            for line in str(error).splitlines():
                _tell(line)
            raise typer.Exit(2) from None
        except RunFailed as failure:
            _tell(str(failure))
            if failure.process_must_end:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)
            raise typer.Exit(1) from None
        except StageStopped as stopped:
            console.print(f"{stopped}; the same command goes on from there", highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_CODE) from None
        except OSError as error:
            if error.errno not in OF_A_PATH or not isinstance(error.filename, (str, bytes)):
                raise
            path = os.fsdecode(error.filename)
            _tell(f"'{path if len(path) <= 300 else path[:300] + '...'}' can't be used ({error.strerror}); give another path, or "
                  "the rights to this one")  # fmt: skip
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_CODE) from None

    return wrapped


def _tell(line: str) -> None:
    errors.print(f"rlhf-ray: {line}", style="red", highlight=False, markup=False, soft_wrap=True)


#: What stands for a required argument or option where a command is told how it is called.
EXAMPLES = {
    "recipe": "demo", "name": "ppo", "path": "runs/demo", "run_dir": "runs/demo", "--run-dir": "/shared/runs/demo",
    "job_id": "demo-1", "source": "runs/demo", "target": "my-model", "file": "model.gguf",
}  # fmt: skip


class Commands(TyperGroup):
    """A command without an argument or option that it needs says what to give, with an example. Exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            # The class stands in another module in each version of typer.
            if type(error).__name__ != "MissingParameter" or error.ctx is None or error.param is None:
                raise
            _tell(_what_to_give(error.ctx, error.param))
            raise typer.Exit(2) from None


def _what_to_give(context: Any, missing: Any) -> str:
    names, parent = [], context
    while parent.parent is not None:
        names, parent = [parent.info_name, *names], parent.parent
    words = [example for each in context.command.params if each.required for example in _example(each)]
    # getattr: click's own parameters have no help.
    help_text = f", {missing.help}" if getattr(missing, "help", None) else ""
    return f"give {_called(missing)}{help_text}; for example: {' '.join(['rlhf-ray', *names, *words])}"


def _called(param: Any) -> str:
    return param.opts[0] if param.param_type_name == "option" else param.name.upper()


def _example(param: Any) -> list[str]:
    if param.param_type_name == "option":
        return [param.opts[0], _value(param.opts[0], param)]
    return [_value(param.name, param)]


def _value(known_as: str, param: Any) -> str:
    return EXAMPLES[known_as] if known_as in EXAMPLES else param.name.upper()

"""The recipe's builder: a function of the user's that makes the data sets of all roles."""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from collections.abc import Callable, Mapping

from datasets import Dataset

from rlhf_ray.config import DataConfig
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.errors import RunFailed, StageStopped, UserError, whole_message

BUILDER_ROLES = (
    "sft", "sft_eval", "preferences", "preferences_eval", "judge", "judge_eval", "prompts", "eval_prompts", "other_text",
)  # fmt: skip
FURTHER_EVAL = re.compile(r"(preferences|judge)_eval_[a-z0-9_]+")  # another held-out set, reported under its own name


def find_builder(data: DataConfig, seed: int) -> Callable[[], dict[str, Dataset]]:
    """The recipe's builder with its arguments bound, not called yet."""
    assert data.builder is not None
    function = import_function(data.builder)
    arguments = {"root": data.root, "seed": seed, **data.builder_args}
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError) as error:  # ValueError: written in C, it may have no signature
        raise UserError(
            f"data.builder_args: {data.builder} cannot be called with {', '.join(arguments)} ({error}); "
            "give a function with these parameters"
        ) from error
    return lambda: function(**arguments)


def call_builder(data: DataConfig, seed: int) -> dict[str, Dataset]:
    """The builder's data sets by role, their names checked."""
    build = find_builder(data, seed)
    try:
        built = build()
    except (UserError, RunFailed, StageStopped):
        raise
    except Exception as error:  # fault boundary: the builder is the user's own code
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"data.builder {data.builder} failed in {frame.filename}, line {frame.lineno}: {type(error).__name__}: "
            f"{whole_message(error)}; correct it"
        ) from error
    if not isinstance(built, Mapping):
        raise UserError(
            f"data.builder {data.builder} returned a {type(built).__name__}; return a dict of role to datasets.Dataset "
            f"({', '.join(BUILDER_ROLES)})"
        )
    for role, rows in built.items():
        if role not in BUILDER_ROLES and not FURTHER_EVAL.fullmatch(str(role)):
            near = difflib.get_close_matches(str(role), BUILDER_ROLES, 1)
            raise UserError(f"{data.builder} returned a role '{role}'; it may return {', '.join(BUILDER_ROLES)}"
                            + (f" (did you mean '{near[0]}'?)" if near else ""))  # fmt: skip
        if not isinstance(rows, Dataset):
            raise UserError(f"{data.builder} returned a {type(rows).__name__} for '{role}'; return a datasets.Dataset")
        if len(rows) == 0:
            raise UserError(f"{data.builder} returned no rows for '{role}'; leave the role out or give it rows")
    return dict(built)

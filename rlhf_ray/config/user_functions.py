"""What is the user's own: functions that a recipe names as 'package.module:function', and modules named as plugins."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from rlhf_ray.errors import UserError, whole_message


def import_function(path: str) -> Callable[..., Any]:
    """The function that 'package.module:function' names; the working directory is searched too."""
    module_name, _, name = path.partition(":")
    if not name:
        raise UserError(f"'{path}' names no function; write package.module:function")
    module = _import(module_name, f"'{path}'")
    found = getattr(module, name, None)  # getattr: the recipe names the function
    if found is None:
        names = [other for other in dir(module) if not other.startswith("_")]
        near = difflib.get_close_matches(name, names, 1)
        remedy = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(names[:8])}"
        raise UserError(f"'{path}': the module '{module_name}' has no function '{name}'; {remedy}")
    if not callable(found):
        raise UserError(f"'{path}' is a {type(found).__name__} and no function; name a function")
    return found


def import_plugins(modules: Iterable[str]) -> None:
    """Import the modules: what they register is in the tables then. UserError for one that can't be imported."""
    for name in modules:
        _import(name, "plugins")


def _import(module: str, where: str) -> ModuleType:
    if "" not in sys.path and not module.startswith(
        "rlhf_ray."
    ):  # an installed command has its own folder there instead
        sys.path.insert(0, "")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{where}: the module '{module}' could not be imported ({error}); install it, correct the name, or "
            "run in the folder that holds it"
        ) from error
    except Exception as error:  # fault boundary: a module of the user's may raise anything
        if isinstance(error, UserError) or module.startswith("rlhf_ray."):
            raise
        raise UserError(
            f"{where}: the module '{module}' could not be imported ({type(error).__name__}: {whole_message(error)}); correct it"
        ) from error

"""The user's own functions: a recipe names them as 'package.module:function', and here they are imported."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable

from rlhf_ray.errors import UserError


def import_function(path: str) -> Callable:
    """The function that 'package.module:function' names; the working directory is searched too."""
    module_name, _, name = path.partition(":")
    if not name:
        raise UserError(f"'{path}' names no function; write package.module:function")
    if "" not in sys.path:  # an installed command has its own folder there instead
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"'{path}': the module '{module_name}' could not be imported ({error}); install it, correct the name, or "
            "run in the folder that holds it"
        ) from error
    if not hasattr(module, name):
        names = [other for other in dir(module) if not other.startswith("_")]
        near = difflib.get_close_matches(name, names, 1)
        remedy = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(names[:8])}"
        raise UserError(f"'{path}': the module '{module_name}' has no function '{name}'; {remedy}")
    return getattr(module, name)

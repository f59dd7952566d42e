"""A table of named entries, and functions that are imported when they are first called."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar, cast

from rlhf_ray.errors import UserError


class Entry(Protocol):
    @property
    def name(self) -> str: ...


E = TypeVar("E", bound=Entry)
F = TypeVar("F", bound=Callable[..., Any])


class Table(Mapping[str, E], Generic[E]):
    """Entries by name, in the order in which they were added.

    what: what an entry is, with its article: "an advantage", say
    """

    def __init__(self, what: str, *entries: E):
        self.what = what
        self._entries: dict[str, E] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: E) -> E:
        """Raises UserError for a name that another entry has."""
        there = self._entries.get(entry.name)
        if there is not None and there != entry:
            raise UserError(f"there is {self.what} named '{entry.name}' already; choose another name")
        self._entries[entry.name] = entry
        return entry

    def remove(self, name: str) -> None:
        del self._entries[name]

    def named(self, name: str) -> E:
        """Raises UserError for a name that no entry has, with the nearest one."""
        problem = self.problem(name)
        if problem is not None:
            raise UserError(problem)
        return self._entries[name]

    def problem(self, name: str) -> str | None:
        """What is wrong with the name, or None."""
        if name in self._entries:
            return None
        near = difflib.get_close_matches(name, list(self._entries), 1, 0.5)
        remedy = f"did you mean '{near[0]}'? There are" if near else "there are"
        return f"'{name}' is not {self.what}; {remedy} {', '.join(self._entries)}"

    def __getitem__(self, name: str) -> E:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def loaded(function: F | str) -> F:
    """The function itself, where an entry names it as 'module:function'."""
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    # getattr: an entry names its function in words.
    return cast(F, getattr(importlib.import_module(module), name))

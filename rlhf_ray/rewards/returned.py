"""What a user's function returned, as one number per response.   Light: `function_worker` imports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, SupportsFloat, runtime_checkable

SHOWN = 200  # characters of what it returned, in a message


@runtime_checkable
class Array(Protocol):
    """Of numpy, torch, pandas and others, which have no type in common."""

    @property
    def ndim(self) -> int: ...


class NotNumbers(Exception):
    """What came instead, as a message shows it. place: of the value that is no number, where it is one."""

    def __init__(self, what: str, place: int | None = None):
        super().__init__(what)
        self.place = place


def numbers_of(returned: object, count: int) -> list[float]:
    """A list, a tuple or an array of one dimension as floats. Everything else is refused, even where Python could iterate over
    it: a dict's keys, a text's letters and a set's elements are numbers of something else, or in no order.

    Numbers are what Python can make a float of, true and false included, but no text.
    """
    values = _sequence(returned)
    if values is None:
        raise NotNumbers(f"{shown(returned)} (a {type(returned).__name__})")
    if len(values) != count:
        raise NotNumbers(shown(returned) if count == 1 else f"{len(values)} numbers for {count} responses: {shown(returned)}")
    return [_number(value, place) for place, value in enumerate(values)]


def _sequence(returned: object) -> Sequence[object] | None:
    if isinstance(returned, (list, tuple)):
        return returned
    try:
        return list(returned) if isinstance(returned, Array) and returned.ndim == 1 else None  # type: ignore[call-overload]
    except Exception:  # fault boundary: a class of the user's may do anything
        return None


def _number(value: object, place: int) -> float:
    nested = isinstance(value, Array) and value.ndim != 0
    if nested or isinstance(value, (str, bytes)) or not isinstance(value, SupportsFloat):
        raise NotNumbers(f"[{shown(value)}]" if isinstance(value, str) else f"{shown(value)} (a {type(value).__name__})", place)
    try:
        return float(value)
    except OverflowError:
        raise NotNumbers(f"{shown(value)}, a number too large for a float,", place) from None
    except Exception as error:  # fault boundary: a class of the user's may do anything
        raise NotNumbers(f"{shown(value)}, which gives no float ({shown_error(error)}),", place) from None


def shown(value: object) -> str:
    try:
        return repr(value)[:SHOWN]
    except Exception:  # fault boundary: Python writes no integers of 4300 digits, and a class of the user's may do anything
        return f"a {type(value).__name__} that can't be shown"


def shown_error(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # fault boundary: as above
        return type(error).__name__

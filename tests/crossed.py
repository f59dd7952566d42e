"""Parameters in all combinations, of which few run by default."""

from itertools import product

import pytest
import torch


def crossed(names, *axes, indirect=False):
    """`pytest.mark.parametrize` over all combinations of the axes. By default run so many of them that each value of each axis is
    in one at least; the others are `thorough`. Not for what a contract promises of every combination.

    names, indirect: as for parametrize. axes: the values of each name, or {label: value}. A value that is a tuple stands for
    several names.
    """
    axes = [axis if isinstance(axis, dict) else {_label(value, place): value for place, value in enumerate(axis)} for axis in axes]
    count = max(map(len, axes))
    usual = {tuple(list(axis)[place % len(axis)] for axis in axes) for place in range(count)}
    cases = []
    for labels in product(*axes):
        values = [axis[label] for axis, label in zip(axes, labels, strict=True)]
        flat = [each for value in values for each in (value if isinstance(value, tuple) else (value,))]
        cases.append(pytest.param(*flat, id="-".join(labels), marks=() if labels in usual else pytest.mark.thorough))
    return pytest.mark.parametrize(names, cases, indirect=indirect)


def _label(value, place) -> str:
    if isinstance(value, tuple):
        return "-".join(_label(part, place) for part in value)
    if isinstance(value, (str, int, float, torch.dtype)) or value is None:
        return str(value).removeprefix("torch.")
    return value.__name__ if isinstance(value, type) or callable(value) else str(place)

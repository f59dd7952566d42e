"""Mixes several sources into one list of rows, and splits a list into a training and a held-out part."""

from __future__ import annotations

import hashlib
import random

from rlhf_ray.errors import UserError


def mix(parts: list[list[dict]], weights: list[float | None], seed: int, where: str) -> tuple[list[dict], list[int]]:
    """(rows in random order, how many of each source were used).

    Without weights every row is used once. With weights (one per source) the mix has these proportions, up to rounding,
    and is the largest that uses no row twice.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        used = [len(part) for part in parts]
    elif len(given) < len(weights):
        missing = weights.index(None)
        raise UserError(
            f"{where}[{missing}] has no weight and others of {where} have one; give a weight to all or to none"
        )
    else:
        scale = min(len(part) / weight for part, weight in zip(parts, given, strict=True))
        used = [min(len(part), round(scale * weight)) for part, weight in zip(parts, given, strict=True)]
        if 0 in used:
            raise UserError(
                f"{where}[{used.index(0)}] would have no row in a mix of {', '.join(f'{w:g}' for w in given)}, "
                f"because another source has few rows ({min(map(len, parts))}); bring the weights closer together"
            )
    rng = random.Random(f"mix/{seed}/{where}")
    rows = [row for part, count in zip(parts, used, strict=True) for row in _sample(part, count, rng)]
    rng.shuffle(rows)
    return rows, used


def _sample(rows: list[dict], count: int, rng: random.Random) -> list[dict]:
    return rows if count == len(rows) else rng.sample(rows, count)


def split(rows: list[dict], share: float, seed: int, where: str) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows). Rows with the same key (prompt) are on the same side; neither side is empty.

    Whether a prompt is held out depends on the prompt, the seed and the share alone, so all roles agree.
    """
    places = {row["key"]: _place(row["key"], seed) for row in rows}
    if len(places) < 2:
        raise UserError(
            f"{where} has {len(rows)} usable rows with {len(places)} different prompts, so none can be held out; "
            "give at least two different prompts"
        )
    held_out = {key for key, place in places.items() if place < share}
    ordered = sorted(places, key=places.__getitem__)
    held_out = (held_out or {ordered[0]}) - {ordered[-1]}  # in a small set chance may choose none or all
    return [row for row in rows if row["key"] not in held_out], [row for row in rows if row["key"] in held_out]


def _place(key: str, seed: int) -> float:
    """A number in [0, 1) that is fixed by key and seed."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64

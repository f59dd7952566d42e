"""The largest difference that each test of an invariance saw, printed by `pytest --differences` (without -n)."""

LARGEST: dict[str, float] = {}


def saw(what: str, difference: float) -> float:
    """Note it, and hand it back to be asserted on."""
    LARGEST[what] = max(LARGEST.get(what, 0.0), float(difference))
    return float(difference)


def table() -> list[str]:
    width = max(map(len, LARGEST), default=0)
    return [f"{what:{width}}  {'0, bit for bit' if value == 0 else f'{value:.1e}'}" for what, value in LARGEST.items()]

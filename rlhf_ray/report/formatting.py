"""How the report writes its values: percentages, figures with their intervals, durations, nested results as flat rows."""

from __future__ import annotations

import math

from rlhf_ray.report import charts


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %".replace("-", "−")


def figure(value: dict | None, as_percent: bool = False) -> str:
    """ "1.23 (1.10 to 1.36)": as many decimals as the interval's width makes worth reading. "12": of no width, so no interval."""
    if value is None:
        return "–"
    scale, unit = (100, " %") if as_percent else (1, "")
    mean, low, high = (scale * value[part] for part in ("mean", "low", "high"))
    width = high - low
    if width <= 1e-9 * max(abs(low), abs(high)):
        return f"{plain(mean)}{unit}"
    decimals = min(max(1 - math.floor(math.log10(width)), 0), 6)
    mean, low, high = (f"{part:,.{decimals}f}".replace("-", "−") for part in (mean, low, high))
    return f"{mean}{unit} ({low} to {high})"


def plain(value: float) -> str:
    """A number that is known exactly: "12", "0.5", "1.23"."""
    return f"{value:,.0f}".replace("-", "−") if value == round(value) and abs(value) < 1e6 else charts.number(value)


def between(value: dict, unit: str = "") -> str:
    """ "75.0 to 85.0 %"; nothing for an interval of no width."""
    low, high = (charts.number(value[part]) if not unit else percent(value[part])[:-2] for part in ("low", "high"))
    return "" if low == high else f"{low} to {high}{unit}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def shown(name: str, value) -> str:
    """A stage's closing figure; its name says what unit it has."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if "accuracy" in name and 0 <= value <= 1:
        return percent(value)
    if name.endswith("seconds"):
        return duration(value)
    return f"{value:,}" if isinstance(value, int) else charts.number(value)


def flat(value: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists of plain values become one line, other lists are left out."""
    out = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            out |= flat(inner, f"{prefix}{name}.")
        elif isinstance(inner, list):
            if all(not isinstance(one, (dict, list)) for one in inner):
                out[prefix + name] = ", ".join(map(str, inner))
        else:
            out[prefix + name] = inner
    return out

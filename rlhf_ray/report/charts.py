"""Small inline SVG charts: numbers in, Markup out; colours come from the page's CSS (classes c0..c5, light and dark).

No script: a chart is read by its axes, its legend, and the native tooltip (<title>) of its points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 26
MAX_POINTS = 400
FEW = 3  # so many points make no line, and no scale of their own
FEW_SPAN = 0.2  # of their size: the axis of few points shows at least this much


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    xs: np.ndarray  # [N] steps, rising
    ys: np.ndarray  # [N] finite


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, thousands apart, no exponent between 0.001 and a million."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    decimals = max(digits - 1 - math.floor(math.log10(size)), 0)
    return f"{value:,.{decimals}f}".replace("-", "−")


def ticks(low: float, high: float, count: int = 4, least: float = 0.0) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart, and at least `least`) inside [low, high]."""
    step = max((high - low) / count, least)
    power = 10 ** math.floor(math.log10(step))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def curves(series: Sequence[Series]) -> Markup:
    """Lines over steps; one to three points stand alone. More than 60 points: raw values faint, a running mean in front."""
    xs, ys = np.concatenate([one.xs for one in series]), np.concatenate([one.ys for one in series])
    few = all(len(one.xs) <= FEW for one in series)
    frame = _Frame(*_steps(xs), *(_wide(ys) if few else _span(ys, pad=0.06)), whole_x=True)
    body = [frame.axes()]
    for i, one in enumerate(series):
        xs, values = _thin(one.xs, one.ys)
        if len(one.ys) > 60:
            body.append(Markup('<polyline class="line c{} raw" points="{}"/>').format(i, frame.points(xs, values)))
            _, values = _thin(one.xs, _smooth(one.ys))
        if len(xs) > FEW:
            body.append(Markup('<polyline class="line c{}" points="{}"/>').format(i, frame.points(xs, values)))
        # Every tenth or so point carries a tooltip; few points are shown as dots.
        dots = len(xs) <= 30
        for x, y in list(zip(xs, values, strict=True))[:: max(len(xs) // 40, 1)]:
            body.append(
                Markup('<circle class="{} c{}" cx="{}" cy="{}" r="{}"><title>{}{}: {}</title></circle>').format(
                    "dot" if dots else "hover",
                    i,
                    _xy(frame.x(x)),
                    _xy(frame.y(y)),
                    2.6 if dots else 6,
                    f"{one.name}, " if len(series) > 1 else "",
                    f"step {number(x, 6)}",
                    number(y, 4),
                )
            )
    return _svg(body, ", ".join(one.name for one in series))


def path(series: Sequence[Series], x_name: str, steps: Sequence[float]) -> Markup:
    """Values over something that need not rise with the steps: a line from step to step through a dot each.

    steps: what the points' tooltips call them
    """
    ys = np.concatenate([one.ys for one in series])
    few = len(steps) <= FEW
    frame = _Frame(*_span(np.concatenate([one.xs for one in series]), pad=0.04), *(_wide(ys) if few else _span(ys, pad=0.06)))
    body = [frame.axes()]
    dot = Markup('<circle class="dot c{}" cx="{}" cy="{}" r="2.6"><title>{}</title></circle>')
    for i, one in enumerate(series):
        if not few:
            body.append(Markup('<polyline class="line c{}" points="{}"/>').format(i, frame.points(one.xs, one.ys)))
        for x, y, step in zip(one.xs, one.ys, steps, strict=True):
            told = f"{one.name}, step {step:g}: {number(y)} at {x_name} {number(x)}"
            body.append(dot.format(i, _xy(frame.x(x)), _xy(frame.y(y)), told))
    return _svg(body, f"{', '.join(one.name for one in series)} over {x_name}")


def stacked(series: Sequence[Series], top: int = 6) -> tuple[Markup, list[str]]:
    """Areas on each other (running means): the largest `top`, the rest together. Also the names in the order drawn.

    What a step does not report (an evaluation every 20 steps) is 0 there.
    """
    steps = np.unique(np.concatenate([one.xs for one in series]))
    rows = []
    for one in series:
        values = np.zeros(len(steps))
        values[np.searchsorted(steps, one.xs)] = one.ys
        rows.append((one.name, values))
    rows.sort(key=lambda row: -row[1].sum())
    if len(rows) > top:
        rows = rows[: top - 1] + [("other", sum(values for _, values in rows[top - 1 :]))]
    total = sum((values for _, values in rows), np.zeros(len(steps)))
    few = len(steps) <= FEW  # bars then
    ends = (steps.min() - 0.5, steps.max() + 0.5) if few else _steps(steps)
    frame = _Frame(*ends, 0.0, float(_smooth(total).max()) * 1.08 or 1.0, whole_x=True)
    body, below = [], np.zeros(len(steps))
    for i, (name, values) in enumerate(rows):
        above = below + _smooth(values)
        average = number(float(values.mean()))
        xs, upper = _thin(steps, above)
        _, lower = _thin(steps, below)
        bars = [([x - 0.3, x + 0.3], [u, u], [v, v]) for x, u, v in zip(xs, upper, lower, strict=True)]
        for across, top_edge, bottom_edge in bars if few else [(xs, upper, lower)]:
            area = Markup('<polygon class="area c{}" points="{} {}"><title>{}: {} s on average</title></polygon>')
            edges = frame.points(across, top_edge), frame.points(across[::-1], bottom_edge[::-1])
            body.append(area.format(i, *edges, name, average))
        below = above
    return _svg([frame.axes(), *body], "seconds per step"), [name for name, _ in rows]


def histogram(models: Sequence[np.ndarray], label: str, bins: int = 30) -> Markup:
    """How the models' scores are spread, as overlaid bars with their means."""
    low, high = _span(np.concatenate(models), pad=0.02)
    edges = np.linspace(low, high, bins + 1)
    counts = [np.histogram(values, edges)[0] / len(values) for values in models]
    frame = _Frame(low, high, 0.0, float(max(count.max() for count in counts)) * 1.1, percent_y=True)
    body = [frame.axes()]
    for i, (values, count) in enumerate(zip(models, counts, strict=True)):
        path = "".join(
            f"V{_xy(frame.y(share))}H{_xy(frame.x(edge))}" for share, edge in zip(count, edges[1:], strict=True)
        )
        body.append(
            Markup('<path class="area hist m{}" d="M{} {}{}V{}Z"/>').format(
                i, _xy(frame.x(low)), _xy(frame.y(0)), path, _xy(frame.y(0))
            )
        )
        mean = float(values.mean())
        line = Markup('<line class="mean m{}" x1="{x}" x2="{x}" y1="{}" y2="{}"><title>mean {}</title></line>')
        body.append(line.format(i, TOP, HEIGHT - BOTTOM, number(mean), x=_xy(frame.x(mean))))
    return _svg(body, label)


def calibration(points: Sequence[tuple[float, float]]) -> Markup:
    """Predicted probability against the share that came true; the diagonal is perfect."""
    frame = _Frame(0.0, 1.0, 0.0, 1.0)
    body = [
        frame.axes(),
        Markup('<line class="guide" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
            *map(_xy, (frame.x(0), frame.y(0), frame.x(1), frame.y(1)))
        ),
    ]
    xs, ys = np.array([x for x, _ in points]), np.array([y for _, y in points])
    body.append(Markup('<polyline class="line c0" points="{}"/>').format(frame.points(xs, ys)))
    dot = Markup('<circle class="dot c0" cx="{}" cy="{}" r="3.2"><title>said {}, was {}</title></circle>')
    body += [dot.format(_xy(frame.x(x)), _xy(frame.y(y)), number(x), number(y)) for x, y in points]
    return _svg(body, "calibration")


def intervals(figures: Sequence[dict]) -> Markup:
    """Dots with whiskers on one scale, one below the other, for a table row."""
    low, high = _span(np.array([figure[end] for figure in figures for end in ("low", "high")]), pad=0.08)

    def x(value: float) -> str:
        return _xy(4 + 132 * (value - low) / (high - low))

    one = Markup(
        '<g class="m{}"><line class="whisker" x1="{}" x2="{}" y1="{y}" y2="{y}"/><circle cx="{}" cy="{y}" r="3.5"/></g>'
    )
    body = [
        one.format(i, x(figure["low"]), x(figure["high"]), x(figure["mean"]), y=7 + 10 * i)
        for i, figure in enumerate(figures)
    ]
    height = 4 + 10 * len(figures)
    svg = Markup('<svg class="intervals" viewBox="0 0 140 {h}" height="{h}" aria-hidden="true">{}</svg>')
    return svg.format(Markup("").join(body), h=height)


def gauge(figure: dict, reference: float, low: float, high: float) -> Markup:
    """A value with its interval on a fixed scale, and a mark where "no difference" lies."""

    def x(value: float) -> str:
        return _xy(100 * (min(max(value, low), high) - low) / (high - low))

    return Markup(
        '<svg class="gauge" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" x="0" y="4" width="100" height="2"/>'
        '<rect class="span" x="{}" y="2.5" width="{}" height="5"/>'
        '<rect class="point" x="{}" y="0.5" width="1" height="9"/>'
        '<rect class="reference" x="{}" y="1" width="0.5" height="8"/></svg>'
    ).format(
        x(figure["low"]),
        _xy(max(float(x(figure["high"])) - float(x(figure["low"])), 0.6)),
        _xy(float(x(figure["mean"])) - 0.5),
        x(reference),
    )


class _Frame:
    """Data coordinates -> pixels, and the axes."""

    def __init__(
        self, x_low: float, x_high: float, y_low: float, y_high: float, *, percent_y: bool = False, whole_x: bool = False
    ):
        """whole_x: the horizontal axis counts steps, so there is nothing between two of them."""
        self.x_low, self.x_high, self.y_low, self.y_high = x_low, x_high, y_low, y_high
        self.percent_y, self.whole_x = percent_y, whole_x

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y_low) / (self.y_high - self.y_low)

    def points(self, xs: Sequence[float] | np.ndarray, ys: Sequence[float] | np.ndarray) -> str:
        return " ".join(f"{_xy(self.x(x))},{_xy(self.y(y))}" for x, y in zip(xs, ys, strict=True))

    def axes(self) -> Markup:
        body = []
        for value in ticks(self.y_low, self.y_high):
            label = f"{100 * value:.0f} %" if self.percent_y else _tick(value)
            y = self.y(value)
            body.append(
                Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(LEFT, WIDTH - RIGHT, y=_xy(y))
            )
            body.append(Markup('<text class="y" x="{}" y="{}">{}</text>').format(LEFT - 7, _xy(y + 3.5), label))
        for value in ticks(self.x_low, self.x_high, 5, least=1.0 if self.whole_x else 0.0):
            body.append(
                Markup('<text class="x" x="{}" y="{}">{}</text>').format(_xy(self.x(value)), HEIGHT - 8, _tick(value))
            )
        return Markup("").join(body)


def _tick(value: float) -> str:
    if abs(value) >= 10000:
        return f"{value / 1000:,.6g}k".replace("-", "−")
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("-", "−")
    return f"{round(value, 10):.6g}".replace("-", "−")


def _span(values: np.ndarray, pad: float) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-9):
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low - pad * (high - low), high + pad * (high - low)


def _steps(xs: np.ndarray) -> tuple[float, float]:
    """From the first step to the last; a single one stands between its neighbours."""
    low, high = float(xs.min()), float(xs.max())
    return (low - 1, high + 1) if low == high else (low, high)


def _wide(ys: np.ndarray) -> tuple[float, float]:
    """The span of few values: no narrower than a part of their size, so that a hundredth does not fill the page."""
    low, high = _span(ys, pad=0.06)
    missing = FEW_SPAN * max(abs(float(ys.min())), abs(float(ys.max()))) - (high - low)
    return (low, high) if missing <= 0 else (low - missing / 2, high + missing / 2)


def _smooth(ys: np.ndarray) -> np.ndarray:
    """Centred running mean over about a thirtieth of the run; shorter windows at the ends, so nothing is made up."""
    half = len(ys) // 60
    total = np.concatenate([[0.0], np.cumsum(ys)])
    index = np.arange(len(ys))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(ys))
    return (total[last] - total[first]) / (last - first)


def _thin(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS of them, first and last kept."""
    keep = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), MAX_POINTS)).round().astype(int))
    return xs[keep], ys[keep]


def _xy(value: float) -> str:
    return f"{value:.1f}"


def _svg(body: Sequence[Markup], label: str) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, escape(label), Markup("").join(body)
    )

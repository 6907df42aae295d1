"""Line charts as inline SVG: text that a browser draws at any size, and that needs no library."""

import html
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 360, 200  # in units of the picture, which are about pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24  # margins, for the labels of the axes
BUCKETS = 120  # points of a curve, at most; more would be closer than a line is wide
COLOURS = 8  # of page.css
LOG_ABOVE = 50  # ratio of the largest to the smallest value from which an axis is logarithmic
# Of the values that scale the axis; a few wild ones beyond are cut off at its ends.
CENTRAL = 0.98

Points = Sequence[tuple[float, float | None]]  # (update, value); None: it did not exist


class Bucket(NamedTuple):
    """Neighbouring points as one: their middle update, and mean, least and largest value."""

    x: float
    mean: float | None
    low: float
    high: float


class Series(NamedTuple):
    """One curve.

    Attributes:
      label: what a person calls it.
      buckets: what is drawn, see `buckets`.
      style: line, dots (joined by a thin line), baseline (dashed) or reference (a range).
      run: number of the run, which chooses the colour and is switched by the legend.
    """

    label: str
    buckets: list[Bucket]
    style: str
    run: int


class Chart(NamedTuple):
    """Curves over updates with one axis of values."""

    title: str
    series: tuple[Series, ...]
    percent: bool = False
    may_be_log: bool = False


class Axes(NamedTuple):
    """Where values stand in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Place of update `x` and value `y`, which stays within the axes."""
        (left, right), (low, high) = self.x, self.y
        if self.log:
            y, low, high = (math.log10(max(value, self.y[0])) for value in (y, low, high))
        across = (x - left) / (right - left)
        up = min(max((y - low) / (high - low), 0), 1)
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )


def draw(chart: Chart) -> str:
    """The chart as one <svg>, with what its tooltip says in `data-chart`."""
    axes = _axes(chart)
    parts = [*_grid(chart, axes)]
    # Ranges below lines, dots and baselines above them, the first run above the others.
    for series in sorted(reversed(chart.series), key=lambda s: _LAYERS.get(s.style, 2)):
        parts.append(_curve(series, axes))
    label = html.escape(_said(chart))
    data = html.escape(json.dumps(_hover(chart, axes), separators=(",", ":")))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'data-chart="{data}">{"".join(parts)}<line class="cursor" y1="{TOP}" '
        f'y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
    )


_LAYERS = {"reference": 0, "line": 1}


def buckets(points: Points) -> list[Bucket]:
    """At most BUCKETS neighbourhoods of the points; a value that did not exist stays a gap."""
    size = -(-len(points) // BUCKETS)
    found = []
    for start in range(0, len(points), size or 1):
        part = points[start : start + size]
        values = [y for _, y in part if y is not None]
        x = part[len(part) // 2][0]
        if values:
            found.append(Bucket(x, sum(values) / len(values), min(values), max(values)))
        else:
            found.append(Bucket(x, None, math.nan, math.nan))
    return found


def number(value: float | None, percent: bool = False) -> str:
    """A value as the axes, tables and tooltips write it."""
    if value is None:
        return "none"
    if percent:
        return f"{100 * value:.1f} %"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _axes(chart: Chart) -> Axes:
    found = [bucket for series in chart.series for bucket in series.buckets]
    xs = [bucket.x for bucket in found]
    values = sorted(y for b in found if b.mean is not None for y in (b.low, b.mean, b.high))
    cut = round(len(values) * (1 - CENTRAL) / 2)
    values = values[cut : len(values) - cut] or [0.0]
    low, high = values[0], values[-1]
    log = chart.may_be_log and low > 0 and high / low > LOG_ABOVE
    if not log:
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        # An axis may start at zero, and a share is never outside of 0 and 1.
        lowest = 0.0 if low >= 0 else -math.inf
        highest = 1.0 if chart.percent and high <= 1 else math.inf
        low, high = max(low - room, lowest), min(high + room, highest)
    elif high == low:
        low, high = low / 2, high * 2
    first, last = min(xs, default=0), max(xs, default=1)
    return Axes((first, last if last > first else first + 1), (low, high), log)


def _grid(chart: Chart, axes: Axes):
    """Lines and labels of both axes."""
    for value in _log_ticks(*axes.y) if axes.log else _ticks(*axes.y, 5):
        _, y = axes.at(axes.x[0], value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        text = _short(value, chart.percent)
        yield f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{text}</text>'
    for value in _ticks(*axes.x, 5):
        x, _ = axes.at(value, axes.y[0])
        end = "end" if x > WIDTH - 3 * RIGHT else "middle"
        text = _short(value, percent=False)
        yield f'<text x="{x}" y="{HEIGHT - 7}" text-anchor="{end}">{text}</text>'


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between two."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.99)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 4)
    inside = [10.0**p for p in powers if low <= 10.0**p <= high][::every]
    return inside or [low, high]


def _short(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.3g} %"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    if value and abs(value) < 0.01:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.3g}"


def _curve(series: Series, axes: Axes) -> str:
    group = f'<g class="series {series.style} c{series.run % COLOURS}" data-run="{series.run}">'
    for piece in _pieces(series.buckets):
        if series.style in _LAYERS and any(bucket.low < bucket.high for bucket in piece):
            upper = [axes.at(b.x, b.high) for b in piece]
            lower = [axes.at(b.x, b.low) for b in reversed(piece)]
            group += f'<path class="band" d="{_path(upper + lower)}Z"/>'
        places = [axes.at(bucket.x, bucket.mean) for bucket in piece]
        if len(places) > 1 and series.style != "reference":
            group += f'<path class="curve" d="{_path(places)}"/>'
        if "dots" in series.style or len(places) == 1:
            group += "".join(f'<circle cx="{x}" cy="{y}" r="2.6"/>' for x, y in places)
    for gap in (bucket for bucket in series.buckets if bucket.mean is None):
        x, y = axes.at(gap.x, axes.y[1])
        group += f'<path class="gap" d="M{x} {y}v6"><title>not finite</title></path>'
    return group + "</g>"


def _pieces(found: list[Bucket]):
    """Runs of neighbours whose values exist."""
    piece = []
    for bucket in found:
        if bucket.mean is not None:
            piece.append(bucket)
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def _path(places: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places)


def _said(chart: Chart) -> str:
    """The chart in words, for those who cannot see it."""
    ends = []
    for series in chart.series:
        values = [bucket.mean for bucket in series.buckets if bucket.mean is not None]
        if values:
            first, last = number(values[0], chart.percent), number(values[-1], chart.percent)
            ends.append(f"{series.label} from {first} to {last}")
    return f"{chart.title}: {'; '.join(ends)}"


def _hover(chart: Chart, axes: Axes) -> dict:
    return {
        "x": axes.x,
        "box": [LEFT, WIDTH - RIGHT, WIDTH],
        "series": [
            {
                "run": series.run,
                "label": series.label,
                "x": [bucket.x for bucket in series.buckets],
                "y": [_told(series, bucket, chart.percent) for bucket in series.buckets],
            }
            for series in chart.series
        ],
    }


def _told(series: Series, bucket: Bucket, percent: bool) -> str:
    if series.style == "reference":
        return f"{number(bucket.low, percent)} to {number(bucket.high, percent)}"
    return number(bucket.mean, percent)

"""Line charts, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageColor, ImageDraw, ImageFont

FINE = 2  # everything is drawn this many times as large and scaled down, for smooth edges
LEFT, RIGHT, TOP, BOTTOM = 54, 54, 60, 32  # pixels around the plot: for numbers, the last value, title and note, steps
Y_TICKS, X_TICKS = 5, 5  # about so many


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    paper: str
    panel: str  # behind a chart
    ink: str
    faint: str  # notes and numbers
    grid: str
    accent: str  # of a lone curve
    ramp: tuple[str, ...]  # of an ordered family of curves, from the first to the last


LIGHT = Theme(
    "#ffffff", "#f8fafc", "#111827", "#64748b", "#e2e8f0", "#c2410c", ("#d97706", "#e11d48", "#7c3aed", "#1e3a8a")
)
DARK = Theme(
    "#0b1120", "#131c2e", "#f1f5f9", "#94a3b8", "#26334a", "#fb923c", ("#fcd34d", "#fb7185", "#a78bfa", "#38bdf8")
)


@dataclass(frozen=True)
class Curve:
    """Points from left to right; a y of None is a gap."""

    x: Sequence[float]
    y: Sequence[float | None]
    colour: str
    width: float = 2.0  # pixels
    background: bool = False  # drawn beneath the others; most of it must fit in, not all
    dots: bool = False  # on every point
    last: bool = False  # its last value is written beside it


@dataclass(frozen=True)
class Chart:
    """What one chart shows."""

    title: str
    note: str  # a line below the title
    curves: tuple[Curve, ...]
    log: bool = False  # logarithmic y
    zero: bool = False  # y begins at 0
    ramp: tuple[str, str] | None = None  # what the first and the last colour of a family of curves stand for


@cache
def font(pixels: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow."""
    return ImageFont.load_default(pixels)


def blend(colours: Sequence[str], n: int) -> list[str]:
    """n colours at equal distances along a path through `colours`."""
    path = [ImageColor.getrgb(colour) for colour in colours]
    made = []
    for i in range(n):
        place = i / max(1, n - 1) * (len(path) - 1)
        k = min(int(place), len(path) - 2)
        parts = [round(a + (b - a) * (place - k)) for a, b in zip(path[k], path[k + 1], strict=True)]
        made.append("#" + "".join(f"{part:02x}" for part in parts))
    return made


def smoothed(values: Sequence[float | None], weights: Sequence[float], window: int) -> list[float | None]:
    """The weighted mean of the `window` values around each, of fewer at the ends; None where no value has a weight."""
    sums, totals = [0.0], [0.0]
    for value, weight in zip(values, weights, strict=True):
        value, weight = (0.0, 0.0) if value is None or weight <= 0 else (value, weight)
        sums.append(sums[-1] + value * weight)
        totals.append(totals[-1] + weight)
    n = len(values)
    spans = [(max(0, i - (window - 1) // 2), min(n, i + window // 2 + 1)) for i in range(n)]
    means = [(sums[high] - sums[low], totals[high] - totals[low]) for low, high in spans]
    return [total / weight if weight > 0 else None for total, weight in means]


def ticks(low: float, high: float, about: int) -> list[float]:
    """About so many round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, with 3 times them or 2 and 5 times them where there are few."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**e for e in exponents for m in multiples if low * 0.999 <= m * 10.0**e <= high * 1.001]
        if len(found) >= 3:
            break
    return found[:: max(1, math.ceil(len(found) / 6))]


def label(value: float, largest: float = 0.0) -> str:
    """A number as short as an axis needs it: 0.05, 1e-5, 1200, 20k, 1.5M.

    largest  of the numbers beside it, which decides about thousands and millions for all of them
    """
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for least, size, unit in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if max(abs(value), largest) >= least:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def draw(chart: Chart, size: tuple[int, int], theme: Theme, scale: int = 2) -> Image.Image:
    """The chart as a picture of width x height times `scale` pixels; lengths and fonts grow with it."""
    unit = scale * FINE
    width, height = size
    picture = Image.new("RGB", (width * unit, height * unit), theme.paper)
    pen = ImageDraw.Draw(picture)
    pen.rounded_rectangle((0, 0, width * unit - 1, height * unit - 1), 10 * unit, theme.panel)

    def text(x: float, y: float, words: str, colour: str, pixels: float, anchor: str) -> None:
        pen.text((x * unit, y * unit), words, colour, font(pixels * unit), anchor)

    text(16, 26, chart.title, theme.ink, 17, "ls")
    text(16, 45, chart.note, theme.faint, 12.5, "ls")
    if chart.ramp is not None:  # swatches of the curves' colours between the names of the first and the last
        x = width - 16 - font(12.5 * unit).getlength(chart.ramp[1]) / unit
        text(x, 26, chart.ramp[1], theme.faint, 12.5, "ls")
        for curve in reversed(chart.curves):
            x -= 9
            pen.rectangle(((x - 5) * unit, 17 * unit, (x + 4) * unit - 1, 26 * unit), curve.colour)
        text(x - 11, 26, chart.ramp[0], theme.faint, 12.5, "rs")

    low, high = _range(chart)
    steps = [x for curve in chart.curves for x in curve.x]
    first, last = min(0.0, *steps), max(*steps, 1.0)
    right, bottom = width - RIGHT, height - BOTTOM
    value = math.log10 if chart.log else float
    bottom_value, top_value = value(low), value(high)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - first) / (last - first), (value(y) - bottom_value) / (top_value - bottom_value)
        return LEFT + across * (right - LEFT), bottom - up * (bottom - TOP)

    levels = log_ticks(low, high) if chart.log else ticks(low, high, Y_TICKS)
    for y in levels:
        at = place(first, y)[1]
        pen.line((LEFT * unit, at * unit, right * unit, at * unit), theme.grid, unit)
        text(LEFT - 8, at, label(y, 0.0 if chart.log else levels[-1]), theme.faint, 12.5, "rm")
    for x in ticks(first, last, X_TICKS):
        text(place(x, high)[0], bottom + 9, label(x, last), theme.faint, 12.5, "mt")

    lines = picture.crop((0, TOP * unit, width * unit, bottom * unit))  # cut off what leaves the plot above and below
    brush = ImageDraw.Draw(lines)
    for curve in sorted(chart.curves, key=lambda curve: not curve.background):
        for run in _runs(curve, chart.log, place):
            points = [(x * unit, (y - TOP) * unit) for x, y in run]
            if len(points) > 1:
                brush.line(points, curve.colour, round(curve.width * unit), joint=None if curve.background else "curve")
            radius = (4.0 if curve.dots else curve.width / 2) * unit
            for x, y in points if curve.dots else (points[0], points[-1]):
                brush.ellipse((x - radius, y - radius, x + radius, y + radius), curve.colour)
    picture.paste(lines, (0, TOP * unit))
    for curve in chart.curves:
        ends = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if y is not None]
        if curve.last and ends:
            x, y = place(ends[-1][0], min(max(ends[-1][1], low), high))
            text(x + (10 if curve.dots else 7), y, label(float(f"{ends[-1][1]:.3g}")), curve.colour, 12.5, "lm")
    return picture.resize((width * scale, height * scale), Image.Resampling.BOX)


def _range(chart: Chart) -> tuple[float, float]:
    """Lowest and highest y with a margin: of all curves, of those in the background between the outer percentiles."""
    values: list[float] = []
    for curve in chart.curves:
        found = sorted(y for y in curve.y if y is not None and (y > 0 or not chart.log))
        cut = len(found) // 100 if curve.background else 0
        values += found[cut : len(found) - cut]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if chart.log and values:
        margin = max((high / low) ** 0.06, 1.05)
        return low / margin, high * margin
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return (0.0 if chart.zero else low - margin), high + margin


def _runs(
    curve: Curve, log: bool, place: Callable[[float, float], tuple[float, float]]
) -> list[list[tuple[float, float]]]:
    """The curve's points on the picture, in runs between its gaps; in front without points too close to see."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(curve.x, curve.y, strict=True):
        if y is None or (log and y <= 0):
            runs.append([])
            continue
        point = place(x, y)
        if curve.background or not runs[-1] or point[0] - runs[-1][-1][0] >= 0.25:
            runs[-1].append(point)
    return [run for run in runs if run]

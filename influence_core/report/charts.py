"""Charts as numbers, of which the templates draw SVG: places are in a chart's own units, from its upper left corner."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH = 640
NUM_BINS = 48
HISTOGRAM_HEIGHT = 88
BAR_HEIGHT, LABEL_WIDTH = 26, 170
LINES_HEIGHT = 220
MARGIN = 64  # of a line chart, for the numbers beside it


@dataclass(frozen=True)
class Bin:
    x: float
    width: float
    height: float
    said: str


@dataclass(frozen=True)
class Mark:
    """A training example among all scores."""

    x: float
    is_top: bool
    said: str


@dataclass(frozen=True)
class Histogram:
    """How many examples have which score; heights by the logarithm of one more than the number."""

    kind = "histogram"
    title: str
    bins: list[Bin]
    marks: list[Mark]
    zero: float | None  # place of zero, where it is between the ends
    lowest: str
    highest: str


@dataclass(frozen=True)
class Bar:
    label: str
    said: str  # its value, in words
    y: float
    x: float
    width: float
    low: float  # of its interval
    high: float


@dataclass(frozen=True)
class BarChart:
    kind = "bars"
    title: str
    bars: list[Bar]
    height: float
    zero: float
    line: float | None  # a value to compare with
    line_said: str


@dataclass(frozen=True)
class Line:
    label: str
    number: int  # of its colour
    points: list[tuple[float, float, str]]  # x, y, what it says

    @property
    def path(self) -> str:
        return " ".join(f"{x:g},{y:g}" for x, y, _ in self.points)


@dataclass(frozen=True)
class LineChart:
    kind = "lines"
    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_label: str


def histogram(title: str, scores: np.ndarray, marked: Sequence[tuple[int, bool]] = ()) -> Histogram:
    """Of one query's scores.

    Args:
        marked: (training example, whether it is of the highest).
    """
    scores = np.asarray(scores, np.float64)
    lowest, highest = float(scores.min()), float(scores.max())
    least = max(1e-6 * max(abs(lowest), abs(highest)), 1e-30)  # else there are no numbers between the bins' edges
    span = max(highest - lowest, least)
    counts, edges = np.histogram(scores, NUM_BINS, (lowest, lowest + span))
    tallest = math.log1p(counts.max())
    width = WIDTH / NUM_BINS
    bins = [
        Bin(
            round(number * width, 1),
            round(width - 1, 1),
            round(HISTOGRAM_HEIGHT * math.log1p(count) / tallest, 1),
            f"{count} from {figure(start)} to {figure(end)}",
        )
        for number, (count, start, end) in enumerate(zip(counts.tolist(), edges, edges[1:]))
        if count
    ]

    def place(value: float) -> float:
        return round((value - lowest) / span * WIDTH, 1)

    marks = [Mark(place(float(scores[index])), is_top, f"{index}: {figure(scores[index])}") for index, is_top in marked]
    zero = place(0.0) if lowest < 0 < highest else None
    return Histogram(title, bins, marks, zero, figure(lowest), figure(highest))


def bar_chart(
    title: str,
    values: Sequence[tuple[str, float, tuple[float, float]]],
    line: float | None = None,
    line_said: str = "",
) -> BarChart:
    """Of (label, value, interval)."""
    ends = [end for _, value, interval in values for end in (value, *interval)] + [0.0, line or 0.0]
    lowest, highest = min(ends), max(ends)
    scale = (WIDTH - LABEL_WIDTH - 70) / (highest - lowest or 1.0)

    def place(value: float) -> float:
        return round(LABEL_WIDTH + (value - lowest) * scale, 1)

    bars = [
        Bar(
            label,
            f"{value:.3f}",
            number * BAR_HEIGHT,
            min(place(0), place(value)),
            round(abs(place(value) - place(0)), 1),
            place(low),
            place(high),
        )
        for number, (label, value, (low, high)) in enumerate(values)
    ]
    at_line = None if line is None else place(line)
    return BarChart(title, bars, len(bars) * BAR_HEIGHT, place(0), at_line, line_said)


def line_chart(title: str, x: Sequence[float], lines: Sequence[tuple[str, Sequence[float]]], x_label: str) -> LineChart:
    """Of (label, a value for each x)."""
    values = [value for _, of_line in lines for value in of_line]
    lowest, highest = min(values), max(values)
    first, last = min(x), max(x)

    def across(value: float) -> float:
        return round(MARGIN + (value - first) / (last - first or 1) * (WIDTH - MARGIN - 20), 1)

    def down(value: float) -> float:
        return round(12 + (highest - value) / (highest - lowest or 1) * (LINES_HEIGHT - 44), 1)

    drawn = [
        Line(
            label,
            number,
            [(across(at), down(value), f"{label}, {at:g}: {value:.4g}") for at, value in zip(x, of_line)],
        )
        for number, (label, of_line) in enumerate(lines)
    ]
    ticks = [(across(at), f"{at:g}") for at in x]
    heights = [(down(value), f"{value:.4g}") for value in (lowest, (lowest + highest) / 2, highest)]
    return LineChart(title, drawn, ticks, heights, x_label)


def figure(value: float) -> str:
    """A score as a person reads it: with its sign, to four digits; page.js writes values the same way."""
    if not value:
        return "0"
    rounded = float(f"{value:.4g}")
    if not 1e-3 <= abs(rounded) < 1e8:
        return f"{value:+.3e}".replace("-", "−")
    text = f"{rounded:+,.0f}" if abs(rounded) >= 1000 else f"{rounded:+.4g}"
    return text.replace("-", "−")

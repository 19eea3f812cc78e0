"""Charts as inline SVG: no script, no fonts, colours by CSS class so that one drawing serves light and dark pages.

Every chart is ``role="img"`` with a title and a description in words. Lines differ in dash as well as in colour.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from mllm_msr.records.results import Estimate

Points = Sequence[float] | np.ndarray
WIDTH, HEIGHT = 360, 270  # about the pixels that a phone has: drawn larger, its texts would be too small to read
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 42
STANDALONE = """text{font:12.5px system-ui,sans-serif;fill:#1d2226}.end{text-anchor:end}.middle{text-anchor:middle}
.grid{stroke:#e2dfd8;fill:none}.diagonal{stroke:#5d666d;stroke-dasharray:2 4;fill:none}.dot{fill:currentColor}
.whisker{stroke:currentColor;stroke-width:3;stroke-linecap:round;opacity:.55}
.kind-chosen{color:#0072b2}.kind-other{color:#d55e00}svg{background:#fff}"""


@dataclass(frozen=True)
class Line:
    """One series: points in data coordinates; ``style`` is a CSS class of the report (its colour and dash)."""

    name: str
    x: Points
    y: Points
    style: str
    fill: bool = False
    dots: bool = False
    faint: bool = False  # drawn thin and left out of the legend


@dataclass(frozen=True)
class Interval:
    """A value with its interval, in percent."""

    name: str
    style: str
    value: float
    low: float
    high: float

    @classmethod
    def in_percent(cls, name: str, style: str, estimate: Estimate) -> "Interval":
        return cls(name, style, 100 * estimate.value, 100 * estimate.low, 100 * estimate.high)

    def __str__(self) -> str:
        return f"{self.name} {self.value:.1f} ({self.low:.1f} to {self.high:.1f})"


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers inside [low, high], roughly ``about`` of them.

    >>> nice_ticks(0, 1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - raw))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    diagonal: bool = False,
    x_names: Sequence[str] = (),
) -> Markup:
    """A chart of ``lines``, the first on top, with axes, grid and a legend in HTML below it.

    ``x_names`` stand at x = 1, 2, ... instead of numbers.
    """
    scale = _Scale(x_range, y_range)
    parts = [_axes(scale, x_label, y_label, x_names)]
    if diagonal:
        parts.append(_path(scale, x_range, y_range, "diagonal"))
    for line in reversed(lines):
        if line.fill:
            base = y_range[0]
            parts.append(_path(scale, [line.x[0], *line.x, line.x[-1]], [base, *line.y, base], f"area {line.style}"))
        parts.append(_path(scale, line.x, line.y, f"line {line.style}{' faint' if line.faint else ''}"))
        if line.dots:
            parts += [
                Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(
                    line.style, scale.x(x), scale.y(y)
                )
                for x, y in zip(line.x, line.y, strict=True)
            ]
    legend = [(line.name, line.style) for line in lines if not line.faint]
    return _figure(title, description, HEIGHT, parts, legend)


def interval_chart(rows: Sequence[Interval], *, title: str, description: str, x_label: str, chance: float) -> Markup:
    """A dot with its interval for each of ``rows``, and a line at ``chance``."""
    step, left = 30, max(118, 16 + round(6.6 * max(len(row.name) for row in rows)))
    width = WIDTH - 118 + left
    bottom = 12 + step * len(rows)
    low, high = min(chance, *(row.low for row in rows)), max(chance, *(row.high for row in rows))
    margin = 0.06 * (high - low or 1)
    low, high = max(0.0, low - margin), min(100.0, high + margin)

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - 44)

    parts = []
    for tick in nice_ticks(low, high, 4):
        parts.append(Markup('<path class="grid" d="M{0:.1f} 6V{1}"/>').format(at(tick), bottom))
        parts.append(Markup('<text x="{:.1f}" y="{}" class="middle">{:g}</text>').format(at(tick), bottom + 17, tick))
    parts.append(Markup('<path class="diagonal" d="M{:.1f} 6V{}"/>').format(at(chance), bottom))
    for index, row in enumerate(rows):
        parts.append(
            Markup(
                '<text x="{left}" y="{text:.1f}" class="end">{row.name}</text>'
                '<path class="whisker {row.style}" d="M{low:.1f} {y:.1f}H{high:.1f}"/>'
                '<circle class="dot {row.style}" cx="{value:.1f}" cy="{y:.1f}" r="5"/>'
                '<text x="{end:.1f}" y="{text:.1f}">{row.value:.1f}</text>'
            ).format(
                row=row,
                y=(y := 8 + step * (index + 0.5)),
                text=y + 4.5,
                left=left - 10,
                low=at(row.low),
                high=at(row.high),
                value=at(row.value),
                end=at(row.high) + 7,
            )
        )
    middle = left + (width - left - 44) / 2
    parts.append(Markup('<text x="{:.1f}" y="{}" class="middle label">{}</text>').format(middle, bottom + 37, x_label))
    return _figure(title, description, bottom + 44, parts, [], width)


def standalone(figure: Markup) -> str:
    """The drawing of a chart as an SVG file of its own, on white."""
    start, end = figure.index("<svg"), figure.index("</svg>") + len("</svg>")
    drawing = str(figure[start:end]).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return drawing.replace("</title>", f"</title><style>{STANDALONE}</style>", 1)


@dataclass(frozen=True)
class _Scale:
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _path(scale: _Scale, x: Points, y: Points, style: str) -> Markup:
    points = "L".join(f"{scale.x(a):.1f} {scale.y(b):.1f}" for a, b in zip(x, y, strict=True))
    return Markup('<path class="{}" d="M{}"/>').format(style, points)


def _axes(scale: _Scale, x_label: str, y_label: str, x_names: Sequence[str] = ()) -> Markup:
    parts = []
    for tick in nice_ticks(*scale.y_range):
        y = scale.y(tick)
        parts.append(Markup('<path class="grid" d="M{} {y:.1f}H{}"/>').format(LEFT, WIDTH - RIGHT, y=y))
        parts.append(Markup('<text x="{}" y="{:.1f}" class="end">{:g}</text>').format(LEFT - 7, y + 4.5, tick))
    ticks = [float(place) for place in range(1, len(x_names) + 1)] or nice_ticks(*scale.x_range)
    for tick, name in zip(ticks, x_names or [f"{tick:g}" for tick in ticks], strict=True):
        parts.append(
            Markup('<text x="{:.1f}" y="{}" class="middle">{}</text>').format(scale.x(tick), HEIGHT - BOTTOM + 18, name)
        )
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT))
    parts.append(Markup('<text x="{}" y="{}" class="middle label">{}</text>').format(WIDTH / 2, HEIGHT - 5, x_label))
    parts.append(
        Markup('<text transform="translate(13 {}) rotate(-90)" class="middle label">{}</text>').format(
            TOP + (HEIGHT - TOP - BOTTOM) / 2, y_label
        )
    )
    return Markup("").join(parts)


def _figure(
    title: str,
    description: str,
    height: int,
    parts: Sequence[Markup],
    legend: Sequence[tuple[str, str]],
    width: int = WIDTH,
) -> Markup:
    number = re.sub("[^a-z0-9]+", "-", title.lower())
    keys = Markup("").join(
        Markup(
            '<li><svg viewBox="0 0 26 10" aria-hidden="true"><path class="line {}" d="M1 5H25"/></svg>{}</li>'
        ).format(style, name)
        for name, style in legend
    )
    return Markup(
        '<figure class="chart"><figcaption>{title}</figcaption>'
        '<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="title-{n} text-{n}">'
        '<title id="title-{n}">{title}</title><desc id="text-{n}">{description}</desc>{parts}</svg>{legend}</figure>'
    ).format(
        title=title,
        width=width,
        height=height,
        n=number,
        description=description,
        parts=Markup("").join(parts),
        legend=Markup('<ul class="legend">{}</ul>').format(keys) if keys else "",
    )

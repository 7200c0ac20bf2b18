"""Charts as small SVG files: lines over an axis, or bars. No library: a chart is a page of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 50, 50
_COLOURS = ("#1f6feb", "#d1570a", "#2da44e", "#8250df", "#57606a", "#bf3989")
_FONT = 'font-family="sans-serif" font-size="12" fill="#57606a"'

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Chart:
    """`series` maps a name to its points. A bar chart has one series, whose x are the places in `labels`.

    `log` names the axes with a logarithmic scale; nothing at or below zero may lie on them.
    """

    name: str
    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Point]]
    labels: Sequence[str] = ()
    log: Literal["", "x", "y", "xy"] = ""

    def svg(self) -> str:
        """The chart as a whole file."""
        body = self._bars() if self.labels else self._lines()
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        )
        frame = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', _text(WIDTH / 2, 20, self.title, size=15)]
        axes = [_text(WIDTH / 2, HEIGHT - 8, self.x), _text(12, _TOP - 8, self.y, anchor="start")]
        return "\n".join([head, *frame, *axes, *body, "</svg>"]) + "\n"

    def _lines(self) -> list[str]:
        xs = [x for points in self.series.values() for x, _ in points]
        across = _Axis(xs, _LEFT, WIDTH - _RIGHT, "x" in self.log)
        up = self._up()
        drawn = [*_grid(up), *(_text(across.place(x), HEIGHT - 30, _tick(x)) for x in sorted(set(xs)))]
        for colour, (name, points) in zip(_COLOURS, self.series.items(), strict=False):
            path = " ".join(f"{across.place(x):.1f},{up.place(y):.1f}" for x, y in points)
            drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            drawn += [
                f'<circle cx="{across.place(x):.1f}" cy="{up.place(y):.1f}" r="3" fill="{colour}"/>' for x, y in points
            ]
            drawn.append(_text(*self._legend(name), name, anchor="start", fill=colour))
        return drawn

    def _bars(self) -> list[str]:
        up = self._up()
        wide = (WIDTH - _LEFT - _RIGHT) / max(1, len(self.labels))
        drawn = _grid(up)
        for x, y in next(iter(self.series.values())):
            left, top = _LEFT + (x + 0.2) * wide, up.place(y)
            height = HEIGHT - _BOTTOM - top
            drawn += [
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{0.6 * wide:.1f}" height="{height:.1f}"'
                f' fill="{_COLOURS[0]}"/>',
                _text(left + 0.3 * wide, top - 4, _tick(y)),
                _text(left + 0.3 * wide, HEIGHT - 32, self.labels[int(x)]),
            ]
        return drawn

    def _up(self) -> _Axis:
        ys = [y for points in self.series.values() for _, y in points]
        return _Axis(ys if "y" in self.log else [0.0, *ys], HEIGHT - _BOTTOM, _TOP, "y" in self.log)

    def _legend(self, name: str) -> tuple[float, float]:
        return _LEFT + 10, _TOP + 12 + 16 * list(self.series).index(name)


@dataclass(frozen=True, slots=True)
class _Axis:
    """Maps values to pixels between `start` and `end`."""

    values: Sequence[float]
    start: float
    end: float
    log: bool

    def place(self, value: float) -> float:
        low, high = self._scaled(min(self.values)), self._scaled(max(self.values))
        share = (self._scaled(value) - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        low, high = min(self.values), max(self.values)
        if self.log:
            return [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
        step = _round_step((high - low) / 5)
        return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)] if step else [low]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    if rough <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _grid(up: _Axis) -> list[str]:
    drawn = []
    for value in up.ticks():
        y = up.place(value)
        drawn.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d8dee4"/>')
        drawn.append(_text(_LEFT - 6, y + 4, _tick(value), anchor="end"))
    return drawn


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _text(x: float, y: float, words: str, *, anchor: str = "middle", size: int = 12, fill: str = "#57606a") -> str:
    font = _FONT.replace("12", str(size), 1).replace("#57606a", fill)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {font}>{escape(words)}</text>'

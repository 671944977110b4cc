"""The report's charts as inline SVG: text stays text, nothing is fetched, no script is needed.

Each chart is drawn twice, for a wide and a narrow page, so that its text keeps its size; a style sheet shows one. Colours come from CSS
classes. Positions are in CSS pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup, escape

from pathfed_server.report.axes import Scale, label, nice_ticks, round_ticks

WIDE, NARROW = 560, 328
_HEIGHT, _TOP, _BOTTOM, _LEFT, _RIGHT = 250, 14, 34, 46, 14
_MOST_BARS = 48


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: points (round, value), an optional half-width of its band or error bars at each point, and a colour class."""

    name: str
    points: Sequence[tuple[int, float]]
    spread: Sequence[float] = ()
    colour: str = "c0"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A dashed horizontal line that the series are held against: a limit not to pass, or what was expected."""

    value: float
    words: str
    kind: Literal["limit", "expected"] = "limit"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A chart's plotting area: scales, ticks and the drawing so far."""

    width: int
    x: Scale
    y: Scale
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """Draw a straight line."""
        self.parts.append(f'<line class="{style}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')

    def text(self, x: float, y: float, words: str, style: str, anchor: str = "start") -> None:
        """Write words."""
        self.parts.append(f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>')


def _frame(width: int, rounds: tuple[int, int], values: Sequence[float], *, pad: float = 0.5) -> Frame:
    ticks = nice_ticks(min(values), max(values))
    first, last = rounds
    frame = Frame(
        width=width,
        x=Scale(first - pad, last + pad, _LEFT, width - _RIGHT),
        y=Scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP),
    )
    for tick in ticks:
        frame.line(_LEFT, frame.y(tick), width - _RIGHT, frame.y(tick), "grid")
        frame.text(_LEFT - 8, frame.y(tick) + 4, label(tick, ticks[1] - ticks[0]), "tick", "end")
    for index in round_ticks(first, last, most=width // 40):
        frame.text(frame.x(index), _HEIGHT - _BOTTOM + 16, f"{index:,}", "tick", "middle")
    frame.text((_LEFT + width - _RIGHT) / 2, _HEIGHT - 4, "round", "axis", "middle")
    return frame


def _both(summary: str, draw: Callable[[int], Frame]) -> Markup:
    """The chart in both widths, each an image with the same text alternative."""
    return Markup("").join(
        Markup('<svg class="chart {style}" role="img" aria-label="{text}" viewBox="0 0 {width} {height}">{body}</svg>').format(
            style=style,
            text=summary,
            width=width,
            height=_HEIGHT,
            body=Markup("".join(draw(width).parts)),  # noqa: S704 - every text in it went through escape()
        )
        for style, width in (("wide", WIDE), ("narrow", NARROW))
    )


def line_chart(
    summary: str, series: Sequence[Series], *, reference: Reference | None = None, from_zero: bool = False, band: bool = False
) -> Markup:
    """Lines over rounds, with a band or error bars of the series' spread, and a dashed line of reference.

    Raises:
        ValueError: no series has a point.
    """
    points = [point for line in series for point in line.points]
    if not points:
        raise ValueError("a line chart needs at least one point")
    values = [value for _, value in points]
    for line in series:
        for (_, value), spread in zip(line.points, line.spread, strict=bool(line.spread)):
            values += [value - spread, value + spread]
    values += [reference.value] if reference else []
    values += [0.0] if from_zero else []
    rounds = (min(index for index, _ in points), max(index for index, _ in points))

    def draw(width: int) -> Frame:
        frame = _frame(width, rounds, values)
        if reference:
            height = frame.y(reference.value)
            frame.line(_LEFT, height, width - _RIGHT, height, reference.kind)
            if reference.words:
                frame.text(width - _RIGHT - 2, height + (14 if height < _HEIGHT / 2 else -6), reference.words, "limit-text", "end")
        # Lines may lie on each other (equal sites spend equally): they stand a little apart, inside their round.
        apart = min(6.0, (frame.x(rounds[0] + 1) - frame.x(rounds[0])) / (2 * len(series)))
        for place, line in enumerate(series):
            _draw_series(frame, line, band=band, shift=round((place - (len(series) - 1) / 2) * apart, 1))
        return frame

    return _both(summary, draw)


def _draw_series(frame: Frame, line: Series, *, band: bool, shift: float) -> None:
    places = [(round(frame.x(index) + shift, 1), frame.y(value)) for index, value in line.points]
    if line.spread and band and len(places) > 1:
        ends = list(zip(line.points, line.spread, strict=True))
        upper = [f"{frame.x(index)},{frame.y(value + spread)}" for (index, value), spread in ends]
        lower = [f"{frame.x(index)},{frame.y(value - spread)}" for (index, value), spread in reversed(ends)]
        frame.parts.append(f'<polygon class="band {line.colour}" points="{" ".join(upper + lower)}"/>')
    elif line.spread:
        for (index, value), spread in zip(line.points, line.spread, strict=True):
            frame.line(frame.x(index), frame.y(value - spread), frame.x(index), frame.y(value + spread), f"whisker {line.colour}")
    if band or not line.spread:
        drawn = " ".join(f"{x},{y}" for x, y in places)
        frame.parts.append(f'<polyline class="line {line.colour}" points="{drawn}"/>')
    if len(places) <= _MOST_BARS:
        frame.parts.extend(f'<circle class="dot {line.colour}" cx="{x}" cy="{y}" r="3"/>' for x, y in places)


def stacked_bars(summary: str, rounds: Sequence[int], layers: Sequence[Series]) -> Markup:
    """Bars over rounds, each layer on top of the one before; beyond 48 rounds, means of equal groups of rounds.

    Raises:
        ValueError: no rounds, or a layer without a value for every round.
    """
    if not rounds or any([index for index, _ in layer.points] != list(rounds) for layer in layers):
        raise ValueError("stacked bars need rounds, and a value of every layer for every round")
    size = -(-len(rounds) // _MOST_BARS)
    groups = [range(start, min(start + size, len(rounds))) for start in range(0, len(rounds), size)]
    heights = [[sum(layer.points[i][1] for i in group) / len(group) for layer in layers] for group in groups]

    def draw(width: int) -> Frame:
        frame = _frame(width, (rounds[0], rounds[-1]), [0.0, *(sum(stack) for stack in heights)])
        thick = min(36.0, 0.72 * (width - _LEFT - _RIGHT) / len(groups))
        for group, stack in zip(groups, heights, strict=True):
            middle = frame.x((rounds[group[0]] + rounds[group[-1]]) / 2)
            base = 0.0
            for layer, height in zip(layers, stack, strict=True):
                top, bottom = frame.y(base + height), frame.y(base)
                frame.parts.append(
                    f'<rect class="fill {layer.colour}" x="{middle - thick / 2:.1f}" y="{top}" '
                    f'width="{thick:.1f}" height="{bottom - top:.1f}"/>'
                )
                base += height
        return frame

    return _both(summary, draw)

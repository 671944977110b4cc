"""Epsilon by round as one SVG file that needs nothing else: no script, no font, no style sheet. Positions are in CSS pixels."""

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from pathfed_local.plan_privacy import SITES, PrivacyReport
from pathfed_server.report.axes import Scale, label, nice_ticks, round_ticks

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 74, 52
_COLOURS = {1: "#1667a8", 2: "#b3480c", 3: "#0d7a68"}
_INK, _QUIET, _LINE, _LIMIT = "#17212e", "#526071", "#dde3ea", "#9c1f1f"
_NAME = 32  # letters of a plan's name that fit
_APART = 16  # between the words at the ends of lines


def privacy_chart(report: PrivacyReport) -> str:
    """Lines for a patient at one, two and three sites, and dashed ones for the plan's limit and another target."""
    lines = {
        sites: [(index, value) for index, value in zip(report.rounds, report.epsilons[sites], strict=True) if math.isfinite(value)]
        for sites in SITES
    }
    held = {"limit": report.plan.privacy.epsilon_limit}
    if report.target != held["limit"]:
        held["target"] = report.target
    top = max([*held.values(), *(value for line in lines.values() for _, value in line)])
    ticks = nice_ticks(0.0, top)
    x = Scale(min(1, report.rounds[-1] - 1), report.rounds[-1], _LEFT, _WIDTH - _RIGHT)
    y = Scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_heading(report), *_axes(ticks, x, y, report.rounds[-1])]
    ends: list[tuple[float, str, str]] = []
    for name, value in held.items():
        parts.append(_stroke([(x.start, y(value)), (x.end, y(value))], _LIMIT, width=1.5, dash="6 4" if name == "limit" else "2 4"))
        ends.append((y(value), f"{'limit of the plan' if name == 'limit' else name} {value:g}", _LIMIT))
    for sites, line in lines.items():
        places = [(x(index), y(value)) for index, value in line]
        parts.append(_stroke(places, _COLOURS[sites], width=2.5))
        if places:
            parts.append(f'<circle cx="{places[-1][0]}" cy="{places[-1][1]}" r="4" fill="{_COLOURS[sites]}"/>')
            ends.append((places[-1][1], f"{sites} site{'s' * (sites > 1)}: {line[-1][1]:.2f}", _COLOURS[sites]))
    parts.extend(_text(x.end + 10, height + 4, words, colour) for height, words, colour in _set_apart(ends))
    said = f"epsilon by round of plan {report.plan.name} for a patient at one, two and three sites"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(said)}" font-family="system-ui, sans-serif" font-size="13">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _heading(report: PrivacyReport) -> list[str]:
    cost = report.cost
    second = (
        f"N = {cost.patients:,}, B = {cost.expected_patients:g}, sigma = {cost.noise_multiplier:g}, "
        f"{cost.steps} step{'s' * (cost.steps > 1)} a round, delta = {cost.delta:g}"
    )
    name = report.plan.name if len(report.plan.name) <= _NAME else report.plan.name[: _NAME - 1] + "…"
    first = "What the plan costs a patient, by the number of sites they are at"
    return [_text(_LEFT, 26, first, _INK, size=16, weight="600"), _text(_LEFT, 48, f"{name}: {second}", _QUIET)]


def _axes(ticks: Sequence[float], x: Scale, y: Scale, last: int) -> list[str]:
    parts: list[str] = []
    for tick in ticks:
        parts.append(_stroke([(x.start, y(tick)), (x.end, y(tick))], _LINE, width=1))
        parts.append(_text(x.start - 8, y(tick) + 4, label(tick, ticks[1] - ticks[0]), _QUIET, anchor="end"))
    for index in round_ticks(1, last, most=10):
        parts.append(_text(x(index), _HEIGHT - _BOTTOM + 20, f"{index:,}", _QUIET, anchor="middle"))
    parts.append(_text((x.start + x.end) / 2, _HEIGHT - 10, "round", _QUIET, anchor="middle"))
    parts.append(_text(x.start - 8, _TOP - 10, "epsilon", _QUIET, anchor="end"))
    return parts


def _set_apart(ends: Sequence[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """The words at the ends of lines, moved so that none lies on another, all inside the picture."""
    placed: list[tuple[float, str, str]] = []
    floor = _HEIGHT - _BOTTOM + 4.0
    for height, words, colour in sorted(ends, reverse=True):
        height = min(height, floor)
        placed.append((height, words, colour))
        floor = height - _APART
    return placed


def _stroke(places: Sequence[tuple[float, float]], colour: str, *, width: float, dash: str = "") -> str:
    points = " ".join(f"{across},{down}" for across, down in places)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"{dashed}/>'


def _text(x: float, y: float, words: str, colour: str, *, anchor: str = "start", size: int = 13, weight: str = "400") -> str:
    style = f'fill="{colour}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"'
    return f'<text x="{round(x, 1)}" y="{round(y, 1)}" {style}>{escape(words)}</text>'

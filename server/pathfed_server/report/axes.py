"""Axes: which ticks to draw, and where a value lies. Pure arithmetic, in SVG user units (CSS pixels)."""

import math
from dataclasses import dataclass

#: Spans finer than this share of their values, or smaller than this number, are drawn like one value.
_FINEST = 1e-12
_SMALLEST = 1e-300


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, evenly spaced by 1, 2 or 5 times a power of ten, that cover [low, high].

    Raises:
        ValueError: a bound is not finite, or low > high.
    """
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise ValueError(f"an axis needs finite low <= high, got {low} and {high}")
    size = max(abs(low), abs(high))
    if high - low <= size * _FINEST or high - low < _SMALLEST:  # one value, as far as a drawing tells
        around = size / 2 if size > _SMALLEST else 0.5
        low, high = low - around, high + around
    rough = (high - low) / max(most - 1, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def label(value: float, step: float) -> str:
    """A tick's text: as many decimals as the step needs, thousands grouped."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return f"{value:,.{decimals}f}"


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to positions between start and end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The position of a value, rounded to a tenth of a pixel."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def round_ticks(first: int, last: int, most: int) -> list[int]:
    """Whole round numbers to label, at most `most` of them, first included."""
    step = 1
    for factor in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10_000, 100_000, 1_000_000):
        step = factor
        if (last - first) / factor + 1 <= most:
            break
    multiples = [index for index in range(first, last + 1) if index % step == 0]
    return multiples if step == 1 or (multiples and multiples[0] - first < step / 2) else [first, *multiples]

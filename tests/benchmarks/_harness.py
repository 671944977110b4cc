"""What the benchmarks share: `--quick`, interleaving, the machine's facts, targets, and the JSON line that comes last."""

import argparse
import json
import operator
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}

Item = TypeVar("Item")


@dataclass(frozen=True)
class Target:
    """A bound that a figure must keep: `figure <relation> bound`."""

    relation: str
    bound: float

    def met(self, figure: float | None) -> bool:
        """Whether the figure keeps it; one that was not measured, or is not a number, does not."""
        return figure is not None and _COMPARE[self.relation](figure, self.bound)


def arguments(description: str | None, *extra: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """Parse the command line: `--quick`, and what the benchmark adds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of under a minute: figures are rough")
    for flag, options in extra:
        parser.add_argument(flag, **options)
    return parser.parse_args()


def end_on_terminate() -> None:
    """Let SIGTERM end the benchmark as Ctrl-C does, so that no process is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def interleaved(
    sides: Mapping[str, Callable[[int], Sequence[Item]]], blocks: int, tell: Callable[[str], None]
) -> dict[str, list[list[Item]]]:
    """Measure the sides in turn, A B A B ..., so that whatever else the machine does falls on both.

    Args:
        sides: name to a function that measures once; it is given the block's number.
        blocks: how often each side is measured.
        tell: told what goes on.

    Returns:
        What each side's measurements gave, a list a block.
    """
    results: dict[str, list[list[Item]]] = {name: [] for name in sides}
    for block in range(blocks):
        for name, measure in sides.items():
            began = time.monotonic()
            found = list(measure(block))
            results[name].append(found)
            tell(f"block {block + 1} of {blocks}, {name}: {len(found)} in {time.monotonic() - began:.1f} s, load {os.getloadavg()[0]:.1f}")
    return results


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest, rounded to milliseconds."""
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def machine() -> dict[str, Any]:
    """What a reader must know to judge a figure: cores, load, versions. Names no path and no host."""
    return {
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("flwr", "torch")},
    }


def finish(name: str, figures: Mapping[str, Any], targets: Mapping[str, Target]) -> int:
    """Print the JSON line, last. A target's key names its figure.

    Returns:
        Exit status: 0 when every target is met, else 1.
    """
    met = all(target.met(figures[key]) for key, target in targets.items())
    line = {
        "name": name,
        "figures": dict(figures),
        "targets": {key: [target.relation, target.bound] for key, target in targets.items()},
        "met": met,
    }
    print(json.dumps(line), flush=True)
    return 0 if met else 1


def tell(text: str) -> None:
    """Say what goes on, on stderr: stdout is for the JSON line."""
    print(text, file=sys.stderr, flush=True)

"""The rounds of a run as rows: how long each took, and what became of the sites that were asked."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pathfed_server.db.watch_rows import RoundFacts
from pathfed_server.watching.run_view import round_for_scripts, round_seconds
from pathfed_server.watching.spans import duration, moment

_NOT_ASKED = "excluded"


def timed(rounds: Sequence[RoundFacts]) -> list[tuple[RoundFacts, float | None]]:
    """Each round with what it took, seconds; None: it is not committed."""
    took = round_seconds(rounds)
    return [(each, took.get(each.index)) for each in rounds]


def wire_rounding(facts: RoundFacts, noise: float) -> float | None:
    """The largest bound on an update's rounding, as a share of the noise in it (L2 norm `noise`); None: none is known."""
    found = [each.rounding for each in facts.outcomes if each.rounding is not None]
    return max(found) / noise if found else None


def for_people(facts: RoundFacts, took: float | None, noise: float) -> dict[str, Any]:
    """A round as a row of a table."""
    rounding = wire_rounding(facts, noise)
    asked = [each for each in facts.outcomes if each.state != _NOT_ASKED]
    codes = Counter(each.code for each in facts.outcomes if each.code is not None and each.state != _NOT_ASKED)
    return {
        "round": facts.index,
        "state": facts.state + (f" {facts.code}" if facts.code else ""),
        "offers": facts.attempt,
        "took": "-" if took is None else duration(took),
        "admitted": f"{sum(each.state == 'admitted' for each in asked)} of {len(asked)}",
        "not": ", ".join(f"{code}" + (f" x{number}" if number > 1 else "") for code, number in sorted(codes.items())) or "-",
        "rounding": "-" if rounding is None else f"{rounding:.2g}",
        "committed": "-" if facts.committed_at is None else moment(facts.committed_at),
    }


def for_scripts(facts: RoundFacts, took: float | None, noise: float) -> dict[str, Any]:
    """A round as `--json` prints it."""
    asked = [each for each in facts.outcomes if each.state != _NOT_ASKED]
    admitted = sum(each.state == "admitted" for each in asked)
    figures = {"seconds": took, "asked": len(asked), "admitted": admitted, "wire_rounding": wire_rounding(facts, noise)}
    return {**round_for_scripts(facts), **figures}

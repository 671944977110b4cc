"""Which sites are asked in a round where a plan asks fewer than could take part: they take turns, by a public rule.

The sites that may take part stand in a circle, in the order of the digests of (plan, run, site), which nobody chooses. Each round asks the
next `at_most` of them, beginning where the round before ended. So while the same n sites may take part, each is asked in at_most / n of the
rounds, to within one round; who they are follows from plan, run, round and the names alone, and anyone can compute it again.
"""

from collections.abc import Iterable

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, SiteName


def whose_turn(plan: Digest, run: RunName, round_index: int, sites: Iterable[SiteName], at_most: int) -> frozenset[SiteName]:
    """The sites asked in a round.

    Args:
        plan: digest of the plan.
        run: the run.
        round_index: 1 for the first.
        sites: those that may take part in this round.
        at_most: how many are asked; 0: all.
    """
    circle = sorted(set(sites), key=lambda site: digest.of_value(["turn", plan, run, site]))
    if not at_most or len(circle) <= at_most:
        return frozenset(circle)
    first = (round_index - 1) * at_most
    return frozenset(circle[(first + place) % len(circle)] for place in range(at_most))

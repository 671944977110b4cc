"""What releases have cost, summed up for people."""

from collections.abc import Sequence
from dataclasses import dataclass

from pathfed_client.budget.entry import LedgerEntry
from pathfed_common.digest import Digest
from pathfed_common.privacy.accounting import composed_epsilon


@dataclass(frozen=True, kw_only=True)
class PlanSpend:
    """What one plan's releases have cost.

    Attributes:
        releases: charges.
        steps: private steps in them.
        delta: the plan's delta.
        epsilon: at that delta, of this plan's releases alone.
    """

    releases: int
    steps: int
    delta: float
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class Spend:
    """What all releases have cost.

    Attributes:
        releases: charges.
        delta: the policy's delta.
        epsilon: at that delta, of all plans together.
        max_epsilon: the policy's limit.
        plans: each plan by its digest.
    """

    releases: int
    delta: float
    epsilon: float
    max_epsilon: float
    plans: dict[Digest, PlanSpend]


def by_plan(entries: Sequence[LedgerEntry]) -> dict[Digest, PlanSpend]:
    """What each plan's releases have cost alone, at the delta that the plan's last entry names."""
    groups: dict[Digest, list[LedgerEntry]] = {}
    for entry in entries:
        groups.setdefault(entry.plan, []).append(entry)
    return {
        plan: PlanSpend(
            releases=len(group),
            steps=sum(entry.event.steps for entry in group),
            delta=group[-1].plan_delta,
            epsilon=composed_epsilon([entry.event for entry in group], group[-1].plan_delta),
        )
        for plan, group in groups.items()
    }


def charged_for(entries: Sequence[LedgerEntry], run: str, round_index: int) -> float:
    """By how much a round's charges raised the site's epsilon, at the policy's delta; all of them, where a draw was discarded."""
    totals = [0.0, *(entry.epsilon_total for entry in entries)]
    of_round = [number for number, entry in enumerate(entries) if (entry.run, entry.round_index) == (run, round_index)]
    return sum(max(0.0, totals[number + 1] - totals[number]) for number in of_round)

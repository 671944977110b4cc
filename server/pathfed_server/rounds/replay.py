"""Recomputes a run's states from its admitted updates, with the very functions that the loop made them with.

The same updates, weights and first state give the same bytes on every machine (`aggregation`, `server_step`), so a verifier who has the
updates needs no trust in the server's arithmetic.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathfed_common.digest import Digest
from pathfed_common.ids import SiteName
from pathfed_common.model import trained
from pathfed_common.plan import Plan
from pathfed_server.rounds.aggregation import aggregate
from pathfed_server.rounds.released import average_digest
from pathfed_server.rounds.server_step import step, write_initial_optimiser
from pathfed_server.rounds.teacher import share_kept


@dataclass(frozen=True)
class Replayed:
    """What a round leaves, computed again.

    Attributes:
        round_index: 1 for the first.
        state: the state's file, which is there until the next round is asked for.
        average: digest of the running average's encoder file, where the plan has one.
        factors: what the sites' weights were multiplied by; a site that is not named has 1.
    """

    round_index: int
    state: Path
    average: Digest | None
    factors: Mapping[SiteName, float]


def replay_states(
    plan: Plan, sites: Sequence[Sequence[SiteName]], update: Callable[[int, SiteName], Path], *, first: Path, work: Path
) -> Iterator[Replayed]:
    """What each round leaves, computed again.

    Args:
        plan: the run's plan.
        sites: the admitted sites of each round, the first round first.
        update: gives the file of a site's update in a round.
        first: the state that the run starts from.
        work: an empty folder for files; at most two states and two optimiser files are in it at a time.

    Yields:
        Each round's, in order.

    Raises:
        ValueError: the files do not fit together.
        RoundError: PF514, a number of a state is not finite.
        HostError: the disk is full (PF901) or cannot be written (PF904).
    """
    mean, before, slots = work / "mean.safetensors", first, work / "optimiser-0.safetensors"
    write_initial_optimiser(plan.server_optimiser, first, slots, trained=trained(plan))
    for index, admitted in enumerate(sites, start=1):
        weights = {site: plan.site_weights.get(site, 1.0) for site in admitted}
        factors = aggregate(plan.aggregation, {site: update(index, site) for site in admitted}, weights, mean)
        after, next_slots = work / f"state-{index}.safetensors", work / f"optimiser-{index}.safetensors"
        teacher = plan.objective.teacher
        step(
            plan.server_optimiser,
            step_index=index,
            state=before,
            mean_update=mean,
            optimiser_state=slots,
            next_state=after,
            next_optimiser_state=next_slots,
            trained=trained(plan),
            teacher_keeps=None if teacher is None else share_kept(teacher, round_index=index, rounds=plan.rounds.count),
        )
        slots.unlink()
        if before != first:
            before.unlink()
        before, slots = after, next_slots
        yield Replayed(index, after, average_digest(plan, state=after, optimiser=slots), factors)

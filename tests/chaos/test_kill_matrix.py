"""Processes are killed with -9 at every phase of a round, one by one and all at once; the run ends with the encoder of one that nobody
disturbed, bit for bit.

A consortium is set up once and copied while it stands still. It runs undisturbed; then it is put back and runs again, and in every round
of that run a process of the server and one of each site are killed, each while a process of its owner stands at a named instant
(`pathfed_instants`). Every round has every site, so that both runs have the same participants.

`make chaos` runs every case; the ordinary run of the tests kills each process once, without a comparison (end_to_end/test_faults.py).
`SEED` chooses which site has which case, and what is drawn beside the fixed cases; `ROUNDS` how many rounds there are.
"""

import importlib
import operator

import pathfed_instants
import pytest
from kill_cases import AT_RANKS, AT_SERVER, AT_SITE
from kill_conductor import Case, Conductor, is_told
from kill_world import Ended, World, doubles
from tests.chaos.conftest import CHAOS, FULL, RESULTS, ROUNDS, WITHIN_S

from pathfed_server.rounds.state import RunState

pytestmark = pytest.mark.timeout(9000)
long = pytest.mark.skipif(not CHAOS, reason="runs with `make chaos`")


def test_every_instant_is_a_place_in_the_program() -> None:
    """A function that was renamed would never be reached."""
    told = {"opened", "decided", "collected", "averaged", "stepped", "recorded", "committed", "cleaned"}
    known = set(told)
    for module, functions in pathfed_instants.POINTS.items():
        for function, instants in functions.items():
            assert callable(operator.attrgetter(function)(importlib.import_module(module))), (module, function)
            known.update(instants)
    assert {*AT_SERVER, *AT_SITE, *AT_RANKS} <= known


@long
def test_an_undisturbed_run_counts_every_round_once_and_charges_every_round_once(world: World, undisturbed: Ended) -> None:
    rounds = tuple(range(1, len(undisturbed.committed) + 1))
    assert undisturbed.state is RunState.FINISHED, world.told
    assert undisturbed.committed == rounds
    assert set(undisturbed.charged.values()) == {rounds}
    assert set(undisturbed.admitted) == {tuple(one.name for one in world.hospitals)}


@long
def test_a_run_whose_processes_are_killed_ends_as_an_undisturbed_one(
    world: World, undisturbed: Ended, cases: list[Case], processes_of
) -> None:
    with world.again() as made:
        conductor = Conductor(world, made, cases, log=RESULTS, reference=undisturbed.checkpoints)
        state = conductor.drive(WITHIN_S)
        what = conductor.report()
        assert state is RunState.FINISHED, what
        assert doubles(made) == [], what
        assert world.ended(made) == undisturbed, what
    assert not processes_of(world.out)
    assert ROUNDS or not conductor.left, (conductor.left, what)
    assert [str(found.case) for found in conductor.happened if not found.hit] == [], what
    if not FULL:
        assert [str(case) for case in cases if not is_told(case, world.told)] == [], world.told

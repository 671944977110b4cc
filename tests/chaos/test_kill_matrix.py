"""Processes are killed with -9 at every phase of a round; the run ends with the encoder of a run that nobody disturbed, bit for bit.

A consortium is set up once and copied while it stands still. It runs undisturbed; then it is put back and runs again, and in every round
of that run a process of the server and one of each site are killed, each while a process of its owner stands at a named instant
(`pathfed_instants`). Every round has every site, so that both runs have the same participants.

`make chaos` runs every case; the ordinary run of the tests kills each process once, without a comparison (end_to_end/test_faults.py).
`SEED` chooses which site has which case, and what is drawn beside the fixed cases; `ROUNDS` how many rounds there are.
"""

import importlib
import operator
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pathfed_instants
import pytest
from kill_conductor import Case, Conductor, is_told, victim_of
from kill_world import KINDS, Ended, World, doubles
from tests.chaos.conftest import CHAOS, FULL, RESULTS, ROUNDS, SEED

from pathfed_server.rounds.state import RunState

SERVER = pathfed_instants.SERVER
#: They bound a hang.
_RUN_WITHIN_S = 7200.0 if FULL else 1800.0
pytestmark = pytest.mark.timeout(9000)
long = pytest.mark.skipif(not CHAOS, reason="runs with `make chaos`")

#: instant at the server -> who is killed there
AT_SERVER: dict[str, tuple[str, ...]] = {
    "opened": ("round loop", "superlink"),
    "base state leaves": ("round loop", "server"),
    "offered": ("round loop", "superexec", "fleet door"),
    "collecting": ("round loop", "server", "control plane"),
    "spooled": ("round loop", "superlink"),
    "decided": ("round loop",),
    "collected": ("round loop", "superexec"),
    "averaged": ("round loop", "superlink"),
    "stepped": ("round loop", "server"),
    "recorded": ("round loop", "superexec"),
    "in the database": ("round loop",),
    "committed": ("round loop", "superlink", "server"),
    "cleaned": ("round loop", "control plane"),
}
#: instant at a site -> who is killed there
AT_SITE: dict[str, tuple[str, ...]] = {
    "SuperNode receives": ("supernode", "superlink"),
    "base state travels": ("runner", "relay"),
    "offer taken": ("runner",),
    "before the charge": ("runner", "site", "agent"),
    "charge stored": ("runner",),
    "charged": ("runner", "supernode", "superexec"),
    "training": ("site", "relay"),
    "trained": ("runner", "round loop"),
    "update written": ("runner",),
    "sealed": ("runner", "site"),
    "secret erased": ("runner", "agent"),
    "written down": ("runner", "supernode"),
    "update travels": ("runner", "relay", "superlink", "fleet door"),
    "update handed over": ("runner", "server"),
    "SuperNode sends": ("supernode", "site"),
}
#: The site that computes with two ranks, and reads with processes of their own.
AT_RANKS: dict[str, tuple[str, ...]] = {
    "a rank trains": ("rank", "tile reader"),
    "charged": ("rank",),
    "before the charge": ("rank",),
}
#: The ordinary run's: each kind once.
SHORT = (
    ("server", "base state leaves", SERVER),
    ("round loop", "averaged", SERVER),
    ("superlink", "committed", SERVER),
    ("superexec", "collected", SERVER),
    ("control plane", "cleaned", SERVER),
    ("fleet door", "offered", SERVER),
    ("runner", "charged", 0),
    ("relay", "update travels", 0),
    ("supernode", "SuperNode sends", 1),
    ("agent", "sealed", 1),
    ("site", "training", 2),
    ("rank", "a rank trains", 2),
)


def test_every_instant_is_a_place_in_the_program() -> None:
    """A function that was renamed would never be reached."""
    told = {"opened", "decided", "collected", "averaged", "stepped", "recorded", "committed", "cleaned"}
    known = set(told)
    for module, functions in pathfed_instants.POINTS.items():
        for function, instants in functions.items():
            assert callable(operator.attrgetter(function)(importlib.import_module(module))), (module, function)
            known.update(instants)
    assert {*AT_SERVER, *AT_SITE, *AT_RANKS} <= known


def matrix(sites: Sequence[str], seed: int) -> list[Case]:
    """Every case, each site with about as many; which has which, and in which order, by the seed."""
    rng = random.Random(seed)
    cases = [Case(kind, instant, SERVER, victim_of(kind, rng.choice(sites))) for instant, kinds in AT_SERVER.items() for kind in kinds]
    rng.shuffle(cases)
    at_sites = [(kind, instant) for instant, kinds in AT_SITE.items() for kind in kinds]
    rng.shuffle(at_sites)
    # What keeps a site from answering for a minute comes first at every site, in the same rounds.
    at_sites.sort(key=lambda case: case[0] not in ("runner", "supernode", "site"))
    for number, (kind, instant) in enumerate(at_sites):
        site = sites[number % len(sites)]
        cases.append(Case(kind, instant, site, victim_of(kind, site)))
    cases += [Case(kind, instant, sites[-1], sites[-1]) for instant, kinds in AT_RANKS.items() for kind in kinds]
    # Some more that nobody thought of: any process at any instant of any owner.
    for _ in range(6):
        owner = rng.choice([SERVER, *sites])
        kind = rng.choice([kind for kind in KINDS if kind not in ("rank", "tile reader")])
        instant = rng.choice(list(AT_SERVER if owner == SERVER else AT_SITE))
        cases.append(Case(kind, instant, owner, victim_of(kind, rng.choice(sites))))
    return cases


def short(sites: Sequence[str]) -> list[Case]:
    """The short set: each kind of process once."""
    found = []
    for kind, instant, at in SHORT:
        owner = at if isinstance(at, str) else sites[at]
        found.append(Case(kind, instant, owner, victim_of(kind, owner)))
    return found


def rounds_for(cases: Sequence[Case]) -> int:
    """So many that the busiest owner's cases each have a round, with some left for those that have to wait for another."""
    owners = [case.owner for case in cases]
    most = max(owners.count(owner) for owner in owners)
    return most + 2 + most // 6


@pytest.fixture(scope="module")
def cases(hospitals: Path) -> list[Case]:
    from pathfed_local.consortium import find_hospitals

    sites = [one.name for one in find_hospitals(hospitals, 3)]
    return matrix(sites, SEED) if FULL else short(sites)


@pytest.fixture(scope="module")
def world(make_world: Callable[[int], World], cases: list[Case]) -> World:
    return make_world(ROUNDS or rounds_for(cases))


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Ended:
    """How the run ends when nothing is killed."""
    with world.again() as made:
        Conductor(world, made, []).drive(_RUN_WITHIN_S)
        return world.ended(made)


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
        conductor = Conductor(world, made, cases, log=RESULTS)
        state = conductor.drive(_RUN_WITHIN_S)
        what = "\n".join([*(found.line() for found in conductor.happened), *world.told])
        assert state is RunState.FINISHED, what
        assert doubles(made) == [], what
        assert world.ended(made) == undisturbed, what
    assert not processes_of(world.out)
    assert ROUNDS or not conductor.left, (conductor.left, what)
    assert [str(found.case) for found in conductor.happened if not found.hit] == [], what
    if not FULL:
        assert [str(case) for case in cases if not is_told(case, world.told)] == [], world.told

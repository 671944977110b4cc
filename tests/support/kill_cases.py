"""Which process is killed at which instant: the cases of the kill matrix."""

import random
from collections.abc import Sequence

import pathfed_instants
from kill_conductor import EVERYTHING, Case, victim_of
from kill_world import KINDS

SERVER = pathfed_instants.SERVER
#: instant at the server -> who is killed there
AT_SERVER: dict[str, tuple[str, ...]] = {
    "opened": ("round loop", "superlink"),
    "offer made": ("round loop", "server"),
    "base state leaves": ("control plane",),
    "update arrives": ("control plane", "round loop"),
    "offered": ("round loop", "superexec", "fleet door"),
    "offer delivered": ("fleet door", "superlink"),
    "collecting": ("round loop", "server", "control plane", EVERYTHING),
    "spooled": ("round loop", "superlink"),
    "decided": ("round loop",),
    "collected": ("round loop", "superexec"),
    "averaged": ("round loop", "superlink"),
    "stepped": ("round loop", "server"),
    "recorded": ("round loop", "superexec", EVERYTHING),
    "in the database": ("round loop", EVERYTHING),
    "committed": ("round loop", "superlink", "server"),
    "cleaned": ("round loop", "control plane"),
}
#: instant at a site -> who is killed there
AT_SITE: dict[str, tuple[str, ...]] = {
    "SuperNode receives": ("supernode", "superlink"),
    "offer travels": ("runner",),
    "base state travels": ("runner", "relay", "control plane"),
    "base state fetched": ("runner",),
    "offer taken": ("runner",),
    "before the charge": ("runner", "site", "agent"),
    "charge stored": ("runner",),
    "charged": ("runner", "supernode", "superexec", EVERYTHING),
    "training": ("site", "relay"),
    "trained": ("runner", "round loop"),
    "update written": ("runner",),
    "sealed": ("runner", "site"),
    "secret erased": ("runner", "agent", EVERYTHING),
    "written down": ("runner", "supernode"),
    "update travels": ("runner", "relay", "superlink"),
    "update handed over": ("runner", "control plane", EVERYTHING),
    "statement travels": ("runner", "fleet door"),
    "statement handed over": ("runner", "server"),
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
    ("server", "offer made", SERVER),
    ("round loop", "averaged", SERVER),
    ("superlink", "committed", SERVER),
    ("superexec", "collected", SERVER),
    ("control plane", "update arrives", SERVER),
    ("fleet door", "offer delivered", SERVER),
    ("runner", "charged", 0),
    ("relay", "update travels", 0),
    ("supernode", "SuperNode sends", 1),
    ("agent", "sealed", 1),
    ("site", "training", 2),
    ("rank", "a rank trains", 2),
)


def matrix(sites: Sequence[str], seed: int) -> list[Case]:
    """Every case, each site with about as many; which has which, and in which order, by the seed."""
    rng = random.Random(seed)
    cases = [Case(kind, instant, SERVER, victim_of(kind, rng.choice(sites))) for instant, kinds in AT_SERVER.items() for kind in kinds]
    rng.shuffle(cases)
    at_sites = [(kind, instant) for instant, kinds in AT_SITE.items() for kind in kinds]
    rng.shuffle(at_sites)
    # What keeps a site from answering for a minute comes first at every site, in the same rounds.
    at_sites.sort(key=lambda case: case[0] not in ("runner", "supernode", "site", EVERYTHING))
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
    return most + 2 + most // 3

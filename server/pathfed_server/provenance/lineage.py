"""What a site's updates went into: states, releases, and runs that started from a release. Pure.

An update of round r is in the state that r left behind and in every later state of the run, for each is made from the one before. A run
that starts from the encoder of another run carries all that is in that encoder, and so on.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, SiteName


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """A run, as far as its lineage goes.

    Attributes:
        run: the run.
        plan: digest of its plan.
        open: whether it may still have rounds.
        quorum: updates that a round of it needs.
        listed: the sites it asks.
        committed: rounds committed so far.
        contributions: by site, the committed rounds that its update counted in.
        encoder: digest of the exported encoder; None: it has not finished, or its record is not there.
        starts_from: digest of the encoder it starts from; None: random weights.
        releases: digests of its releases, the oldest first.
    """

    run: RunName
    plan: Digest
    open: bool
    quorum: int
    listed: tuple[SiteName, ...]
    committed: int
    contributions: Mapping[SiteName, tuple[int, ...]]
    encoder: Digest | None
    starts_from: Digest | None
    releases: tuple[Digest, ...]


@dataclass(frozen=True, kw_only=True)
class Touched:
    """A run that a site's updates are in.

    Attributes:
        line: the run.
        rounds: the rounds that its own updates counted in.
        through: the run whose encoder this one starts from and that carries the site's updates; None: there is none such.
    """

    line: RunLine
    rounds: tuple[int, ...]
    through: RunName | None

    @property
    def first_state(self) -> int:
        """The first state with the site's updates in it: 0 is the run's initial one."""
        return 0 if self.through is not None else self.rounds[0]

    @property
    def states(self) -> int:
        """How many committed states have them in."""
        return self.line.committed + 1 - self.first_state


def touched_by(site: SiteName, lines: Sequence[RunLine]) -> list[Touched]:
    """The runs whose states carry a site's updates, in the order given, which is that of their beginning."""
    carriers: dict[Digest, RunName] = {}
    found = []
    for line in lines:
        rounds = line.contributions.get(site, ())
        through = None if line.starts_from is None else carriers.get(line.starts_from)
        if rounds or through is not None:
            found.append(Touched(line=line, rounds=rounds, through=through))
            if line.encoder is not None:
                carriers.setdefault(line.encoder, line.run)
    return found


def sites_in(line: RunLine, lines: Sequence[RunLine]) -> dict[SiteName, list[Touched]]:
    """The sites whose updates are in a run's last state: for each, the runs that brought them in, the earliest first."""
    behind = _ancestry(line, lines)
    everyone = sorted({site for each in behind for site in each.contributions})
    return {site: [each for each in touched_by(site, behind) if each.rounds] for site in everyone}


def _ancestry(line: RunLine, lines: Sequence[RunLine]) -> list[RunLine]:
    """The run and those that its start goes back to, the earliest first."""
    made = {each.encoder: each for each in reversed(lines) if each.encoder is not None}
    found = [line]
    while (start := found[0].starts_from) is not None and start in made and made[start] not in found:
        found.insert(0, made[start])
    return found


def can_be_undone(site: SiteName, *, revoked: bool, lines: Sequence[RunLine]) -> list[str]:
    """What a site's withdrawal still changes, in plain words."""
    asking = [line.run for line in lines if line.open and site in line.listed]
    told = ["No further round asks the site: it was revoked." if revoked else "Revoke the site, and no further round asks it."]
    if asking and not revoked:
        told.append(f"These runs ask it until then: {', '.join(asking)}.")
    for line in lines:
        if line.open and site in line.listed:
            left = len(line.listed) - 1
            verdict = "its rounds can still count" if left >= line.quorum else "its rounds no longer count, and it fails"
            told.append(f"Without it, run {line.run} has {left} sites, and a round needs {line.quorum}: {verdict}.")
    unreleased = [each.line.run for each in touched_by(site, lines) if not each.line.releases]
    if unreleased:
        told.append(
            f"Nobody but you has the encoders of runs that are not released ({', '.join(unreleased)}). You can leave them so and run the "
            "plan anew without the site, which costs the other sites' patients privacy once more."
        )
    return told


def cannot_be_undone(touched: Iterable[Touched]) -> list[str]:
    """What stays whatever is done, in plain words."""
    found = list(touched)
    if not found:
        return ["Nothing: no committed state has an update of the site in it."]
    states, releases = sum(each.states for each in found), [name for each in found for name in each.line.releases]
    told = [
        f"{states} committed states of {len(found)} runs have its updates in them. They cannot be taken out: each state is made from the "
        "one before and from a weighted sum of the round's updates."
    ]
    if releases:
        told.append(f"{len(releases)} releases were made from these states. Copies that others hold cannot be called back.")
    told.append("Its statements and approvals stay in the record and in the log. They hold no patient's data.")
    told.append("What was spent of its patients' privacy is spent. The guarantee of every update holds for ever, with or without the site.")
    return told

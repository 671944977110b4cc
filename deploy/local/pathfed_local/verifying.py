"""`pathfed verify`: reads a bundle or a record, and the keys a person trusts, and says in plain words what holds and what does not."""

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path, PurePosixPath
from typing import Any

from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.provenance.record import MANIFEST
from pathfed_common.provenance.release import RELEASE
from pathfed_common.provenance.release_verify import ReleaseVerdict
from pathfed_common.provenance.verify import Verdict

#: Folders of a demo in which a release or a record lies.
_WITHIN = ("", "release", "record")


class Status(IntEnum):
    """Exit statuses of `pathfed verify`, beside 16 for what does not verify."""

    PROVEN = 0
    IDENTITIES_UNPROVEN = 3
    AGGREGATION_UNPROVEN = 4
    BOTH_UNPROVEN = 5
    UNREADABLE = 6


def find_record(folder: Path) -> Path:
    """The bundle or record in a folder: the folder itself, or `release/` or `record/` in a demo's.

    Raises:
        ProvenanceError: PF615, there is none.
    """
    for place in _WITHIN:
        if any((folder / place / name).is_file() for name in (RELEASE, MANIFEST)):
            return folder / place
    raise _unreadable("no release and no record is there", folder)


@contextmanager
def opened(given: Path) -> Iterator[Path]:
    """A folder to verify, out of what a person named: a folder, or an archive, which is unpacked for the time being.

    Raises:
        ProvenanceError: PF615, neither a release nor a record is there, or the archive cannot be read.
    """
    if not given.is_file():
        yield find_record(given)
        return
    with tempfile.TemporaryDirectory(prefix="pathfed-verify-") as place:
        _unpack(given, Path(place))
        yield find_record(Path(place))


def _unpack(archive: Path, folder: Path) -> None:
    """Only folders and files of their own, below the folder, each once: anything else is refused before it is written."""
    try:
        with tarfile.open(archive) as packed:
            seen: set[str] = set()
            for member in packed:
                path = PurePosixPath(member.name)
                if not (member.isfile() or member.isdir()) or path.is_absolute() or ".." in path.parts or str(path) in seen:
                    raise _unreadable(f"an archive of a bundle has no such entry: {member.name[:80]!r}", archive)
                seen.add(str(path))
                packed.extract(member, folder, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _unreadable(f"not an archive that can be read: {error}", archive) from None


def status(verdict: ReleaseVerdict) -> Status:
    """The exit status of a bundle in which nothing is wrong. From a start that nobody checked, no aggregate is proven."""
    return {
        (True, True): Status.PROVEN,
        (False, True): Status.IDENTITIES_UNPROVEN,
        (True, False): Status.AGGREGATION_UNPROVEN,
        (False, False): Status.BOTH_UNPROVEN,
    }[verdict.identities_proven, verdict.aggregation_proven and verdict.record.first_state_proven]


def record_status(verdict: Verdict) -> Status:
    """The exit status of a record in which nothing is wrong; the aggregation does not count."""
    return {
        (True, True): Status.PROVEN,
        (False, True): Status.IDENTITIES_UNPROVEN,
        (True, False): Status.AGGREGATION_UNPROVEN,
        (False, False): Status.BOTH_UNPROVEN,
    }[verdict.identities_proven, verdict.first_state_proven]


def proven(verdict: ReleaseVerdict) -> list[str]:
    """What a bundle in which nothing is wrong proves, sentence by sentence."""
    sites, card = len(verdict.record.sites), verdict.card
    limit = card.epsilon_limit if card else 0
    states = f"{verdict.record.rounds + 1} states, each made from the one before in a recorded round"
    told = [
        f"The encoder is the running average that the last round names, over {states}."
        if card is not None and card.average
        else f"The encoder is the last of {states}.",
        *(["The first state is the plan's: the checkpoint it names, or its seed's draw."] if verdict.record.first_state_proven else []),
        f"{sum(site.rounds for site in verdict.record.sites)} updates of {sites} sites went in. Each was signed at its site for this "
        "round, plan and state, and is in the log in its place.",
        f"No site's releases cost a patient more than epsilon {limit:g}, which each site approved, at delta {verdict.record.delta:g}.",
        f"{len(verdict.cosigned)} of {len(verdict.enrolled)} enrolled sites have co-signed the log of {verdict.leaves} entries that holds "
        "all this and this release. The operator was not counted.",
        "The card says what the record says, the model signature is over these files, and no file is missing or extra.",
    ]
    if verdict.identities_proven:
        told.append("The keys of server, sites and co-signers are those you trust.")
    if verdict.aggregation_proven:
        what = "state and running average" if card is not None and card.average else "state"
        told.append(f"Recomputed from the sites' updates, every {what} is the recorded one, bit for bit.")
    return told


def not_proven(verdict: ReleaseVerdict) -> list[str]:
    """What it does not prove, sentence by sentence."""
    told = []
    if not verdict.identities_proven:
        told.append(
            "IDENTITIES (PF604): whose keys these are. Anyone can make a consistent bundle with keys of their own. Give --trust with the "
            "keys of the server, of every site in the run, and of more than half of the log's sites."
        )
    if not verdict.aggregation_proven:
        what = ", and the encoder the states' running average" if verdict.card is not None and verdict.card.average else ""
        told.append(
            f"AGGREGATION (PF623): that each state is the aggregate of its updates{what}. Give --replay with the retained updates to "
            "recompute it."
        )
    if not verdict.record.first_state_proven:
        told.append("FIRST STATE (PF630): that the first state's random weights are the draw of the plan's seed. Leave out --no-redraw.")
    return [
        *told,
        "That sites ran the code whose digest they state, or trained on the patients that they declare.",
        "What the evaluation's figures mean, where there are some.",
    ]


def release_summary(verdict: ReleaseVerdict) -> dict[str, Any]:
    """A bundle's verdict that found nothing wrong, for people and scripts."""
    found = summary(verdict.record)
    return {
        "run": found["run"],
        "encoder": verdict.release.encoder if verdict.release else None,
        "plan": found["plan"],
        "rounds": found["rounds"],
        "identities_proven": verdict.identities_proven,
        "aggregation_proven": verdict.aggregation_proven,
        "first_state_proven": found["first_state_proven"],
        "log_entries": verdict.leaves,
        "enrolled": sorted(verdict.enrolled),
        "cosigned": sorted(verdict.cosigned),
        "delta": found["delta"],
        "sites": found["sites"],
        "notes": found["notes"],
    }


def summary(verdict: Verdict) -> dict[str, Any]:
    """A record's verdict that found nothing wrong, for people and scripts."""
    return {
        "run": verdict.run,
        "plan": verdict.plan,
        "rounds": verdict.rounds,
        "identities_proven": verdict.identities_proven,
        "aggregation_proven": verdict.aggregation_proven,
        "first_state_proven": verdict.first_state_proven,
        "delta": verdict.delta,
        "sites": {
            site.site: {"rounds": site.rounds, "epsilon_stated": site.epsilon_stated, "epsilon_recomputed": site.epsilon_recomputed}
            for site in verdict.sites
        },
        "notes": list(verdict.notes),
    }


def _unreadable(what: str, where: Path) -> ProvenanceError:
    remedy = f"name the folder that holds {RELEASE} or {MANIFEST}, or a bundle's archive"
    return ProvenanceError(ErrorCode.BUNDLE_UNREADABLE, what, where=where, remedy=remedy)

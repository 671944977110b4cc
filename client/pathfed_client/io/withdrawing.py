"""Withdrawals: from a list of identifiers to names that are out for good.

Whole or not at all: one line that fits nothing refuses all of them, so that nobody believes a person withdrawn because of a slip of the
pen. Identifiers come in a file or on standard input, never as an argument: a shell keeps those.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from pathfed_client.cohort.list_file import decode_list
from pathfed_client.cohort.matching import SlideFinder, names_and_stems
from pathfed_client.cohort.patient_list import pseudonym
from pathfed_client.cohort.withdrawal import Withdrawn, WithdrawnKind, of_slide
from pathfed_client.io.site_records import Event, SlideRecord
from pathfed_client.io.site_store import SiteStore
from pathfed_client.io.slide_files import SUFFIXES, slide_names
from pathfed_common.errors import ErrorCode, SiteDataError

_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class WithdrawReport:
    """What a withdrawal did.

    Attributes:
        patients: patients named.
        slides: slides that are out with them or by their own names.
        new: whether anything of it was not withdrawn before.
    """

    patients: int
    slides: int
    new: bool


@dataclass(frozen=True)
class WithdrawalInput:
    """Identifiers as they come in.

    Attributes:
        data: the bytes, one identifier a line.
        where: what they come from, for errors.
    """

    data: bytes
    where: str

    def lines(self) -> list[tuple[int, str]]:
        """Line numbers and identifiers; empty lines are left out.

        Raises:
            SiteDataError: no text (PF202), or no identifier (PF235).
        """
        text, _ = decode_list(self.data, where=self.where)
        found = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        if not found:
            raise SiteDataError(ErrorCode.WITHDRAWAL_UNKNOWN, "there is no identifier: nothing was withdrawn", where=self.where)
        return found


@dataclass(frozen=True)
class KnownHere:
    """What a site knows beside its database, asked for only where that does not suffice.

    Attributes:
        listed: pseudonyms of the patient list.
        names: of each slide in the folders by its path, all its names.
    """

    listed: Callable[[], Collection[str]]
    names: Callable[[], Mapping[str, Collection[str]]]


def withdraw(
    store: SiteStore,
    key: bytes,
    known: KnownHere,
    *,
    patients: WithdrawalInput | None,
    slides: WithdrawalInput | None,
    now: float,
) -> WithdrawReport:
    """Withdraw patients and slides, at once for every later draw.

    Args:
        store: the site database.
        key: of the pseudonyms.
        known: the patient list and the slides folder.
        patients: patient identifiers, spelled as in the list up to case and white space.
        slides: slides, named as in the patient list.
        now: UTC seconds.

    Raises:
        SiteDataError: PF235 with the lines that fit nothing, or several slides; PF202, no text. Nothing was withdrawn.
    """
    scanned = store.all_slides()
    names = _patients(patients, scanned, store.withdrawn(), key, known) if patients else {}
    paths = _paths(slides, scanned, known) if slides else set()
    concerned = [record for record in scanned if record.patient in names or record.path in paths]
    kept = {Withdrawn(WithdrawnKind.PATIENT, name) for name in names}
    kept |= {name for path in paths for name in of_slide(key, path, None)}
    kept |= {name for record in concerned for name in of_slide(key, record.path, record.fingerprint)}
    out = {record.path for record in concerned} | paths
    said = f"{len(names)} patients, {len(out)} slides" + (f": {', '.join(sorted(names))}" if names else "")
    new = store.withdraw(kept, Event(at=now, kind="withdraw", detail=said))
    return WithdrawReport(patients=len(names), slides=len(out), new=new > 0)


def _patients(
    given: WithdrawalInput, scanned: Collection[SlideRecord], withdrawn: Collection[Withdrawn], key: bytes, known: KnownHere
) -> dict[str, int]:
    """Pseudonym -> line of each patient named."""
    named = [(line, pseudonym(key, text)) for line, text in given.lines()]
    here: set[str] = {record.patient for record in scanned if record.patient is not None}
    here |= {one.name for one in withdrawn if one.kind is WithdrawnKind.PATIENT}
    if not all(name in here for _, name in named):
        here |= set(known.listed())
    unknown = [line for line, name in named if name not in here]
    if unknown:
        raise _unknown("no patient of this site", unknown, given.where)
    return {name: line for line, name in named}


def _paths(given: WithdrawalInput, scanned: Collection[SlideRecord], known: KnownHere) -> set[str]:
    """Paths of the slides named."""
    paths = {record.path for record in scanned}
    if all(text in paths for _, text in given.lines()):
        return {text for _, text in given.lines()}
    names = {record.path: slide_names(record.path, record.parts) for record in scanned}
    for path, more in known.names().items():
        names[path] = names.get(path, frozenset()) | set(more)
    finder = SlideFinder({path: names_and_stems(found, SUFFIXES) for path, found in names.items()})
    fitting = [(line, finder.find(text)) for line, text in given.lines()]
    unclear = [line for line, found in fitting if len(found) != 1]
    if unclear:
        raise _unknown("no slide of this site, or several", unclear, given.where)
    return {found[0] for _, found in fitting}


def _unknown(what: str, lines: Collection[int], where: str) -> SiteDataError:
    shown = ", ".join(str(line) for line in list(lines)[:_SHOWN])
    more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return SiteDataError(
        ErrorCode.WITHDRAWAL_UNKNOWN,
        f"lines that name {what}: nothing was withdrawn",
        where=where,
        value=f"lines {shown}{more}",
        remedy="correct them and give all lines again",
    )

"""The patient list laid against the slide folders: what a scan acts on, and what `pathfed-site patients` shows.

Nothing is written and no slide is opened here; only the heads of DICOM files are read, to tell which of them are one slide.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pathfed_client.cohort.cohort import Pseudonym
from pathfed_client.cohort.list_file import ListTable
from pathfed_client.cohort.matching import Matching, match, names_and_stems
from pathfed_client.cohort.patient_list import KEPT, Finding, PatientList, pseudonym, read_patient_list
from pathfed_client.cohort.withdrawal import Withdrawn, is_withdrawn
from pathfed_client.io.site_records import SlideStatus
from pathfed_client.io.slide_files import SUFFIXES
from pathfed_common.errors import ErrorCode, SiteDataError

#: Findings that end a scan with an error once it is done, the gravest first.
_GRAVE = (ErrorCode.SLIDE_LISTED_TWICE, ErrorCode.SLIDE_LINES_CONFLICT, ErrorCode.LIST_LINE_UNUSABLE)
_GRAVE_WORDS = {
    ErrorCode.SLIDE_LISTED_TWICE: "a slide is listed for different patients; it is left out",
    ErrorCode.SLIDE_LINES_CONFLICT: "lines about one slide contradict each other; it is left out",
    ErrorCode.LIST_LINE_UNUSABLE: "a line of the patient list cannot be used; its slide is left out",
}


@dataclass(frozen=True, kw_only=True)
class ListedSlide:
    """A line of the patient list that could not be laid to one slide."""

    slide: str
    line: int
    code: ErrorCode = ErrorCode.SLIDE_MISSING
    ambiguous: bool = False


@dataclass(frozen=True)
class Placed:
    """A slide that is certainly one patient's.

    Attributes:
        patient: the pseudonym.
        attributes: what the list gives, of `cohort.patient_list.KEPT`.
        mpp: the resolution that the list gives, um/px of level 0, or None.
    """

    patient: Pseudonym
    attributes: Mapping[str, str]
    mpp: float | None


@dataclass(frozen=True)
class Out:
    """Why a slide is not read: it has no certain patient, or was withdrawn."""

    status: SlideStatus = SlideStatus.UNMAPPED
    code: ErrorCode = ErrorCode.SLIDE_UNMAPPED
    detail: str = "not in the patient list"


NOT_LISTED = Out()
WITHDRAWN = Out(SlideStatus.REFUSED, ErrorCode.SLIDE_WITHDRAWN, "withdrawn")


@dataclass(frozen=True)
class Listing:
    """A patient list and what became of it.

    Attributes:
        path: where the list lies.
        table: how the file was read.
        listed: its lines.
        matching: the lines laid against the slides.
    """

    path: Path
    table: ListTable
    listed: PatientList
    matching: Matching

    @property
    def not_found(self) -> tuple[ListedSlide, ...]:
        """Lines whose slide is not there, or whose name fits several."""
        found = [ListedSlide(slide=row.slide, line=row.line) for row in self.matching.missing]
        found += [
            ListedSlide(slide=row.slide, line=row.line, code=ErrorCode.SLIDE_AMBIGUOUS, ambiguous=True) for row in self.matching.ambiguous
        ]
        return tuple(sorted(found, key=lambda entry: entry.line))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Lines that cannot be used, and slides that are out for what the list says of them."""
        of_slides = [finding for finding in self.matching.refused.values() if finding not in self.listed.unusable]
        return tuple(sorted((*self.listed.unusable, *of_slides), key=lambda finding: finding.lines))

    @property
    def error(self) -> SiteDataError | None:
        """The error that a scan of this list ends with, or None.

        PF203 for a slide of two patients, else PF231 for a contradiction, else PF232 for a line that cannot be used.
        """
        for code in _GRAVE:
            found = [finding for finding in self.findings if finding.code is code]
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                place = f"{self.path}, line{'s' if len(found[0].lines) > 1 else ''} {_joined(found[0].lines)}"
                return SiteDataError(code, _GRAVE_WORDS[code], where=place, value=f"{found[0].slide or found[0].what}{more}")
        return None

    def lines_by_patient(self, key: bytes) -> dict[Pseudonym, tuple[int, ...]]:
        """Each patient of the list with the lines, in order of the list."""
        lines: defaultdict[Pseudonym, list[int]] = defaultdict(list)
        for row in self.listed.rows:
            lines[pseudonym(key, row.patient)].append(row.line)
        return {name: tuple(numbers) for name, numbers in lines.items()}

    def placed(self, key: bytes, withdrawn: Collection[Withdrawn]) -> tuple[dict[str, Placed], dict[str, Out]]:
        """The slides to read and the slides that are out, by their paths; a slide in neither is not listed.

        Args:
            key: of the pseudonyms.
            withdrawn: what was withdrawn at this site.
        """
        slides: dict[str, Placed] = {}
        out = {path: Out(code=finding.code, detail=finding.what) for path, finding in self.matching.refused.items()}
        for path, mapped in self.matching.slides.items():
            patient = pseudonym(key, mapped.patient)
            if is_withdrawn(withdrawn, key, patient=patient, path=path, fingerprint=None):
                out[path] = WITHDRAWN
            else:
                slides[path] = Placed(patient, mapped.attributes, mapped.mpp)
        return slides, out


def read_listing(path: Path, slides: Mapping[str, Collection[str]], columns: Mapping[str, str] | None = None) -> Listing:
    """Read a patient list and lay it against slides.

    Args:
        path: the list.
        slides: of each slide that is there, or may be, by its path: what the list may call it (`slide_files.slide_names`).
        columns: configured headers, see `cohort.list_file.read_table`.

    Raises:
        SiteDataError: the list cannot be read at all (PF202).
    """
    table, listed = read_list(path, columns)
    names = {slide: names_and_stems(called, SUFFIXES) for slide, called in slides.items()}
    return Listing(path, table, listed, match(listed, names))


def read_list(path: Path, columns: Mapping[str, str] | None = None) -> tuple[ListTable, PatientList]:
    """Read a patient list.

    Raises:
        SiteDataError: it cannot be read at all (PF202).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SiteDataError(ErrorCode.PATIENT_LIST_UNREADABLE, f"the patient list cannot be read: {error.strerror}", where=path) from error
    return read_patient_list(data, where=str(path), columns=columns)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a scan would make of a list. For the site's own eyes: it names slides, but no patient.

    Attributes:
        encoding: how the file was read.
        separator: between fields, in words.
        header_line: the header's line number.
        columns: role -> the header's text.
        unused_columns: headers without a role.
        lines: lines below the header.
        slides: slides that are there.
        mapped: slides that would be read.
        patients: patients with a slide that is there.
        unmapped: slides that are on no line.
        not_found: lines whose slide is not there, or whose name fits several.
        list_findings: lines that cannot be used, and slides that are out for what the list says of them.
        unreachable: folders that could not be listed, with the reason; lines of their slides come under `not_found`.
        attributes: of each attribute, its values with the number of slides that would be read; an empty value for those without.
    """

    encoding: str
    separator: str
    header_line: int
    columns: Mapping[str, str]
    unused_columns: tuple[str, ...]
    lines: int
    slides: int
    mapped: int
    patients: int
    unmapped: tuple[str, ...]
    not_found: tuple[ListedSlide, ...]
    list_findings: tuple[Finding, ...]
    unreachable: Mapping[str, str]
    attributes: Mapping[str, Mapping[str, int]]

    def to_dict(self) -> dict[str, object]:
        """The preview as `--json` prints it."""
        return asdict(self)


def preview(listing: Listing, slides: Collection[str], key: bytes, *, unreachable: Mapping[str, str] | None = None) -> Preview:
    """What a scan would make of a list.

    Args:
        listing: the list, laid against these slides.
        slides: paths of the slides that are there.
        key: of the pseudonyms.
        unreachable: folders that could not be listed, with the reason.
    """
    mapped, table = listing.matching.slides, listing.table
    known = {*mapped, *listing.matching.refused}
    counts = {name: Counter(slide.attributes.get(name, "") for slide in mapped.values()) for name in KEPT}
    return Preview(
        encoding=table.encoding,
        separator=table.separator,
        header_line=table.header_line,
        columns=table.columns,
        unused_columns=table.unused,
        lines=len(table.lines),
        slides=len(slides),
        mapped=len(mapped),
        patients=len({pseudonym(key, slide.patient) for slide in mapped.values()}),
        unmapped=tuple(sorted(path for path in slides if path not in known)),
        not_found=listing.not_found,
        list_findings=listing.findings,
        unreachable=dict(unreachable or {}),
        attributes={name: dict(sorted(count.items())) for name, count in counts.items() if set(count) - {""}},
    )


def _joined(numbers: Collection[int]) -> str:
    texts = [str(number) for number in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"

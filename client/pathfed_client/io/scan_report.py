"""What a scan found, as values. For the site's own eyes: they name files."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pathfed_client.cohort.cohort import Pseudonym
from pathfed_client.cohort.patient_list import Finding
from pathfed_client.io.listing import ListedSlide
from pathfed_client.io.site_records import SlideStatus
from pathfed_client.slides.filters import FilterReport, FilterWarning
from pathfed_common.errors import ErrorCode, SiteDataError


@dataclass(frozen=True, kw_only=True)
class SlideOutcome:
    """What became of one slide. For the site's own eyes: it names the file."""

    path: str
    status: SlideStatus
    reason: ErrorCode | None
    detail: str | None
    tiles: int


@dataclass(frozen=True, kw_only=True)
class PatientOutcome:
    """A patient of the list without a usable tile."""

    pseudonym: Pseudonym
    lines: tuple[int, ...]
    code: ErrorCode = ErrorCode.PATIENT_WITHOUT_TILE


@dataclass(frozen=True, kw_only=True)
class UnreachableFolder:
    """A slide folder, or a folder inside one, that could not be listed; its slides stay as they were."""

    folder: str
    detail: str
    code: ErrorCode = ErrorCode.SLIDE_FOLDER_UNREACHABLE


@dataclass(frozen=True, kw_only=True)
class ScanReport:
    """What a scan found. For the site's own eyes.

    Attributes:
        slides: every slide that is there, or was at the last scan, in order of paths.
        patients: patients with at least one usable tile.
        tiles: usable tiles.
        slides_read: slides opened by this scan; the others were known and unchanged.
        slides_moved: slides known by their content at another place, and not read again.
        not_found: lines of the list whose slide is not there, or whose name fits several.
        patients_without_tile: patients of the list who cannot take part.
        list_findings: lines of the list that cannot be used, and slides that are out for what the list says of them.
        same_content: pairs of slides of different patients with the same content: the list is wrong about one of them, both are out.
        unreachable: folders that could not be listed.
        left: slides that were still being written, left for the next scan.
        filters: what the quality filters removed of each slide opened by this scan that shows tissue.
        filter_warnings: filters that removed nearly everything of a slide, or of all those slides together.
    """

    slides: tuple[SlideOutcome, ...]
    patients: int
    tiles: int
    slides_read: int
    slides_moved: int = 0
    not_found: tuple[ListedSlide, ...] = ()
    patients_without_tile: tuple[PatientOutcome, ...] = ()
    list_findings: tuple[Finding, ...] = ()
    same_content: tuple[tuple[str, str], ...] = ()
    unreachable: tuple[UnreachableFolder, ...] = ()
    left: tuple[str, ...] = ()
    filters: dict[str, FilterReport] = field(default_factory=dict)
    filter_warnings: tuple[FilterWarning, ...] = ()

    @property
    def by_status(self) -> dict[SlideStatus, int]:
        """Slides by status."""
        return dict(Counter(slide.status for slide in self.slides))

    @property
    def by_reason(self) -> dict[ErrorCode, int]:
        """Slides that are not usable, by reason code."""
        return dict(Counter(slide.reason for slide in self.slides if slide.reason is not None))

    def to_dict(self) -> dict[str, object]:
        """The report as `--json` prints it."""
        return {**asdict(self), "by_status": self.by_status, "by_reason": self.by_reason}


class ScanEndedError(SiteDataError):
    """A scan that is done and in the database, and that a person must look at; `report` is the whole of it."""

    def __init__(self, error: SiteDataError, report: ScanReport) -> None:
        super().__init__(error.code, error.what, where=error.where, value=error.value, remedy=error.remedy)
        self.report = report


class CohortEmptyError(ScanEndedError):
    """Nothing of what was scanned can be trained on (PF211); `report` says why for each slide."""

    def __init__(self, report: ScanReport, *, where: Path) -> None:
        reasons = ", ".join(f"{code.value} x {count}" for code, count in sorted(report.by_reason.items()))
        error = SiteDataError(ErrorCode.COHORT_EMPTY, "no slide can be trained on", where=where, value=reasons or "no slide")
        super().__init__(error, report)

"""What the doctor saw, as plain values: names are hidden when printed, and everything else may be told.

Looking is done in the modules beside this one; `findings` turns what was seen into sentences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from pathfed_client.slides.quality import checked_mpp
from pathfed_client.slides.tiling import fits
from pathfed_common.errors import ErrorCode, SiteDataError
from pathfed_common.plan import CohortPlan


class MppState(StrEnum):
    """What is to be said of a slide's stated resolution."""

    FINE = "fine"
    MISSING = "missing"
    IMPLAUSIBLE = "implausible"
    COARSE = "coarser than the plan"


def mpp_state(mpp: tuple[float, float] | None, plan: CohortPlan) -> MppState:
    """Judge a resolution as a scan does.

    Args:
        mpp: um/px of level 0 along x and y as stated by the file, or None.
        plan: the cohort rules.
    """
    if mpp is None:
        return MppState.MISSING
    try:
        believed = checked_mpp(mpp, where="")
    except SiteDataError:
        return MppState.IMPLAUSIBLE
    return MppState.FINE if fits(slide_mpp=believed, plan=plan) else MppState.COARSE


@dataclass(frozen=True, kw_only=True)
class FoldersSeen:
    """The slide folders.

    Attributes:
        folders: how many there are.
        away: how many of them cannot be listed.
        slides: found in them.
        unlisted: all folders that could not be listed, those below among them.
        overlap: whether two are one, or one lies inside another; nothing was listed then.
    """

    folders: int
    away: int = 0
    slides: int = 0
    unlisted: tuple[str, ...] = field(default=(), repr=False)
    overlap: bool = False


@dataclass(frozen=True, kw_only=True)
class ListSeen:
    """The patient list laid against the slides.

    Attributes:
        slides: in the folders.
        mapped: slides that have a patient.
        missing: lines whose slide is not there.
        ambiguous: lines whose name fits several slides.
        code: why the list cannot be used.
        unmapped: slides that have none.
        doubts: code of each line that cannot be used, and of each slide that is out for what the list says of it.
    """

    slides: int
    mapped: int = 0
    missing: int = 0
    ambiguous: int = 0
    code: ErrorCode | None = None
    doubts: tuple[ErrorCode, ...] = ()
    unmapped: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class SlideSeen:
    """One slide of the sample.

    Attributes:
        path: its name in the site database.
        vendor: its format as OpenSlide calls it; None where it does not open.
        mpp: of its resolution; None where it does not open.
        code: why a scan would not use it.
        direct: whether its tiles are decoded directly; None where it has none.
    """

    path: str = field(repr=False)
    vendor: str | None = None
    mpp: MppState | None = None
    code: ErrorCode | None = None
    direct: bool | None = None


@dataclass(frozen=True)
class DecoderSeen:
    """How one built-in tile was decoded: whether each way gave its known pixels, bit for bit."""

    sample: str
    direct: bool
    openslide: bool


@dataclass(frozen=True, kw_only=True)
class SpeedSeen:
    """Tiles read for a few seconds as a round reads them.

    Attributes:
        slides: they came from.
        tiles: read.
        failed: asked for and not to be had.
        seconds: it took.
        workers: reading processes.
    """

    slides: int
    tiles: int
    failed: int
    seconds: float
    workers: int

    @property
    def rate(self) -> float:
        """Tiles a second."""
        return self.tiles / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class KeySeen:
    """A key file or folder of keys: whether it is there, and whether others than its owner get in."""

    name: str
    there: bool
    exposed: bool


@dataclass(frozen=True, kw_only=True)
class DevicesSeen:
    """Where training runs under the site's policy.

    Attributes:
        kind: "cuda" or "cpu"; empty where the policy names what is not there.
        count: devices that compute a round together.
        gpus: GPUs that torch sees.
        code: why they cannot be used.
    """

    kind: str
    count: int
    gpus: int
    code: ErrorCode | None = None


@dataclass(frozen=True, kw_only=True)
class SiteSeen:
    """Everything that was looked at.

    Attributes:
        folders: the slide folders.
        patients: the patient list.
        sample: slides that were opened.
        drawn: slides that were to be opened; more than were where time ran out.
        decoders: the self-test.
        speed: None where no slide of the sample has tiles.
        free_bytes: free in the home.
        keys: key files and their folders.
        server: why the server cannot be used; None where it answered as it should.
        devices: where training runs.
    """

    folders: FoldersSeen
    patients: ListSeen
    sample: Sequence[SlideSeen]
    drawn: int
    decoders: Sequence[DecoderSeen]
    speed: SpeedSeen | None
    free_bytes: int
    keys: Sequence[KeySeen]
    server: ErrorCode | None
    devices: DevicesSeen

"""The hospital's patient list: which slide belongs to whom, and what else is known of it. Pure: bytes in, values out.

The patient is the privacy unit, so a doubt about who a slide belongs to is never settled by a guess: the slide is out, with a code and the
lines concerned, and all others go on.

| the list says | outcome |
| --- | --- |
| no slide, no patient, too many fields, a number a spreadsheet rounded, a day that is none, an implausible mpp | the slide is out (PF232) |
| a slide `*`, with scanner and mpp | the resolution of all slides of that scanner which give none themselves |

What lines mean together, laid against the slides that are there, is `cohort.matching`.

Patient identifiers go no further than this module's values: what is stored is a pseudonym, a keyed HMAC whose key never leaves the site.
"""

import hashlib
import hmac
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date

from pathfed_client.cohort.cohort import Pseudonym
from pathfed_client.cohort.list_file import ListLine, ListTable, read_table
from pathfed_client.slides.quality import MPP_BOUNDS
from pathfed_common.cohort_rules import ATTRIBUTES, normal_value
from pathfed_common.errors import ErrorCode

#: What a line may give beside slide and patient. `acquired` is YYYY-MM-DD, `mpp` um/px of level 0.
KEPT = (*ATTRIBUTES, "acquired", "mpp")
EVERY_SLIDE = "*"

_KEY_BYTES = 32
#: What exports write where there is no patient.
_NOBODY = frozenset({"", "-", "--", "?", "n/a", "#n/a", "na", "nan", "null", "none", "unknown", "unbekannt"})
_ROUNDED = re.compile(r"\d[.,]\d+e\+\d+")
_DAYS = (
    re.compile(r"(?P<y>\d{4})-(?P<m>\d{2})-(?P<d>\d{2})(?:[T ].*)?"),
    re.compile(r"(?P<y>\d{4})/(?P<m>\d{2})/(?P<d>\d{2})(?: .*)?"),
    re.compile(r"(?P<y>\d{4})(?P<m>\d{2})(?P<d>\d{2})"),
    re.compile(r"(?P<d>\d{1,2})\.(?P<m>\d{1,2})\.(?P<y>\d{4})(?: .*)?"),
)


@dataclass(frozen=True)
class PatientRow:
    """One line of the list.

    Attributes:
        slide: the slide as the list names it, in normal form.
        patient: the hospital's identifier; hidden when printed.
        line: line number in the file, its first line is 1.
        attributes: what else the line gives, of `KEPT`, in normal form; what it leaves empty is absent.
    """

    slide: str
    patient: str = field(repr=False)
    line: int
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something in the list that needs a person. For the site's own eyes.

    Attributes:
        code: what it is.
        lines: the lines concerned.
        what: one sentence, without a patient's identifier.
        slide: the slide concerned as the list or the folder names it, or None.
    """

    code: ErrorCode
    lines: tuple[int, ...]
    what: str
    slide: str | None = None


@dataclass(frozen=True)
class ScannerRow:
    """A line that gives a whole scanner's resolution.

    Attributes:
        scanner: in normal form.
        mpp: um/px of level 0 as text, or None where the line cannot be used.
        line: line number in the file.
    """

    scanner: str
    mpp: str | None
    line: int


@dataclass(frozen=True)
class PatientList:
    """A whole list.

    Attributes:
        rows: the lines that name a slide and a patient.
        scanners: the lines that give a scanner's resolution.
        unusable: the lines that cannot be used; `slide` is set where they name one, and that slide is then out.
    """

    rows: tuple[PatientRow, ...]
    scanners: tuple[ScannerRow, ...] = ()
    unusable: tuple[Finding, ...] = ()


def read_patient_list(data: bytes, *, where: str, columns: Mapping[str, str] | None = None) -> tuple[ListTable, PatientList]:
    """Read a list; see `list_file.read_table` for arguments and errors."""
    table = read_table(data, where=where, configured=columns)
    return table, interpret(table)


def interpret(table: ListTable) -> PatientList:
    """The meaning of a table's lines. A line that cannot be used is listed, and stops nothing."""
    rows: list[PatientRow] = []
    scanners: list[ScannerRow] = []
    unusable: list[Finding] = []
    for line in table.lines:
        fault, attributes = _attributes(line)
        slide = slide_key(line.cells["slide"])
        if slide == EVERY_SLIDE:
            if fault is None and not {"scanner", "mpp"} <= set(attributes):
                fault = "a line for all slides (*) needs scanner and mpp"
            if "scanner" in attributes:
                scanners.append(ScannerRow(attributes["scanner"], None if fault else attributes["mpp"], line.number))
        else:
            fault = fault or _identity_fault(slide, line.cells["patient"])
            if fault is None:
                rows.append(PatientRow(slide, line.cells["patient"], line.number, attributes))
        if fault is not None:
            unusable.append(Finding(code=ErrorCode.LIST_LINE_UNUSABLE, lines=(line.number,), what=fault, slide=slide or None))
    return PatientList(tuple(rows), tuple(scanners), tuple(unusable))


def _identity_fault(slide: str, patient: str) -> str | None:
    if not slide:
        return "the slide is empty"
    if normal_value(patient) in _NOBODY:
        return "there is no patient"
    if _ROUNDED.fullmatch(normal_value(patient)):
        return "a spreadsheet has rounded the patient's number: format the column as text and export again"
    return None


def _attributes(line: ListLine) -> tuple[str | None, dict[str, str]]:
    """What is wrong with a line's optional columns, or None; and what they give."""
    found: dict[str, str] = {role: normal_value(line.cells[role]) for role in ATTRIBUTES if normal_value(line.cells.get(role, ""))}
    fault = "it has more fields than the header: quote fields that hold a separator" if line.surplus else None
    readers = {"acquired": (_day, "the day cannot be read: write YYYY-MM-DD"), "mpp": (_mpp, _MPP_FAULT)}
    for role, (read, complaint) in readers.items():
        text = line.cells.get(role, "")
        if text:
            value = read(text)
            if value is None:
                fault = fault or complaint
            else:
                found[role] = value
    return fault, found


_MPP_FAULT = f"the mpp is not plausible: level 0 must be {MPP_BOUNDS[0]:g} to {MPP_BOUNDS[1]:g} um/px"


def _mpp(text: str) -> str | None:
    """The resolution in one spelling, or None where it is no number or not plausible. A comma may stand for the point."""
    try:
        value = float(text.replace(",", ".") if text.count(",") == 1 and "." not in text else text)
    except ValueError:
        return None
    return repr(value) if MPP_BOUNDS[0] <= value <= MPP_BOUNDS[1] else None


def _day(text: str) -> str | None:
    """The day as YYYY-MM-DD, or None. Days with slashes in another order than year, month, day could be two, and are not read."""
    for form in _DAYS:
        read_day = form.fullmatch(text)
        if read_day is not None:
            try:
                return date(int(read_day["y"]), int(read_day["m"]), int(read_day["d"])).isoformat()
            except ValueError:
                return None
    return None


def slide_key(name: str) -> str:
    """The form in which slide names are compared: forward slashes, no leading `./`, one Unicode spelling. Case counts."""
    return unicodedata.normalize("NFC", name.strip().replace("\\", "/")).removeprefix("./")


def pseudonym(key: bytes, patient: str) -> Pseudonym:
    """HMAC-SHA256 of a patient identifier, the first 128 bits as 32 hex digits.

    Spellings that differ in case, width or white space alone give one pseudonym: one patient counted as two would double what the
    releases cost that patient, while two counted as one stay within the bound.

    Raises:
        ValueError: the key is not 32 bytes.
    """
    if len(key) != _KEY_BYTES:
        raise ValueError(f"key must be {_KEY_BYTES} bytes, got {len(key)}")
    return Pseudonym(hmac.new(key, normal_value(patient).encode(), hashlib.sha256).hexdigest()[:32])

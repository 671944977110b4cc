"""The hospital's patient list: which slide belongs to whom. Pure: text in, values out.

A CSV export with columns `slide` and `patient`. The patient is the privacy unit, so a doubt about who a slide belongs to is an error,
never a guess: a slide listed twice stops the scan, and a slide that is not listed is never trained on.

Patient identifiers go no further than this module's values: what is stored is a pseudonym, a keyed HMAC whose key never leaves the site.
"""

import csv
import hashlib
import hmac
import io
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from pathfed_client.cohort.cohort import Pseudonym
from pathfed_common.errors import ErrorCode, SiteDataError

_COLUMNS = ("slide", "patient")
_DELIMITERS = (",", ";", "\t")
_KEY_BYTES = 32


@dataclass(frozen=True)
class PatientRow:
    """One line of the list.

    Attributes:
        slide: the slide as the list names it, in normal form.
        patient: the hospital's identifier; hidden when printed.
        line: line number in the file, the header is 1.
    """

    slide: str
    patient: str = field(repr=False)
    line: int


@dataclass(frozen=True)
class Matching:
    """The list laid against the slides that are there.

    Attributes:
        patients: row of each slide that has one, by the slide's path.
        missing: rows whose slide is not there.
        ambiguous: rows whose name fits several slides; none of them is taken.
    """

    patients: dict[str, PatientRow]
    missing: tuple[PatientRow, ...]
    ambiguous: tuple[PatientRow, ...]


def decode_patient_list(data: bytes, *, where: str) -> str:
    """Text of a list as spreadsheets save it: UTF-8 with or without a byte-order mark, or UTF-16 with one.

    Raises:
        SiteDataError: another encoding (PF202).
    """
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise SiteDataError(
            ErrorCode.PATIENT_LIST_UNREADABLE,
            "the patient list is not UTF-8 text",
            where=where,
            value=f"byte {error.start}",
            remedy="save it again as CSV UTF-8",
        ) from None


def parse_patient_list(text: str, *, where: str) -> tuple[PatientRow, ...]:
    """Read the list.

    Args:
        text: CSV with a header; columns `slide` and `patient` in any case and order, others are ignored; separated by comma, semicolon
            or tab.
        where: the file's name for errors.

    Raises:
        SiteDataError: no header, missing columns, no rows, an empty field (PF202), or a slide listed twice (PF203).
    """
    text = text.removeprefix("\ufeff")
    delimiter = _delimiter(text, where)
    rows: dict[str, PatientRow] = {}
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = [name.strip().casefold() for name in next(reader)]
        slide_at, patient_at = (header.index(name) for name in _COLUMNS)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            row = _row(cells, slide_at, patient_at, reader.line_num, where)
            if row.slide in rows:
                raise _listed_twice(row.slide, rows[row.slide], row, where)
            rows[row.slide] = row
    except csv.Error as error:
        raise SiteDataError(ErrorCode.PATIENT_LIST_UNREADABLE, f"not CSV: {error}", where=f"{where}, line {reader.line_num}") from None
    if not rows:
        raise SiteDataError(ErrorCode.PATIENT_LIST_UNREADABLE, "the patient list has no rows", where=where)
    return tuple(rows.values())


def _delimiter(text: str, where: str) -> str:
    """The separator under which the first line has both columns."""
    first = re.split("[\r\n]", text, maxsplit=1)[0]
    if not first.strip():
        raise SiteDataError(ErrorCode.PATIENT_LIST_UNREADABLE, "the first line must name the columns slide and patient", where=where)
    try:
        headers = {delimiter: next(csv.reader([first], delimiter=delimiter), []) for delimiter in _DELIMITERS}
    except csv.Error as error:
        raise SiteDataError(ErrorCode.PATIENT_LIST_UNREADABLE, f"not CSV: {error}", where=f"{where}, line 1") from None
    for delimiter, header in headers.items():
        names = [name.strip().casefold() for name in header]
        if all(names.count(column) == 1 for column in _COLUMNS):
            return delimiter
    likely = max(headers.values(), key=len)
    found = [name.strip().casefold() for name in likely]
    wrong = [name for name in _COLUMNS if found.count(name) != 1]
    raise SiteDataError(
        ErrorCode.PATIENT_LIST_UNREADABLE,
        f"the patient list needs one column each named slide and patient; wrong: {', '.join(wrong)}",
        where=f"{where}, line 1",
        value=f"columns found: {', '.join(name.strip() or '(empty)' for name in likely)}",
        remedy="export a CSV whose first line is slide,patient",
    )


def _row(cells: list[str], slide_at: int, patient_at: int, line: int, where: str) -> PatientRow:
    for column, at in (("slide", slide_at), ("patient", patient_at)):
        if at >= len(cells) or not cells[at].strip():
            raise SiteDataError(ErrorCode.PATIENT_LIST_UNREADABLE, f"the {column} is empty", where=f"{where}, line {line}")
    return PatientRow(slide=slide_key(cells[slide_at]), patient=cells[patient_at].strip(), line=line)


def _listed_twice(slide: str, first: PatientRow, second: PatientRow, where: str) -> SiteDataError:
    return SiteDataError(
        ErrorCode.SLIDE_LISTED_TWICE,
        "a slide is listed twice",
        where=f"{where}, lines {first.line} and {second.line}",
        value=slide,
        remedy="keep the line that is right",
    )


def slide_key(name: str) -> str:
    """The form in which slide names are compared: forward slashes, no leading `./`, one Unicode spelling. Case counts."""
    return unicodedata.normalize("NFC", name.strip().replace("\\", "/")).removeprefix("./")


def match(rows: Collection[PatientRow], slides: Mapping[str, Collection[str]], *, where: str) -> Matching:
    """Lay the list against the slides that are there.

    Args:
        rows: the list.
        slides: of each slide by its path, all names the list may use for it (its path among them).
        where: the list's name for errors.

    Raises:
        SiteDataError: two rows name one slide, as a path and a file name may, with different patients (PF203).
    """
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for path, names in slides.items():
        for name in {slide_key(name) for name in names}:
            owners[name].append(path)
    patients: dict[str, PatientRow] = {}
    missing: list[PatientRow] = []
    ambiguous: list[PatientRow] = []
    for row in rows:
        fitting = owners.get(row.slide, [])
        exact = [path for path in fitting if slide_key(path) == row.slide]
        if len(exact or fitting) != 1:
            (ambiguous if fitting else missing).append(row)
            continue
        (path,) = exact or fitting
        earlier = patients.setdefault(path, row)
        if _normal(earlier.patient) != _normal(row.patient):
            raise _listed_twice(path, earlier, row, where)
    return Matching(patients=patients, missing=tuple(missing), ambiguous=tuple(ambiguous))


def pseudonym(key: bytes, patient: str) -> Pseudonym:
    """HMAC-SHA256 of a patient identifier, the first 128 bits as 32 hex digits.

    Spellings that differ in case, width or white space alone give one pseudonym: one patient counted as two would double what the
    releases cost that patient, while two counted as one stay within the bound.

    Raises:
        ValueError: the key is not 32 bytes.
    """
    if len(key) != _KEY_BYTES:
        raise ValueError(f"key must be {_KEY_BYTES} bytes, got {len(key)}")
    return Pseudonym(hmac.new(key, _normal(patient).encode(), hashlib.sha256).hexdigest()[:32])


def _normal(patient: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", patient).casefold().split())

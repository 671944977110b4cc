"""The file of a patient list: from bytes in any of the usual shapes to a table of named columns. Pure.

| part | what is taken |
| --- | --- |
| encoding | UTF-8 or UTF-16, with a byte-order mark or without; Windows-1252 where the bytes cannot be UTF-8 |
| separator | comma, semicolon, tab or bar; fields may be quoted with `"` |
| header | the first of the first lines that names a slide and a patient column; title lines before it are passed over |
| columns | by the header's text: as configured, or one of the well-known names below |

A doubt is an error that says what to do: columns are never guessed from their contents.
"""

import csv
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pathfed_common.errors import ErrorCode, SiteDataError

#: What a column may mean.
ROLES = ("slide", "patient", "case", "block", "organ", "cancer_type", "stain", "acquired", "scanner", "mpp")
REQUIRED = ("slide", "patient")
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}
#: Lines in which the header is looked for.
HEADER_LINES = 20

#: Headers that are understood without configuration, in the form of `header_key`; the first of a role wins over the others.
_KNOWN: Mapping[str, tuple[str, ...]] = {
    role: tuple(names.split())
    for role, names in {
        "slide": "slide slideid slidename slidefile slidepath image imageid imagename imagefile filename file filepath path "
        "wsi wsiid wsiname schnitt objektträger dateiname",
        "patient": "patient patientid patientno patientnumber patientidentifier patientpseudonym patid mrn medicalrecordnumber patientenid "
        "patientennummer",
        "case": "case caseid caseno casenumber accession accessionid accessionno accessionnumber specimen specimenid "
        "fall fallid fallnummer einsendung",
        "block": "block blockid blockno blocknumber blockname paraffinblock",
        "organ": "organ organsite primarysite topography tissuesite",
        "cancer_type": "cancertype cancer tumourtype tumortype tumour tumor oncotree oncotreecode tumorart",
        "stain": "stain staining stainname färbung",
        "acquired": "acquired acquisitiondate dateacquired scandate datescanned scanned scandatum",
        "scanner": "scanner scannermodel scannername scannerid",
        "mpp": "mpp micronsperpixel umperpixel umperpx μmperpixel",
    }.items()
}
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
#: Shown to people.
_ENCODING_NAMES = {"utf-8": "UTF-8", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "cp1252": "Windows-1252"}
_UTF8_PAIR = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")


@dataclass(frozen=True)
class ListLine:
    """One line below the header.

    Attributes:
        number: in the file, its first line is 1; of a line with line breaks in quotes, the last.
        cells: the text of each column that has a role, white space around it removed; hidden when printed.
        surplus: it holds more fields than the header: a separator stands unquoted in one, and nobody knows in which.
    """

    number: int
    cells: Mapping[str, str] = field(repr=False)
    surplus: bool = False


@dataclass(frozen=True)
class ListTable:
    """A patient list as a table.

    Attributes:
        encoding: how the file was read, in words.
        separator: a key of `SEPARATORS`.
        header_line: the header's line number.
        columns: role -> the header's own text.
        unused: headers without a role.
        lines: the lines below the header; empty ones are left out.
    """

    encoding: str
    separator: str
    header_line: int
    columns: Mapping[str, str]
    unused: tuple[str, ...]
    lines: tuple[ListLine, ...] = field(repr=False)


def decode_list(data: bytes, *, where: str) -> tuple[str, str]:
    """Text of a file, and its encoding in words.

    Windows-1252 is taken only where no character can be UTF-8: a file that mixes both would spell one person in two ways.

    Raises:
        SiteDataError: no encoding fits (PF202).
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return _decoded(data[len(mark) :], (encoding,), where)
    if b"\0" in data:
        # ASCII, which every export holds, has its zero bytes at odd places in little-endian UTF-16 and at even ones in big-endian.
        little = data[1::2].count(0) >= data[0::2].count(0)
        return _decoded(data, ("utf-16-le",) if little else ("utf-16-be",), where)
    return _decoded(data, ("utf-8",) if _UTF8_PAIR.search(data) else ("utf-8", "cp1252"), where)


def _decoded(data: bytes, encodings: Sequence[str], where: str) -> tuple[str, str]:
    place = ""
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            place = place or f"byte {error.start}"
            continue
        if "\0" not in text:
            return text.removeprefix("\ufeff"), _ENCODING_NAMES[encoding]
        place = place or "a zero byte"
    names = " or ".join(_ENCODING_NAMES[encoding] for encoding in encodings)
    raise _unreadable(f"the list is not {names} text", where, value=place, remedy="save it again as CSV UTF-8")


def header_key(text: str) -> str:
    """The form in which headers are compared: letters and digits alone, in lower case."""
    return "".join(letter for letter in unicodedata.normalize("NFKC", text).casefold() if letter.isalnum())


def read_table(data: bytes, *, where: str, configured: Mapping[str, str] | None = None) -> ListTable:
    """Read a patient list.

    Args:
        data: the file.
        where: its name for errors.
        configured: role -> the header's text, from `site.toml`; an empty text switches the role off. Other roles go by well-known names.

    Raises:
        SiteDataError: no encoding fits, no header is found, a column is missing or could be two, or a line is not CSV (PF202).
        ValueError: a role that does not exist.
    """
    wanted = dict(configured or {})
    if not set(wanted) <= set(ROLES):
        raise ValueError(f"roles must be among {ROLES}, got {sorted(wanted)}")
    text, encoding = decode_list(data, where=where)
    physical = list(io.StringIO(text, newline=""))
    separator, start, header, columns = _header(physical, wanted, where)
    lines = _lines(physical, start, separator, header, columns, where)
    return ListTable(
        encoding=encoding,
        separator=separator,
        header_line=start + 1,
        columns={role: header[at].strip() for role, at in columns.items()},
        unused=tuple(name.strip() for at, name in enumerate(header) if at not in columns.values()),
        lines=lines,
    )


def _header(physical: list[str], wanted: Mapping[str, str], where: str) -> tuple[str, int, list[str], dict[str, int]]:
    """Separator, index of the line, its fields, and the place of each role."""
    likely: tuple[int, int, list[str], SiteDataError] | None = None
    for start in range(min(HEADER_LINES, len(physical))):
        for name, separator in SEPARATORS.items():
            try:
                header = next(csv.reader(physical[start:], delimiter=separator, strict=True), [])
            except csv.Error:
                continue
            try:
                return name, start, header, _roles(header, wanted, f"{where}, line {start + 1}")
            except SiteDataError as error:
                score = len(_found(header, wanted))
                if header and (likely is None or (score, len(header)) > likely[:2]):
                    likely = (score, len(header), header, error)
    if likely is None:
        raise _unreadable("there is no line that names the columns", where, remedy="export a CSV whose first line is slide,patient")
    raise likely[3]


def _found(header: Sequence[str], wanted: Mapping[str, str]) -> dict[str, list[int]]:
    """Each role with the places of the headers that could be it; at one name, the better known one alone."""
    keys = [header_key(name) for name in header]
    taken = {header_key(text) for text in wanted.values() if text}
    found: dict[str, list[int]] = {}
    for role in ROLES:
        if role in wanted:
            names: tuple[str, ...] = (header_key(wanted[role]),) if wanted[role] else ()
        else:
            names = tuple(name for name in _KNOWN[role] if name not in taken)
        places = [at for at, key in enumerate(keys) if key and key in names]
        first = [at for at in places if keys[at] == names[0]]
        if places:
            found[role] = first or places
    return found


def _roles(header: Sequence[str], wanted: Mapping[str, str], where: str) -> dict[str, int]:
    found = _found(header, wanted)
    shown = f"columns found: {', '.join(name.strip() or '(empty)' for name in header)}"
    missing = [role for role in ROLES if role not in found and (role in REQUIRED or wanted.get(role))]
    if missing == ["patient"] and ("case" in found or "block" in found) and "patient" not in wanted:
        other = header[found.get("case", found.get("block", [0]))[0]].strip()
        raise _unreadable(
            f"the list has no patient column, and a case or block ({other}) is not a patient: one person may have several, "
            "and would then be protected less than the site's ledger says",
            where,
            value=shown,
            remedy="add the patient's number to the export; or, where each case truly is one person, "
            f'say so in site.toml: [patient_list] patient = "{other}"',
        )
    if missing:
        raise _unreadable(
            f"the list needs one column each for slide and patient; not found: {', '.join(missing)}",
            where,
            value=shown,
            remedy="export a CSV whose first line is slide,patient, or name the columns in [patient_list] of site.toml",
        )
    double = next(((role, places) for role, places in found.items() if len(places) > 1), None)
    if double is not None:
        names = " and ".join(header[at].strip() for at in double[1])
        raise _unreadable(
            f"two columns could be the {double[0]}: {names}",
            where,
            value=shown,
            remedy=f'say which in site.toml: [patient_list] {double[0]} = "..."',
        )
    return {role: places[0] for role, places in found.items()}


def _lines(
    physical: list[str], start: int, separator: str, header: Sequence[str], columns: Mapping[str, int], where: str
) -> tuple[ListLine, ...]:
    reader = csv.reader(physical[start:], delimiter=SEPARATORS[separator], strict=True)
    lines = []
    try:
        next(reader)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            named = {role: cells[at].strip() if at < len(cells) else "" for role, at in columns.items()}
            surplus = any(cell.strip() for cell in cells[len(header) :])
            lines.append(ListLine(start + reader.line_num, named, surplus))
    except csv.Error as error:
        raise _unreadable(f"not CSV: {error}", f"{where}, line {start + reader.line_num}") from None
    if not lines:
        raise _unreadable("the patient list has no lines below its header", where)
    return tuple(lines)


def _unreadable(what: str, where: str, *, value: str | None = None, remedy: str | None = None) -> SiteDataError:
    return SiteDataError(ErrorCode.PATIENT_LIST_UNREADABLE, what, where=where, value=value, remedy=remedy)

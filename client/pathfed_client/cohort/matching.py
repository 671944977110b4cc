"""The patient list laid against the slides that are there: which slide is certainly whose. Pure.

| the list says | outcome |
| --- | --- |
| two lines of one slide, the same patient, nothing contradictory | one line; a column that one leaves empty is filled from the other |
| two lines of one slide, different patients | the slide is out (PF203) |
| two lines of one slide, the same patient, another organ, stain, day, ... | the slide is out (PF231) |
| a line that cannot be used | every slide that its name fits is out (PF232) |
| a name that several slides have | the line counts for none of them (PF230) |
| two lines of one scanner that differ; one that cannot be used | the slides that would have used it are out (PF231, PF232) |
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from pathfed_client.cohort.patient_list import Finding, PatientList, PatientRow, ScannerRow, slide_key
from pathfed_common.cohort_rules import normal_value
from pathfed_common.errors import ErrorCode


@dataclass(frozen=True)
class Mapped:
    """A slide that is certain.

    Attributes:
        patient: the hospital's identifier; hidden when printed.
        attributes: what the list gives, of `KEPT`; `mpp` is the slide's own or its scanner's.
        lines: the lines that say so.
    """

    patient: str = field(repr=False)
    attributes: Mapping[str, str]
    lines: tuple[int, ...]

    @property
    def mpp(self) -> float | None:
        """The resolution that the list gives, um/px of level 0, or None."""
        return float(self.attributes["mpp"]) if "mpp" in self.attributes else None


@dataclass(frozen=True)
class Matching:
    """The list laid against the slides that are there.

    Attributes:
        slides: each slide that is certain, by its path.
        refused: each slide that is listed, but not certain, by its path.
        missing: lines whose slide is not there.
        ambiguous: lines whose name fits several slides; none of them is taken.
    """

    slides: dict[str, Mapped]
    refused: dict[str, Finding]
    missing: tuple[PatientRow, ...]
    ambiguous: tuple[PatientRow, ...]


def names_and_stems(names: Iterable[str], suffixes: Collection[str]) -> frozenset[str]:
    """Names of a slide, and those names without their suffix where it is one of `suffixes` (lower case, with the dot)."""
    found = set(names)
    for name in tuple(found):
        stem, dot, suffix = name.rpartition(".")
        if dot + suffix.lower() in suffixes and stem.rpartition("/")[2]:
            found.add(stem)
    return frozenset(found)


def match(listed: PatientList, slides: Mapping[str, Collection[str]]) -> Matching:
    """Lay the list against the slides that are there.

    Args:
        listed: the list.
        slides: of each slide by its path, all names the list may use for it (its path among them).
    """
    finder = SlideFinder(slides)
    rows: defaultdict[str, list[PatientRow]] = defaultdict(list)
    missing: list[PatientRow] = []
    ambiguous: list[PatientRow] = []
    for row in listed.rows:
        fitting = finder.find(row.slide)
        if len(fitting) == 1:
            rows[fitting[0]].append(row)
        else:
            (ambiguous if fitting else missing).append(row)
    refused = {path: finding for finding in listed.unusable if finding.slide for path in finder.find(finding.slide)}
    mapped: dict[str, Mapped] = {}
    for path, of_slide in rows.items():
        if path in refused:
            continue
        verdict = _certain(path, of_slide, listed.scanners)
        if isinstance(verdict, Finding):
            refused[path] = verdict
        else:
            mapped[path] = verdict
    return Matching(slides=mapped, refused=refused, missing=tuple(missing), ambiguous=tuple(ambiguous))


class SlideFinder:
    """Finds the slides that a name fits, exactly and never nearly."""

    def __init__(self, slides: Mapping[str, Collection[str]]) -> None:
        """Take all slides: of each by its path, all its names."""
        self._paths: defaultdict[str, list[str]] = defaultdict(list)
        self._owners: defaultdict[str, list[str]] = defaultdict(list)
        for path, names in slides.items():
            self._paths[slide_key(path)].append(path)
            for name in {slide_key(name) for name in names}:
                self._owners[name].append(path)

    def find(self, name: str) -> list[str]:
        """Paths of the slides that have this name; one whose whole path it is wins over the others."""
        key = slide_key(name)
        return list(self._paths[key] if key in self._paths else self._owners.get(key, []))


def _certain(path: str, rows: list[PatientRow], scanners: Collection[ScannerRow]) -> Mapped | Finding:
    lines = tuple(row.line for row in rows)
    if len({normal_value(row.patient) for row in rows}) > 1:
        return Finding(code=ErrorCode.SLIDE_LISTED_TWICE, lines=lines, what="listed for different patients", slide=path)
    merged: dict[str, str] = {}
    for row in rows:
        for name, value in row.attributes.items():
            if merged.setdefault(name, value) != value:
                return Finding(code=ErrorCode.SLIDE_LINES_CONFLICT, lines=lines, what=f"the lines differ in {name}", slide=path)
    mapped = Mapped(rows[0].patient, merged, lines)
    if "mpp" in merged or "scanner" not in merged:
        return mapped
    return _with_scanner(path, mapped, [row for row in scanners if row.scanner == merged["scanner"]])


def _with_scanner(path: str, slide: Mapped, rows: Collection[ScannerRow]) -> Mapped | Finding:
    values = {row.mpp for row in rows}
    lines = (*slide.lines, *(row.line for row in rows))
    if None in values:
        return Finding(code=ErrorCode.LIST_LINE_UNUSABLE, lines=lines, what="the line for its scanner cannot be used", slide=path)
    if len(values) > 1:
        return Finding(code=ErrorCode.SLIDE_LINES_CONFLICT, lines=lines, what="the lines for its scanner differ in mpp", slide=path)
    return replace(slide, attributes={**slide.attributes, "mpp": str(values.pop())}) if values else slide

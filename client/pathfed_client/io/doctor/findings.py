"""From what the doctor saw to findings: pure judgement, no disk and no clock.

A finding's sentence, hint, codes and counts name no slide, folder, file of the hospital's or identifier, so that they may be pasted into a
message to the operator. `slides` names what is meant, and is given out only when asked for.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from pathfed_client.io.doctor.seen import DecoderSeen, DevicesSeen, FoldersSeen, KeySeen, ListSeen, MppState, SiteSeen, SlideSeen, SpeedSeen
from pathfed_common.errors import ErrorCode
from pathfed_common.plan import Plan

#: Slides that do not open, cannot be read, or take their decoder with them.
UNREADABLE = (ErrorCode.SLIDE_UNOPENABLE, ErrorCode.SLIDE_UNREADABLE, ErrorCode.SLIDE_CRASHED, ErrorCode.SLIDE_TIMEOUT)
#: Bytes of the home that each slide of the folders takes: its row and its tile map, generously.
BYTES_PER_SLIDE = 16 << 10
#: Free bytes in the home below which the first sealed updates may not fit, and below which many rounds may not.
LEAST_FREE, COMFORTABLE_FREE = 1 << 30, 10 << 30


class Severity(StrEnum):
    """How much a finding matters; an error keeps the site from taking part as it should."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what was looked at; a fixed word.
        severity: how much it matters.
        what: a sentence.
        hint: what to do; empty where there is nothing to do.
        codes: how many slides have each code; a code alone counts once.
        counts: the figures behind the sentence.
        slides: what is meant, by name; for the site's own eyes.
    """

    check: str
    severity: Severity
    what: str
    hint: str = ""
    codes: dict[ErrorCode, int] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    slides: tuple[str, ...] = field(default=(), repr=False)

    def to_dict(self, *, show_slides: bool) -> dict[str, object]:
        """As `--json` prints it."""
        told: dict[str, object] = {
            "check": self.check,
            "severity": self.severity.value,
            "what": self.what,
            "hint": self.hint,
            "codes": {code.value: count for code, count in self.codes.items()},
            "counts": self.counts,
        }
        return {**told, "slides": list(self.slides)} if show_slides else told


def judge(seen: SiteSeen, plan: Plan | None) -> tuple[Finding, ...]:
    """All findings, in the order in which things are put right.

    Args:
        seen: what was seen.
        plan: the plan that was given, or None.
    """
    sample = tuple(seen.sample)
    return (
        judge_folders(seen.folders),
        judge_patients(seen.patients),
        judge_readable(sample, seen.drawn),
        judge_formats(sample),
        judge_mpp(sample),
        judge_content(sample),
        judge_decoders(seen.decoders),
        judge_direct(sample),
        judge_speed(seen.speed, plan),
        judge_disk(seen.free_bytes, seen.folders.slides),
        judge_devices(seen.devices),
        judge_keys(seen.keys),
        judge_server(seen.server),
    )


def judge_folders(seen: FoldersSeen) -> Finding:
    """Are the folders there, apart from each other, and is there a slide?"""
    counts: dict[str, float] = {"folders": seen.folders, "away": seen.away, "slides": seen.slides, "unlisted": len(seen.unlisted)}
    severity, hint, codes = Severity.OK, "", dict[ErrorCode, int]()
    what = f"{seen.slides} slides; slide folders: {seen.folders}"
    if seen.overlap:
        severity, what = Severity.ERROR, "two slide folders are one, or one lies inside the other"
        hint, codes = "name the outer folder only, in site.toml", {ErrorCode.SLIDE_FOLDERS_OVERLAP: 1}
    elif seen.away or seen.unlisted:
        severity = Severity.ERROR if seen.away or not seen.slides else Severity.WARNING
        what += f"; {seen.away} of the folders, and {len(seen.unlisted) - seen.away} below them, cannot be listed"
        hint, codes = "mount the share, and let this user list the folders", {ErrorCode.SLIDE_FOLDER_UNREACHABLE: len(seen.unlisted)}
    elif not seen.slides:
        severity, codes = Severity.ERROR, {ErrorCode.SLIDE_FOLDER_EMPTY: 1}
        hint = "check slides in site.toml, and that the share is mounted"
    return Finding(check="folders", severity=severity, what=what, hint=hint, codes=codes, counts=counts, slides=seen.unlisted)


def judge_patients(seen: ListSeen) -> Finding:
    """How many slides belong to a patient?"""
    counts: dict[str, float] = {"slides": seen.slides, "mapped": seen.mapped, "missing": seen.missing, "ambiguous": seen.ambiguous}
    if seen.code is not None:
        what, hint = "the patient list cannot be used", "`pathfed-site scan` says which line or column is wrong"
        return Finding(check="patients", severity=Severity.ERROR, what=what, hint=hint, codes={seen.code: 1}, counts=counts)
    share = seen.mapped / seen.slides if seen.slides else 0.0
    what = f"{seen.mapped} of {seen.slides} slides ({share:.1%}) have a patient"
    severity, hint = Severity.OK, ""
    if seen.missing or seen.ambiguous:
        what += f"; {seen.missing} lines of the list name no slide, {seen.ambiguous} name several"
    if seen.doubts:
        what += f"; the list contradicts itself or cannot be used in {len(seen.doubts)} places"
    if seen.slides and (seen.mapped < seen.slides or seen.missing or seen.ambiguous or seen.doubts):
        severity = Severity.WARNING if seen.mapped else Severity.ERROR
        hint = "the list must name slides as the folders do, by path or file name; slides without a patient are never used"
    elif not seen.slides:
        severity = Severity.NOTE
    codes = {
        ErrorCode.SLIDE_UNMAPPED: seen.slides - seen.mapped,
        ErrorCode.SLIDE_MISSING: seen.missing + seen.ambiguous,
        **Counter(seen.doubts),
    }
    return Finding(
        check="patients",
        severity=severity,
        what=what,
        hint=hint,
        codes=_some(codes),
        counts=counts | {"share": share},
        slides=seen.unmapped,
    )


def judge_readable(sample: Sequence[SlideSeen], drawn: int) -> Finding:
    """Do slides open, and can they be read?"""
    broken = [slide for slide in sample if slide.code in UNREADABLE]
    counts: dict[str, float] = {"looked at": len(sample), "drawn": drawn, "unreadable": len(broken)}
    what = f"{len(sample) - len(broken)} of {len(sample)} slides looked at can be read"
    if len(sample) < drawn:
        what += f"; time ran out before the other {drawn - len(sample)} of the sample"
    severity, hint = Severity.OK, ""
    if broken:
        severity = Severity.ERROR if len(broken) == len(sample) else Severity.WARNING
        hint = "copy them again from the scanner or archive, and see the pages of the codes; `--show-slides` names them"
    elif not sample:
        severity, what, hint = Severity.NOTE, "no slide was looked at", "put right the folders or the patient list first"
    return Finding(check="readable", severity=severity, what=what, hint=hint, codes=_codes(broken), counts=counts, slides=_names(broken))


def judge_formats(sample: Sequence[SlideSeen]) -> Finding:
    """Which formats are there?"""
    vendors = Counter(slide.vendor or "not opened" for slide in sample)
    what = "formats: " + (", ".join(f"{vendor} {count}" for vendor, count in sorted(vendors.items())) or "none")
    return Finding(check="formats", severity=Severity.OK if sample else Severity.NOTE, what=what, counts=dict(sorted(vendors.items())))


def judge_mpp(sample: Sequence[SlideSeen]) -> Finding:
    """Can the stated resolutions be believed, and are they fine enough? Of slides that can be read."""
    opened = [slide for slide in sample if slide.mpp is not None and slide.code not in UNREADABLE]
    bad = [slide for slide in opened if slide.mpp is not MppState.FINE]
    states = Counter(slide.mpp.value for slide in opened if slide.mpp is not None)
    counts: dict[str, float] = {state.value: states[state.value] for state in MppState}
    what = f"{len(opened) - len(bad)} of {len(opened)} resolutions can be used"
    severity, hint = Severity.OK if opened else Severity.NOTE, ""
    if bad:
        severity = Severity.ERROR if len(bad) == len(opened) else Severity.WARNING
        told = (f"{states[state.value]} {state.value}" for state in MppState if states[state.value] and state is not MppState.FINE)
        what += f": {', '.join(told)}"
        hint = "export these slides with their resolution (um/px); slides that are too coarse need another plan"
    codes = _some({ErrorCode.SLIDE_MPP_UNUSABLE: len(bad)})
    return Finding(check="mpp", severity=severity, what=what, hint=hint, codes=codes, counts=counts, slides=_names(bad))


def judge_content(sample: Sequence[SlideSeen]) -> Finding:
    """Do slides that can be read show what is looked for?"""
    able = [slide for slide in sample if slide.code not in UNREADABLE and slide.mpp is MppState.FINE]
    without = [slide for slide in able if slide.code is not None]
    what = f"{len(able) - len(without)} of {len(able)} slides that can be read have tiles"
    severity, hint = Severity.OK if able else Severity.NOTE, ""
    if without:
        severity = Severity.WARNING if len(without) == len(able) else Severity.NOTE
        hint = "see the pages of the codes; `pathfed-site inspect` shows one slide to you"
    counts: dict[str, float] = {"with tiles": len(able) - len(without), "without": len(without)}
    return Finding(check="content", severity=severity, what=what, hint=hint, codes=_codes(without), counts=counts, slides=_names(without))


def judge_decoders(seen: Sequence[DecoderSeen]) -> Finding:
    """Do the installed decoders give known pixels?"""
    wrong = [
        f"{one.sample} by {way}"
        for one in seen
        for way, right in (("direct decoding", one.direct), ("OpenSlide", one.openslide))
        if not right
    ]
    counts: dict[str, float] = {"samples": len(seen), "wrong": len(wrong)}
    if not wrong and seen:
        what = f"all {len(seen)} built-in tiles are decoded bit for bit, directly and by OpenSlide"
        return Finding(check="decoders", severity=Severity.OK, what=what, counts=counts)
    what = f"built-in tiles are decoded wrongly: {', '.join(wrong)}" if seen else "decoding the built-in tiles ended the process"
    hint = "install simplejpeg, imagecodecs and openslide-bin again, in the versions of constraints.txt; do not train before that"
    return Finding(check="decoders", severity=Severity.ERROR, what=what, hint=hint, counts=counts)


def judge_direct(sample: Sequence[SlideSeen]) -> Finding:
    """How many slides are decoded the fast way?"""
    usable = [slide for slide in sample if slide.direct is not None]
    direct = sum(slide.direct is True for slide in usable)
    counts: dict[str, float] = {"direct": direct, "through OpenSlide": len(usable) - direct}
    what = f"{direct} of {len(usable)} usable slides are decoded directly, {len(usable) - direct} through OpenSlide"
    if not usable:
        return Finding(check="direct", severity=Severity.NOTE, what="no slide of the sample has tiles", counts=counts)
    hint = "" if direct == len(usable) else "nothing is wrong with those; reading them costs three to six times as much"
    return Finding(check="direct", severity=Severity.OK if not hint else Severity.NOTE, what=what, hint=hint, counts=counts)


def judge_speed(seen: SpeedSeen | None, plan: Plan | None) -> Finding:
    """How fast do tiles come, and is that enough for the plan?"""
    if seen is None or seen.tiles == 0:
        return Finding(check="speed", severity=Severity.NOTE, what="no tile was read, so no speed is known")
    counts: dict[str, float] = {
        "tiles_per_second": round(seen.rate, 1),
        "workers": seen.workers,
        "slides": seen.slides,
        "failed": seen.failed,
    }
    what = f"about {seen.rate:.3g} tiles a second from {seen.slides} slides, reading processes: {seen.workers}"
    severity, hint = Severity.OK, ""
    if seen.failed:
        severity, hint = Severity.NOTE, "some tiles could not be read; a round leaves such tiles out"
    if plan is not None:
        tiles = plan.privacy.expected_patients * plan.cohort.tiles_per_patient * plan.rounds.steps
        counts["seconds_a_round"] = round(tiles / seen.rate, 1)
        what += f"; reading a round of this plan takes about {tiles / seen.rate:.3g} s of {plan.rounds.deadline_s:g}"
        if tiles / seen.rate > plan.rounds.deadline_s:
            severity, hint = Severity.WARNING, "raise tile_workers in policy.toml, or bring the slides nearer: rounds would be missed"
    return Finding(check="speed", severity=severity, what=what, hint=hint, counts=counts)


def judge_disk(free_bytes: int, slides: int) -> Finding:
    """Is there room in the home for what grows there?"""
    index = slides * BYTES_PER_SLIDE
    counts: dict[str, float] = {"free_bytes": free_bytes, "index_bytes_at_most": index}
    what = f"{free_bytes / 1e9:.3g} GB free in the home; the slides' rows and tile maps take up to {index / 1e9:.2g} GB"
    severity, hint = Severity.OK, ""
    if free_bytes < COMFORTABLE_FREE + index:
        severity, hint = Severity.WARNING, "make room, or move the home: sealed updates are kept there, one for each round"
    if free_bytes < LEAST_FREE + index:
        severity = Severity.ERROR
    codes = {ErrorCode.DISK_FULL: 1} if severity is Severity.ERROR else {}
    return Finding(check="disk", severity=severity, what=what, hint=hint, codes=codes, counts=counts)


def judge_devices(seen: DevicesSeen) -> Finding:
    """Is there what the policy wants to train on?"""
    counts: dict[str, float] = {"devices": seen.count, "gpus": seen.gpus}
    if seen.code is not None:
        what, hint = f"the policy names a GPU that is not there; {seen.gpus} can be seen", "correct device and devices in policy.toml"
        return Finding(check="devices", severity=Severity.ERROR, what=what, hint=hint, codes={seen.code: 1}, counts=counts)
    name = "GPU" if seen.kind == "cuda" else "CPU"
    what = f"training runs on the {name}" if seen.count == 1 else f"training runs in {seen.count} processes on the {name}"
    if seen.kind == "cuda" and seen.count > 1:
        what = f"training runs on {seen.count} GPUs"
    unused = seen.gpus - (seen.count if seen.kind == "cuda" else 0)
    if unused > 0:
        hint = "set device and devices in policy.toml if training may use the others"
        return Finding(check="devices", severity=Severity.NOTE, what=f"{what}; GPUs not used: {unused}", hint=hint, counts=counts)
    return Finding(check="devices", severity=Severity.OK, what=what, counts=counts)


def judge_keys(seen: Sequence[KeySeen]) -> Finding:
    """Are the keys there, for their owner alone?"""
    missing, exposed = [key.name for key in seen if not key.there], [key.name for key in seen if key.exposed]
    counts: dict[str, float] = {"looked at": len(seen), "missing": len(missing), "exposed": len(exposed)}
    if not missing and not exposed:
        return Finding(
            check="keys", severity=Severity.OK, what=f"all {len(seen)} key files and folders are for their owner alone", counts=counts
        )
    told = [f"others get at {', '.join(exposed)}"] * bool(exposed) + [f"missing: {', '.join(missing)}"] * bool(missing)
    hint = "chmod 600 for files and 700 for folders; replace a key that others could read"
    codes = {ErrorCode.KEY_FILE: len(missing) + len(exposed)}
    return Finding(check="keys", severity=Severity.ERROR, what="; ".join(told), hint=hint, codes=codes, counts=counts)


def judge_server(code: ErrorCode | None) -> Finding:
    """Does the server answer, with the pinned consortium's certificate?"""
    if code is None:
        return Finding(check="server", severity=Severity.OK, what="the server answers, with the consortium's certificate")
    if code is ErrorCode.SERVER_UNREACHABLE:
        hint = "check the address, the firewall (outbound TCP) and the proxy; the operator knows whether the server runs"
        return Finding(check="server", severity=Severity.WARNING, what="the server does not answer", hint=hint, codes={code: 1})
    if code is ErrorCode.HOME_UNUSABLE:
        hint = "it was written by `pathfed-site init` out of the server card"
        return Finding(check="server", severity=Severity.ERROR, what="ca.pem in the home cannot be read", hint=hint, codes={code: 1})
    hint = "ask the operator for a new server card; do not go on with this one"
    return Finding(check="server", severity=Severity.ERROR, what="the server's certificate is refused", hint=hint, codes={code: 1})


def _codes(slides: Iterable[SlideSeen]) -> dict[ErrorCode, int]:
    return dict(sorted(Counter(slide.code for slide in slides if slide.code is not None).items()))


def _names(slides: Iterable[SlideSeen]) -> tuple[str, ...]:
    return tuple(sorted(slide.path for slide in slides))


def _some(codes: dict[ErrorCode, int]) -> dict[ErrorCode, int]:
    return {code: count for code, count in codes.items() if count}

"""Check a release's bundle offline, trusting nobody but the keys you give.

What holds when a bundle verifies, beyond what `verify` says of its record:

    - The folder holds the listed files, byte for byte, and no other.
    - The encoder's folder is signed by the model key that the release names, and its card is what the record gives.
    - The log is one history: every checkpoint is of its leaves. More than half of the enrolled sites have cosigned it, the operator not
      counted, and the release is in it (`log_quorum` says what that protects from).
    - Log and record tell the same story in an order that can be (`release_log`).
    - Every site's epsilon, computed again, is within the limit of the plan that it approved.

What does not follow, and what the verdict says of it:

    - Without trusted keys, whose keys these are: `identities_proven` is False. With keys, it is True only if the server's, every admitted
      site's, and a quorum of the log's sites by keys you trust are among them.
    - That the states are the aggregate of the updates: `aggregation_proven` is False unless a replay is given and finds them so.
    - That code did what its digest says, and what the evaluation's figures mean.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import record, release
from pathfed_common.provenance.consistency import Contents
from pathfed_common.provenance.documents import SiteCard
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.provenance.log_checkpoint import log_key
from pathfed_common.provenance.log_history import History, read_history
from pathfed_common.provenance.log_quorum import Shortfall, shortfalls
from pathfed_common.provenance.model_signature import SignedModel, open_model_signature
from pathfed_common.provenance.note import Note
from pathfed_common.provenance.record import Manifest
from pathfed_common.provenance.record_reader import TrustedKeys, check_trusted, read
from pathfed_common.provenance.release import HistoryListing, ListedFile, Release
from pathfed_common.provenance.release_card import Card, card_differences, make_card, read_evaluation
from pathfed_common.provenance.release_log import key_families, log_faults
from pathfed_common.provenance.release_readme import readme
from pathfed_common.provenance.verify import Verdict, examine_record

Faults = Iterator[ProvenanceError]
#: Recomputes a record's states: folder of the bundle and its documents; yields what differs.
Replay = Callable[[Path, Contents], Faults]


@dataclass(frozen=True, kw_only=True)
class ReleaseVerdict:
    """The outcome of a bundle's verification.

    Attributes:
        record: of the record in it; `identities_proven` there is about the record's keys alone, `first_state_proven` about this bundle.
        findings: everything that is wrong, the record's findings among it.
        identities_proven: see the module.
        aggregation_proven: whether the states were recomputed from the updates.
        release: what is released, or None where that cannot be read.
        card: its card, likewise.
        leaves: leaves of the log.
        enrolled: sites enrolled at the end of the log.
        cosigned: those of them that have cosigned its end, by keys that count.
        contents: the record's documents, or None unless nothing is wrong.
    """

    record: Verdict = field(default_factory=lambda: Verdict(findings=()))
    findings: tuple[ProvenanceError, ...] = ()
    identities_proven: bool = False
    aggregation_proven: bool = False
    release: Release | None = None
    card: Card | None = None
    leaves: int = 0
    enrolled: frozenset[SiteName] = frozenset()
    cosigned: frozenset[SiteName] = frozenset()
    contents: Contents | None = field(default=None, repr=False)


@dataclass(frozen=True)
class _Bundle:
    """A bundle whose files are all there, and no other."""

    folder: Path
    release: Release
    release_digest: digest.Digest
    history: HistoryListing
    manifest: Manifest


def is_bundle(folder: Path) -> bool:
    """Whether the folder holds a release."""
    return (folder / release.RELEASE).is_file()


def verify_release(
    folder: Path, trusted: TrustedKeys | None = None, *, redraw: bool = True, replay: Replay | None = None
) -> ReleaseVerdict:
    """Check the bundle in a folder.

    Args:
        folder: the bundle.
        trusted: the keys you know; None for none.
        redraw: draw the first state's random weights again from the plan's seed, which takes as much memory as the model.
        replay: recomputes the states from updates; None to leave the aggregation unproven.

    Returns:
        The verdict. Faults of the bundle are findings in it, never exceptions.
    """
    trusted = trusted or TrustedKeys()
    try:
        bundle = _open(folder, trusted)
    except ProvenanceError as error:
        return ReleaseVerdict(findings=(error,))
    verdict = ReleaseVerdict(release=bundle.release)
    changed = tuple(_file_faults(bundle))
    if changed:
        return replace(verdict, findings=changed)
    try:
        history = _history(bundle)
        families = key_families(history.leaves, {SiteName(site): key for site, key in trusted.sites.items()})
        keys: dict[str, VerifyKey] = {site: _recorded_key(bundle, site, family) for site, family in families.items()}
    except ProvenanceError as error:
        return replace(verdict, findings=(error,))
    examined = examine_record(folder, TrustedKeys(server=trusted.server, sites=keys), redraw=redraw, thin=True, manifest=bundle.manifest)
    if examined.contents is None or examined.verdict.findings:
        return replace(verdict, record=examined.verdict, findings=examined.verdict.findings)
    contents = examined.contents
    verdict = _with_log(replace(verdict, record=examined.verdict), history, families)
    findings = [
        *_release_faults(bundle, contents),
        *_quorum_faults(history),
        *log_faults(history.leaves, contents, {site.site: site.key for site in examined.verdict.sites}, bundle.release_digest),
        *_signature_faults(bundle),
        *_card_faults(bundle, contents),
    ]
    if replay is not None and not findings:
        findings += replay(folder, contents)
    return replace(
        verdict,
        findings=tuple(findings),
        identities_proven=verdict.identities_proven and not findings,
        aggregation_proven=replay is not None and not findings,
        card=None if findings else _card(bundle),
        contents=None if findings else contents,
    )


def _open(folder: Path, trusted: TrustedKeys) -> _Bundle:
    data = read(folder, release.RELEASE)
    found = Release.from_bytes(data, where=release.RELEASE)
    check_trusted(found.server_key, trusted.server, release.RELEASE)
    history = HistoryListing.from_bytes(read(folder, release.HISTORY), where=release.HISTORY)
    listed = digest.of_bytes(data)
    if (history.server_key, history.release) != (found.server_key, listed):
        raise ProvenanceError(
            ErrorCode.RECORD_CHANGED, "the log's list is of another release", where=release.HISTORY, value=history.release
        )
    manifest_bytes = read(folder, record.MANIFEST)
    if digest.of_bytes(manifest_bytes) != found.record:
        raise ProvenanceError(ErrorCode.RECORD_CHANGED, "the record is not the released one", where=record.MANIFEST, value=found.record)
    return _Bundle(folder, found, listed, history, Manifest.from_bytes(manifest_bytes))


def _file_faults(bundle: _Bundle) -> Faults:
    """Files that are missing, extra, links, or (but for the record's, which come later) not the listed bytes."""
    due = release.bundle_files(bundle.release, bundle.history, bundle.manifest)
    found = {
        path.relative_to(bundle.folder).as_posix(): path for path in bundle.folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    for path in sorted(due - found.keys()):
        yield ProvenanceError(ErrorCode.BUNDLE_FILES, "a file of the bundle is missing", where=path)
    for path in sorted(found.keys() - due):
        yield ProvenanceError(ErrorCode.BUNDLE_FILES, "a file that is no part of the bundle", where=path)
    for path in sorted(due & found.keys()):
        if found[path].is_symlink() or not found[path].is_file():
            yield ProvenanceError(ErrorCode.BUNDLE_FILES, "not a file of its own", where=path)
    for entry in (*bundle.release.files, *bundle.history.files):
        if entry.path in found and ListedFile.of(entry.path, read(bundle.folder, entry.path)) != entry:
            yield ProvenanceError(ErrorCode.BUNDLE_FILES, "the file's bytes are not the listed ones", where=entry.path)


def _recorded_key(bundle: _Bundle, site: SiteName, family: frozenset[VerifyKey]) -> VerifyKey:
    """The key that the record has for a site, where it is one of the trusted family; else one that makes the record refused."""
    path = record.card_path(site)
    if bundle.manifest.entry(path) is None:
        return min(family, key=lambda key: key.to_text())
    card = SiteCard.from_bytes(read(bundle.folder, path), where=path)
    return card.evidence_key if card.evidence_key in family else min(family, key=lambda key: key.to_text())


def _history(bundle: _Bundle) -> History:
    notes = [
        Note.from_bytes(read(bundle.folder, entry.path), where=entry.path) for entry in bundle.history.files if entry.path != release.LEAVES
    ]
    key = log_key(bundle.release.log_origin, bundle.release.log_key)
    leaves = release.split_leaves(read(bundle.folder, release.LEAVES))
    return read_history(leaves, notes, key, where=release.LEAVES)


def _release_faults(bundle: _Bundle, contents: Contents) -> Faults:
    """What the release says of its run, against the record."""
    found, manifest = bundle.release, contents.manifest
    encoder = manifest.entry(record.ENCODER)
    due = {"run": manifest.run, "plan": manifest.plan, "server_key": manifest.server_key, "encoder": encoder and encoder.digest}
    for name, value in due.items():
        if getattr(found, name) != value:
            yield ProvenanceError(
                ErrorCode.RECORD_CHANGED, f"{name} is not the record's", where=release.RELEASE, value=getattr(found, name)
            )
    if manifest.rounds != contents.plan.rounds.count:
        value = f"{manifest.rounds} of {contents.plan.rounds.count} rounds"
        yield ProvenanceError(ErrorCode.RUN_UNFINISHED, "the released run is not finished", where=record.MANIFEST, value=value)


def _quorum_faults(history: History) -> Faults:
    for short in history.shortfalls:
        yield quorum_error(short)


def quorum_error(short: Shortfall) -> ProvenanceError:
    """The error of a place where too few sites have cosigned."""
    what = "the log's end" if short.index is None else f"the change of members in leaf {short.index}"
    missing = ", ".join(sorted(short.of - short.cosigned)) or "none is enrolled"
    return ProvenanceError(
        ErrorCode.QUORUM_MISSING,
        f"too few sites have cosigned {what}",
        where=release.LEAVES,
        value=f"{len(short.cosigned)} of {len(short.of)}; missing: {missing}",
    )


def _with_log(verdict: ReleaseVerdict, history: History, families: Mapping[SiteName, frozenset[VerifyKey]]) -> ReleaseVerdict:
    keys = {**history.roll.former, **history.roll.members}
    ours = {
        size: frozenset(member for member in members if keys[member] in families.get(member.site, ()))
        for size, members in history.cosigned.items()
    }
    end = history.checkpoints[-1].size
    known = not shortfalls(history.roll, ours)
    counted = ours if families else history.cosigned
    return replace(
        verdict,
        identities_proven=verdict.record.identities_proven and known,
        leaves=len(history.leaves),
        enrolled=frozenset(history.roll.enrolled),
        cosigned=frozenset(member.site for member in counted[end]),
    )


def _signature_faults(bundle: _Bundle) -> Faults:
    listed = {entry.path: entry.digest for entry in bundle.release.files} | {entry.path: entry.digest for entry in bundle.manifest.files}
    prefix = release.ENCODER_FOLDER
    due = SignedModel(bundle.release.run, {path.removeprefix(prefix): value for path, value in listed.items() if path.startswith(prefix)})
    try:
        signed = open_model_signature(
            read(bundle.folder, release.MODEL_SIGNATURE), read(bundle.folder, release.MODEL_KEY), where=release.MODEL_SIGNATURE
        )
    except ProvenanceError as error:
        yield error
        return
    if signed != due:
        yield ProvenanceError(
            ErrorCode.MODEL_SIGNATURE, "the signature is over other files than the encoder's", where=release.MODEL_SIGNATURE
        )


def _card(bundle: _Bundle) -> Card:
    return Card.from_bytes(read(bundle.folder, release.CARD), where=release.CARD)


def _card_faults(bundle: _Bundle, contents: Contents) -> Faults:
    try:
        given = (bundle.folder / release.EVALUATION).is_file()
        evaluation = read_evaluation(read(bundle.folder, release.EVALUATION), where=release.EVALUATION) if given else ()
        card = _card(bundle)
    except ProvenanceError as error:
        yield error
        return
    changed = card_differences(card, make_card(contents, evaluation))
    for name in changed:
        yield ProvenanceError(ErrorCode.MODEL_CARD, f"{name} is not what the record gives", where=release.CARD)
    # A page is made of a card that was found true alone: figures of another could be beyond what can be printed.
    if not changed and read(bundle.folder, release.README) != readme(card):
        yield ProvenanceError(ErrorCode.MODEL_CARD, "the page is not made from the card", where=release.README)

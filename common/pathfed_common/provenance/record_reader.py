"""Read the files of a record: their digests, their signatures, and what they say.

Errors name the file by its place in the record. See `verify` for what it all proves.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, PlanError, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.part_file import file_digest
from pathfed_common.plan import Plan, plan_from_bytes
from pathfed_common.provenance import record
from pathfed_common.provenance.consistency import Contents, Sealed
from pathfed_common.provenance.documents import Approval, SiteCard, open_plan
from pathfed_common.provenance.keys import VerifyKey
from pathfed_common.provenance.record import FileEntry, Manifest, RoundRecord
from pathfed_common.provenance.statement import UpdateStatement


@dataclass(frozen=True, kw_only=True)
class TrustedKeys:
    """Keys the verifier knows by another way.

    Attributes:
        server: the server's evidence key, or None.
        sites: evidence keys by site name.
    """

    server: VerifyKey | None = None
    sites: Mapping[str, VerifyKey] = field(default_factory=dict)


class RecordReader:
    """Reads a record's documents and checks their signatures; whether they agree is `consistency`'s business."""

    def __init__(self, folder: Path, manifest: Manifest, trusted: TrustedKeys) -> None:
        """Read the site cards.

        Raises:
            ProvenanceError: a card is not signed by its own key, is another site's, or names another key than the trusted one.
        """
        self._folder, self._manifest = folder, manifest
        self.cards = {card.site: card for card in self._site_cards(trusted)}

    def contents(self) -> Contents:
        """All documents.

        Raises:
            ProvenanceError: the first that is missing, not signed as it must be, or not what its place says.
        """
        manifest = self._manifest
        return Contents(
            manifest=manifest,
            plan=self._plan(),
            approvals={approval.site: approval for approval in self._approvals()},
            rounds=tuple(self._round(index) for index in range(1, manifest.rounds + 1)),
            statements=dict(self._statements()),
        )

    def _plan(self) -> Plan:
        data, signed = self._listed(record.PLAN), self._listed(record.SIGNED_PLAN)
        try:
            plan = plan_from_bytes(data, where=record.PLAN)
        except PlanError as error:
            raise ProvenanceError(ErrorCode.RECORD_CHANGED, error.what, where=error.where, value=error.value) from None
        try:
            same = open_plan(signed, self._manifest.server_key, where=record.SIGNED_PLAN) == plan
        except PlanError as error:
            raise ProvenanceError(ErrorCode.RECORD_SIGNATURE, error.what, where=error.where, value=error.value) from None
        if not same or plan.digest != self._manifest.plan:
            raise ProvenanceError(
                ErrorCode.RECORD_CHANGED, "the plan is not the one the manifest names", where=record.PLAN, value=plan.digest
            )
        return plan

    def _site_cards(self, trusted: TrustedKeys) -> Iterator[SiteCard]:
        for path, parts in self._under("sites"):
            card = SiteCard.from_bytes(self._listed(path), where=path)
            _same_site(card.site, parts[-1], path)
            check_trusted(card.evidence_key, trusted.sites.get(card.site), path)
            yield card

    def _approvals(self) -> Iterator[Approval]:
        for path, parts in self._under("approvals"):
            approval = Approval.from_bytes(self._listed(path), self._key(parts[-1], path), where=path)
            _same_site(approval.site, parts[-1], path)
            if approval.plan != self._manifest.plan:
                raise ProvenanceError(ErrorCode.RECORD_CHANGED, "the site approved another plan", where=path, value=approval.plan)
            yield approval

    def _round(self, index: int) -> tuple[RoundRecord, Digest]:
        path = record.round_path(index)
        data = self._listed(path)
        return RoundRecord.from_bytes(data, self._manifest.server_key, where=path), digest.of_bytes(data)

    def _statements(self) -> Iterator[tuple[tuple[int, SiteName], Sealed]]:
        for path, parts in self._under("statements"):
            data = self._listed(path)
            statement = UpdateStatement.from_envelope(data, self._key(parts[-1], path), where=path)
            site = _same_site(statement.site, parts[-1], path)
            yield (int(parts[1].removeprefix("round-")), site), Sealed(statement=statement, envelope=digest.of_bytes(data))

    def _under(self, folder: str) -> Iterator[tuple[str, list[str]]]:
        """Listed paths in a folder, and each path's parts without the last one's suffix."""
        for entry in self._manifest.files:
            parts = entry.path.removesuffix(".dsse").split("/")
            if parts[0] == folder:
                yield entry.path, parts

    def _key(self, site: str, path: str) -> VerifyKey:
        card = self.cards.get(SiteName(site))
        if card is None:
            raise ProvenanceError(
                ErrorCode.RECORD_INCOMPLETE, "the record has no card of the site that signed this", where=path, value=site
            )
        return card.evidence_key

    def _listed(self, path: str) -> bytes:
        if self._manifest.entry(path) is None:
            raise ProvenanceError(ErrorCode.RECORD_INCOMPLETE, "the manifest does not list a file that every record has", where=path)
        return read(self._folder, path)


def file_faults(folder: Path, entries: Iterable[FileEntry]) -> Iterator[ProvenanceError]:
    """Every one of these files that is missing, a link, or not the listed bytes."""
    for entry in entries:
        try:
            _check_file(folder / entry.path, entry)
        except ProvenanceError as error:
            yield error


def _check_file(path: Path, entry: FileEntry) -> None:
    try:
        # A link could show other bytes to the next reader.
        if path.is_symlink() or not path.is_file():
            raise ProvenanceError(ErrorCode.RECORD_INCOMPLETE, "a listed file is missing", where=entry.path)
        found = file_digest(path)
        size = path.stat().st_size
    except OSError as error:
        raise ProvenanceError(ErrorCode.RECORD_INCOMPLETE, f"cannot be read: {error.strerror}", where=entry.path) from None
    if size != entry.size or found != entry.digest:
        raise ProvenanceError(ErrorCode.RECORD_CHANGED, "the file's bytes are not the listed ones", where=entry.path, value=found)


def check_trusted(key: VerifyKey, trusted: VerifyKey | None, where: str) -> None:
    """Refuse a key other than the trusted one, where there is one.

    Raises:
        ProvenanceError: PF602, another key.
    """
    if trusted is not None and trusted != key:
        raise ProvenanceError(ErrorCode.RECORD_SIGNATURE, "the key is not the one you trust", where=where, value=key.to_text())


def _same_site(site: SiteName, named: str, path: str) -> SiteName:
    if site != named:
        raise ProvenanceError(ErrorCode.RECORD_CHANGED, "the document is another site's", where=path, value=site)
    return site


def read(folder: Path, path: str) -> bytes:
    """A file's bytes.

    Raises:
        ProvenanceError: PF605, it cannot be read.
    """
    try:
        return (folder / path).read_bytes()
    except OSError as error:
        raise ProvenanceError(
            ErrorCode.RECORD_INCOMPLETE, f"cannot be read: {error.strerror}", where=path, remedy="give the folder that holds manifest.dsse"
        ) from None

"""An honest bundle around the honest record, with a log that sites have cosigned. A test can lie at any step, and sign the lie."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from record_fixtures import ROUNDS, RUN, SITES, TAKES_PART, Scene

from pathfed_common import digest
from pathfed_common.ids import SiteName
from pathfed_common.provenance import record, release
from pathfed_common.provenance.consistency import Contents
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_checkpoint import Checkpoint, cosign_checkpoint, sign_checkpoint
from pathfed_common.provenance.log_leaves import (
    AnyLeaf,
    EncoderCommitted,
    PlanApproved,
    PlanPublished,
    Released,
    SiteAdmitted,
    StatementLogged,
)
from pathfed_common.provenance.merkle import root_of
from pathfed_common.provenance.model_signature import ModelKey, SignedModel, sign_model
from pathfed_common.provenance.note import Note
from pathfed_common.provenance.record import Manifest
from pathfed_common.provenance.record_reader import RecordReader, TrustedKeys
from pathfed_common.provenance.release import HistoryListing, ListedFile, Release
from pathfed_common.provenance.release_card import Figure, make_card, read_evaluation
from pathfed_common.provenance.release_readme import readme
from pathfed_common.units import UtcSeconds

ORIGIN = "lakes"
_AT = UtcSeconds(1.7e9)

Files = dict[str, bytes]


def _same(value: Any) -> Any:
    return value


@dataclass
class ReleaseScene:
    """Builds bundles of one scene's record."""

    scene: Scene
    model_key: ModelKey = field(default_factory=ModelKey.generate)

    def files(
        self,
        *,
        leaves: Callable[[list[AnyLeaf]], list[AnyLeaf]] = _same,
        cosigners: Iterable[SiteName] = SITES,
        evaluation: bytes | None = None,
        parts: Callable[[Files], Files] = _same,
        signed: Callable[[Release], Release] = _same,
        history: Callable[[Files], Files] = _same,
        **record_hooks: Any,
    ) -> Files:
        """A bundle's files by path. `parts` changes what the release lists, `history` the log's files, before each list is signed."""
        whole = self.scene.files(**record_hooks)
        manifest = Manifest.from_bytes(whole[record.MANIFEST])
        kept = {path: whole[path] for path in release.record_files(manifest) if path in whole}
        made = parts({**kept, **self.card(whole, evaluation)})
        listing = signed(self.listing(made, manifest))
        made[release.RELEASE] = listing.to_bytes(self.scene.server)
        log = history(self.history(leaves(self.leaves(whole, made[release.RELEASE])), cosigners))
        files = tuple(ListedFile.of(path, data) for path, data in sorted(log.items()))
        due = HistoryListing(server_key=self.scene.server.public, release=digest.of_bytes(made[release.RELEASE]), files=files)
        return {**made, **log, release.HISTORY: due.to_bytes(self.scene.server)}

    def card(self, whole: Files, evaluation: bytes | None) -> Files:
        """Card, page, model signature and key."""
        figures: tuple[Figure, ...] = () if evaluation is None else read_evaluation(evaluation, where="evaluation")
        card = make_card(contents_of(whole), figures)
        made = {release.CARD: card.to_bytes(), release.README: readme(card)}
        signed = {**made, **{path: whole[path] for path in (record.ENCODER, record.ENCODER_CONFIG)}}
        digests = {path.removeprefix(release.ENCODER_FOLDER): digest.of_bytes(data) for path, data in signed.items()}
        made |= {
            release.MODEL_KEY: self.model_key.public_pem,
            release.MODEL_SIGNATURE: sign_model(SignedModel(RUN, digests), self.model_key),
        }
        return made if evaluation is None else {**made, release.EVALUATION: evaluation}

    def listing(self, made: Files, manifest: Manifest) -> Release:
        encoder = manifest.entry(record.ENCODER)
        assert encoder is not None
        return Release(
            server_key=self.scene.server.public,
            run=RUN,
            plan=manifest.plan,
            record=digest.of_bytes(made[record.MANIFEST]),
            encoder=encoder.digest,
            log_origin=ORIGIN,
            log_key=self.scene.server.public,
            files=tuple(ListedFile.of(path, made[path]) for path in sorted(release.FILES) if path in made),
        )

    def leaves(self, whole: Files, released: bytes) -> list[AnyLeaf]:
        """The log in the order that the server keeps."""
        plan = self.scene.plan.digest
        found: list[AnyLeaf] = [SiteAdmitted(site=site, evidence_key=self.scene.keys[site].public, at=_AT) for site in SITES]
        found.append(PlanPublished(plan=plan))
        for site in SITES:
            found.append(PlanApproved(site=site, plan=plan, approval=digest.of_bytes(whole[record.approval_path(site)])))
        found.append(_committed(whole, 0))
        for index in range(1, ROUNDS + 1):
            for name in TAKES_PART[index]:
                envelope = digest.of_bytes(whole[record.statement_path(index, name)])
                found.append(StatementLogged(site=SiteName(name), run=RUN, round_index=index, statement=envelope))
            found.append(_committed(whole, index))
        return [*found, Released(run=RUN, release=digest.of_bytes(released))]

    def history(self, leaves: list[AnyLeaf], cosigners: Iterable[SiteName]) -> Files:
        """The log's files: a checkpoint of the admissions, cosigned by all, and one of everything, by the given sites."""
        data = [leaf.to_bytes() for leaf in leaves]
        made = {release.LEAVES: release.join_leaves(data)}
        for size, sites in ((len(SITES), SITES), (len(data), cosigners)):
            made[release.checkpoint_path(size)] = checkpoint(data[:size], self.scene, sites).to_bytes()
        return made


def checkpoint(leaves: list[bytes], scene: Scene, sites: Iterable[SiteName], *, key: SigningKey | None = None) -> Note:
    """A checkpoint of these leaves, cosigned by these sites."""
    due = Checkpoint(origin=ORIGIN, size=len(leaves), root=root_of(leaves))
    signed = sign_checkpoint(due, key or scene.server)
    for site in sites:
        signed = signed.with_signature(cosign_checkpoint(due, site, scene.keys[site], at=1_700_000_000))
    return signed


def contents_of(whole: Files) -> Contents:
    """A record's documents, read from its files in memory."""
    return _MemoryReader(whole).contents()


class _MemoryReader(RecordReader):
    def __init__(self, whole: Files) -> None:
        self._whole = whole
        super().__init__(None, Manifest.from_bytes(whole[record.MANIFEST]), TrustedKeys())  # type: ignore[arg-type]

    def _listed(self, path: str) -> bytes:
        return self._whole[path]


def _committed(whole: Files, index: int) -> EncoderCommitted:
    return EncoderCommitted(run=RUN, round_index=index, state=digest.of_bytes(whole[record.state_path(index)]))

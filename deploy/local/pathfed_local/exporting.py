"""`pathfed export`: a verified release in forms that other tools read."""

from pathlib import Path

from pathfed_common import digest, files
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.provenance.record_reader import TrustedKeys
from pathfed_common.provenance.release import RELEASE
from pathfed_common.provenance.release_exports import ml_bom, prov_json
from pathfed_common.provenance.release_verify import is_bundle, verify_release
from pathfed_local.verifying import opened


def export_release(given: Path, trusted: TrustedKeys | None, *, prov: Path | None, bom: Path | None) -> None:
    """Verify a bundle and write what was asked for.

    Args:
        given: the bundle, folder or archive.
        trusted: the keys you know; None for none.
        prov: where W3C PROV-JSON goes.
        bom: where the CycloneDX bill of materials goes.

    Raises:
        ProvenanceError: PF615, no bundle is there; another code, it does not verify, and nothing was written.
        HostError: PF901, PF904: a file cannot be written.
    """
    with opened(given) as folder:
        if not is_bundle(folder):
            raise ProvenanceError(ErrorCode.BUNDLE_UNREADABLE, "only a release is exported", where=given)
        verdict = verify_release(folder, trusted, redraw=False)
        if verdict.findings:
            raise verdict.findings[0]
        name = digest.of_bytes((folder / RELEASE).read_bytes())
    if verdict.contents is None or verdict.card is None:
        raise ValueError("a bundle in which nothing is wrong has documents and a card")
    if prov is not None:
        files.write_atomic(prov, digest.canonical(prov_json(verdict.contents, name)))
    if bom is not None:
        at = verdict.contents.rounds[-1][0].committed_at
        files.write_atomic(bom, digest.canonical(ml_bom(verdict.card, name, at=at)))

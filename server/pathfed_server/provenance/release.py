"""Makes a release of a finished run's record; `pathfed_common.provenance.release_verify` checks it.

In two steps, because the log must know of a release before the release can show the log: `prepare` makes everything that is released,
the same bytes each time, so that a release which waits for co-signatures is simply made again; `write_bundle` puts it with the log into a
folder, and verifies it there before anybody sees it.
"""

import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathfed_common import digest, files
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.part_file import file_pieces
from pathfed_common.provenance import record, release
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_checkpoint import Checkpoint
from pathfed_common.provenance.model_signature import ModelKey, SignedModel, sign_model
from pathfed_common.provenance.note import Note
from pathfed_common.provenance.record import Manifest
from pathfed_common.provenance.release import HistoryListing, ListedFile, Release
from pathfed_common.provenance.release_card import make_card, read_evaluation
from pathfed_common.provenance.release_readme import readme
from pathfed_common.provenance.release_verify import verify_release
from pathfed_common.provenance.verify import examine_record

_ARCHIVE_MODE = 0o644


@dataclass(frozen=True)
class Prepared:
    """What is released, but for the log.

    Attributes:
        record: folder of the run's record.
        files: the release's own files by place, `release.dsse` among them.
        manifest: the record's manifest.
        updates: how many of the admitted updates the record has retained, and how many there are.
    """

    record: Path
    files: Mapping[str, bytes]
    manifest: Manifest
    updates: tuple[int, int]

    @property
    def digest(self) -> Digest:
        """What names the release in the log."""
        return digest.of_bytes(self.files[release.RELEASE])


def prepare(folder: Path, key: SigningKey, model_key: ModelKey, *, origin: str, evaluation: bytes | None = None) -> Prepared:
    """Make what is released. The same record, keys and evaluation give the same bytes.

    Args:
        folder: the record of a finished run.
        key: the server's evidence key.
        model_key: signs the encoder's folder.
        origin: the log's origin.
        evaluation: a JSON object of figures, or None.

    Raises:
        ProvenanceError: PF613, the run is not finished; PF624, not an evaluation; another code, the record does not verify.
    """
    examined = examine_record(folder, redraw=False)
    examined.verdict.require()
    contents = examined.contents
    if contents is None:
        raise ProvenanceError(ErrorCode.RECORD_INCOMPLETE, "the record cannot be read", where=folder)
    manifest, encoder = contents.manifest, contents.manifest.entry(record.ENCODER)
    if encoder is None or manifest.rounds != contents.plan.rounds.count:
        value = f"{manifest.rounds} of {contents.plan.rounds.count} rounds"
        raise ProvenanceError(ErrorCode.RUN_UNFINISHED, "only a finished run is released", where=manifest.run, value=value)
    figures = () if evaluation is None else read_evaluation(evaluation, where=release.EVALUATION)
    card = make_card(contents, figures)
    made = {release.CARD: card.to_bytes(), release.README: readme(card), release.MODEL_KEY: model_key.public_pem}
    made[release.MODEL_SIGNATURE] = sign_model(_signed_model(made, manifest), model_key)
    if evaluation is not None:
        made[release.EVALUATION] = evaluation
    listing = Release(
        server_key=key.public,
        run=manifest.run,
        plan=manifest.plan,
        record=digest.of_bytes((folder / record.MANIFEST).read_bytes()),
        encoder=encoder.digest,
        log_origin=origin,
        log_key=key.public,
        files=_listed(made),
    )
    retained = sum(entry.path.startswith("updates/") for entry in manifest.files)
    return Prepared(folder, {**made, release.RELEASE: listing.to_bytes(key)}, manifest, (retained, len(contents.statements)))


def write_bundle(prepared: Prepared, leaves: Sequence[bytes], notes: Sequence[Note], key: SigningKey, out: Path) -> None:
    """Write a bundle, whole or not at all, and verify it before it has its name.

    Args:
        prepared: what is released.
        leaves: every leaf of the log, up to the largest checkpoint.
        notes: checkpoints with cosignatures; see `release_verify` for how many it takes.
        key: the server's evidence key.
        out: the folder; it must not exist, or be empty.

    Raises:
        ProvenanceError: the bundle does not verify: PF614, too few sites have cosigned; another code, log and record do not agree.
        HostError: PF904, something is there already, or it cannot be written; PF901, the disk is full.
    """
    log = {release.LEAVES: release.join_leaves(leaves)}
    for signed in notes:
        log[release.checkpoint_path(Checkpoint.from_text(signed.text).size)] = signed.to_bytes()
    listing = HistoryListing(server_key=key.public, release=prepared.digest, files=_listed(log))
    small = {**prepared.files, **log, release.HISTORY: listing.to_bytes(key)}

    def fill(part: Path) -> None:
        for place, data in small.items():
            files.write_atomic(_made(part, place), data)
        for place in release.record_files(prepared.manifest):
            files.write_atomic(_made(part, place), file_pieces(prepared.record / place))
        # The server drew the first state itself; drawing it again would take the memory of a second model.
        findings = verify_release(part, redraw=False).findings
        if findings:
            raise findings[0]

    files.create_folder(out, fill)
    out.chmod(0o755)


def write_archive(bundle: Path, archive: Path) -> None:
    """Pack a bundle's folder into a tar archive, whole or not at all. Equal bundles give equal bytes.

    Raises:
        HostError: PF904, it cannot be written; PF901, the disk is full.
    """
    part = archive.with_name(f".{archive.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as packed:
                for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
                    _pack(packed, path, path.relative_to(bundle).as_posix())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, archive)
        files.sync_folder(archive.parent)
    except OSError as error:
        raise files.disk_error(error, archive) from error
    finally:
        part.unlink(missing_ok=True)


def _pack(packed: tarfile.TarFile, path: Path, name: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = path.stat().st_size, _ARCHIVE_MODE
    with path.open("rb") as file:
        packed.addfile(entry, file)


def _signed_model(made: Mapping[str, bytes], manifest: Manifest) -> SignedModel:
    digests = {path: digest.of_bytes(data) for path, data in made.items()} | {entry.path: entry.digest for entry in manifest.files}
    prefix = release.ENCODER_FOLDER
    return SignedModel(manifest.run, {path.removeprefix(prefix): found for path, found in digests.items() if path.startswith(prefix)})


def _listed(made: Mapping[str, bytes]) -> tuple[ListedFile, ...]:
    return tuple(ListedFile.of(path, data) for path, data in sorted(made.items()))


def _made(folder: Path, place: str) -> Path:
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

"""A release: an encoder with all that a stranger needs to check where it comes from, as a folder, the *bundle*.

    release.dsse                  signed by the server: what is released; its digest is a leaf of the log
    history.dsse                  signed by the server: the files of the log
    encoder/README.md  card.json  the model card, for people and for programs
    model.sig  model-key.pem      OpenSSF signature over the folder encoder/, and the key that made it
    evaluation.json               figures of an evaluation, where the operator gave some
    log/leaves.jsonl              every leaf of the log up to the last checkpoint, one a line
    log/checkpoints/<size>.note   checkpoints with the sites' cosignatures
    all else                      the run's record (`record`), without its updates and the states between first and last

The release's manifest lists everything that is there before the log knows of the release; the log's files, which come after, have a list of
their own. Nothing else is in the folder. Here are the two lists and the names; `release_verify` checks, the server writes.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Self

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.ids import RunName
from pathfed_common.provenance import dsse, record
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.provenance.log_checkpoint import check_origin
from pathfed_common.provenance.record import Manifest
from pathfed_common.provenance.values import Value, decode_value

RELEASE_TYPE = "application/vnd.pathfed.release.v1+json"
HISTORY_TYPE = "application/vnd.pathfed.release-history.v1+json"

RELEASE = "release.dsse"
HISTORY = "history.dsse"
README = "encoder/README.md"
CARD = "encoder/card.json"
MODEL_SIGNATURE = "model.sig"
MODEL_KEY = "model-key.pem"
EVALUATION = "evaluation.json"
LEAVES = "log/leaves.jsonl"

ENCODER_FOLDER = "encoder/"
#: Files that a release's manifest lists; the record's are in the record's own.
FILES = (README, CARD, MODEL_SIGNATURE, MODEL_KEY, EVALUATION)
_OPTIONAL = (EVALUATION,)
_CHECKPOINT = re.compile(r"log/checkpoints/[0-9]{12}\.note")


def checkpoint_path(size: int) -> str:
    """Place of the checkpoint of so many leaves."""
    return f"log/checkpoints/{size:012d}.note"


@dataclass(frozen=True, kw_only=True)
class ListedFile(Value):
    """One file: its place (POSIX, relative), the digest of its bytes and their number."""

    path: str
    digest: Digest
    size: int

    @classmethod
    def of(cls, path: str, data: bytes) -> Self:
        """The entry of a file with these bytes."""
        return cls(path=path, digest=digest.of_bytes(data), size=len(data))


@dataclass(frozen=True, kw_only=True)
class Listing(Value):
    """Base of the two signed lists: a server key, and files in order of their places.

    Attributes:
        server_key: the server's evidence key, which signs.
        files: the files.
    """

    payload_type: ClassVar[str]

    server_key: VerifyKey
    files: tuple[ListedFile, ...]

    def _check(self) -> None:
        paths = [entry.path for entry in self.files]
        if paths != sorted(set(paths)):
            raise ValueError("files must be in order of their paths, each once")
        self._check_places(set(paths))

    def _check_places(self, paths: set[str]) -> None:
        """Which places the list may hold; raises ValueError."""

    def to_bytes(self, key: SigningKey) -> bytes:
        """The list signed by the server.

        Raises:
            ValueError: `key` is not the private half of `server_key`.
        """
        if key.public != self.server_key:
            raise ValueError("a list is signed by the server key it names")
        return dsse.seal(digest.canonical(self.plain()), self.payload_type, key)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Self:
        """Read a list and check that the key it names signed it.

        Raises:
            ProvenanceError: PF602, it did not; PF601, not such a list.
        """
        found = decode_value(cls, dsse.parse(data, where=where).payload, where)
        dsse.open_envelope(data, payload_type=cls.payload_type, keys=found.server_key, where=where)
        return found


@dataclass(frozen=True, kw_only=True)
class Release(Listing):
    """What is released. Nothing in it changes when it is made again, so its digest names the release.

    Attributes:
        run: the run.
        plan: digest of its plan.
        record: digest of the record's manifest envelope.
        encoder: digest of the encoder's weights.
        log_origin: the log's origin.
        log_key: the key that the log signs its checkpoints with.
    """

    payload_type = RELEASE_TYPE

    run: RunName
    plan: Digest
    record: Digest
    encoder: Digest
    log_origin: str
    log_key: VerifyKey

    def _check_places(self, paths: set[str]) -> None:
        check_origin(self.log_origin)
        if not set(FILES) - set(_OPTIONAL) <= paths <= set(FILES):
            raise ValueError(f"a release lists {', '.join(FILES)}, got {sorted(paths)}")


@dataclass(frozen=True, kw_only=True)
class HistoryListing(Listing):
    """The log's files in a bundle.

    Attributes:
        release: digest of the release's envelope.
    """

    payload_type = HISTORY_TYPE

    release: Digest

    def _check_places(self, paths: set[str]) -> None:
        checkpoints = paths - {LEAVES}
        if LEAVES not in paths or not checkpoints or not all(_CHECKPOINT.fullmatch(path) for path in checkpoints):
            raise ValueError(f"a history lists {LEAVES} and checkpoints, got {sorted(paths)}")


def record_files(manifest: Manifest) -> list[str]:
    """Places of the record's files that a bundle holds, the manifest among them."""
    return [record.MANIFEST, *(entry.path for entry in manifest.files if not record.left_out(entry.path, manifest.rounds))]


def bundle_files(release: Release, history: HistoryListing, manifest: Manifest) -> set[str]:
    """Every file of a bundle, by its place."""
    listed = [entry.path for entry in (*release.files, *history.files)]
    return {RELEASE, HISTORY, *listed, *record_files(manifest)}


def join_leaves(leaves: Iterable[bytes]) -> bytes:
    """The bytes of `log/leaves.jsonl`. A leaf is canonical JSON, which has no newline."""
    return b"".join(leaf + b"\n" for leaf in leaves)


def split_leaves(data: bytes) -> list[bytes]:
    """The leaves in `log/leaves.jsonl`; a last line without its newline stays one, and is no leaf."""
    lines = data.split(b"\n")
    return lines[:-1] if lines[-1] == b"" else [*lines[:-1], lines[-1] + b"\n"]

"""The record of a run: what a third party needs to verify it, as a folder.

    manifest.dsse                        signed by the server: every other file with digest and size
    plan.json  plan.dsse                 the plan's canonical bytes; the same signed by the server
    sites/<site>.dsse                    site cards, each signed by its own evidence key
    approvals/<site>.dsse                each site's approval of the plan
    rounds/round-0001.dsse               round records, signed by the server, each naming the one before
    statements/round-0001/<site>.dsse    the admitted sites' statements
    states/round-0000.safetensors        base states; round 0 is the initial one
    updates/round-0001/<site>.safetensors   the admitted updates, where they are retained
    encoder/model.safetensors  config.json  the exported encoder, once the run is finished

Files are written first and the manifest last, so at every instant the manifest lists files that are there and whole. A file it does not
list is no part of the record. Here are the manifest, the round record and the names; `verify` checks, the server's recorder writes.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.provenance.values import Value, decode_value
from pathfed_common.units import UtcSeconds

MANIFEST_TYPE = "application/vnd.pathfed.record-manifest.v1+json"
ROUND_TYPE = "application/vnd.pathfed.round-record.v1+json"

MANIFEST = "manifest.dsse"
PLAN = "plan.json"
SIGNED_PLAN = "plan.dsse"
ENCODER = "encoder/model.safetensors"
ENCODER_CONFIG = "encoder/config.json"

_SITE = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_ROUND = r"round-[0-9]{4,7}"
_LAYOUT = re.compile(
    rf"plan\.json|plan\.dsse|encoder/model\.safetensors|encoder/config\.json|(?:sites|approvals)/{_SITE}\.dsse|rounds/{_ROUND}\.dsse"
    rf"|states/{_ROUND}\.safetensors|statements/{_ROUND}/{_SITE}\.dsse|updates/{_ROUND}/{_SITE}\.safetensors"
)
_CODE = re.compile(r"PF[0-9]{3}")


def card_path(site: str) -> str:
    """Place of a site's card."""
    return f"sites/{site}.dsse"


def approval_path(site: str) -> str:
    """Place of a site's approval."""
    return f"approvals/{site}.dsse"


def round_path(round_index: int) -> str:
    """Place of a round record."""
    return f"rounds/round-{round_index:04d}.dsse"


def state_path(round_index: int) -> str:
    """Place of the state that a round left behind."""
    return f"states/round-{round_index:04d}.safetensors"


def statement_path(round_index: int, site: str) -> str:
    """Place of a site's statement."""
    return f"statements/round-{round_index:04d}/{site}.dsse"


def update_path(round_index: int, site: str) -> str:
    """Place of a retained update."""
    return f"updates/round-{round_index:04d}/{site}.safetensors"


def left_out(path: str, rounds: int) -> bool:
    """Whether a release's bundle leaves this file of a record of so many rounds out: updates, and the states between first and last.

    Their digests stand in the record; who has the updates can recompute all states.
    """
    return path.startswith("updates/") or (path.startswith("states/") and path not in (state_path(0), state_path(rounds)))


@dataclass(frozen=True, kw_only=True)
class FileEntry(Value):
    """One file of the record: its place (POSIX, relative), the digest of its bytes and their number."""

    path: str
    digest: Digest
    size: int

    def _check(self) -> None:
        # The layout's own names alone: nothing with '..', nothing absolute, nothing a later version might mean otherwise.
        # A round's number has one spelling, so that no two places mean the same.
        number = re.match(r"(?:rounds|states|statements|updates)/round-([0-9]+)", self.path)
        if _LAYOUT.fullmatch(self.path) is None or (number is not None and number[1] != f"{int(number[1]):04d}"):
            raise ValueError(f"{self.path[:80]!r} is not a place in a record")


@dataclass(frozen=True, kw_only=True)
class Manifest(Value):
    """What the record consists of, as the server states it.

    Attributes:
        run: the run.
        plan: digest of its plan.
        server_key: the server's evidence key.
        rounds: committed rounds recorded.
        files: every file but the manifest, in order of their paths.
    """

    run: RunName
    plan: Digest
    server_key: VerifyKey
    rounds: int
    files: tuple[FileEntry, ...]

    def _check(self) -> None:
        paths = [entry.path for entry in self.files]
        if paths != sorted(set(paths)):
            raise ValueError("files must be in order of their paths, each once")

    def entry(self, path: str) -> FileEntry | None:
        """The entry of a path, or None."""
        return self._by_path.get(path)

    @cached_property
    def _by_path(self) -> dict[str, FileEntry]:
        return {entry.path: entry for entry in self.files}

    def to_bytes(self, key: SigningKey) -> bytes:
        """The manifest signed by the server.

        Raises:
            ValueError: `key` is not the private half of `server_key`.
        """
        if key.public != self.server_key:
            raise ValueError("a manifest is signed by the server key it names")
        return dsse.seal(digest.canonical(self.plain()), MANIFEST_TYPE, key)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str = MANIFEST) -> Self:
        """Read a manifest and check that the key it names signed it.

        Raises:
            ProvenanceError: PF602, it did not; PF601, not a manifest.
        """
        manifest = decode_value(cls, dsse.parse(data, where=where).payload, where)
        dsse.open_envelope(data, payload_type=MANIFEST_TYPE, keys=manifest.server_key, where=where)
        return manifest


@dataclass(frozen=True, kw_only=True)
class AdmittedSite(Value):
    """A site whose update counted.

    Attributes:
        site: the site.
        update: digest of its update.
        update_bytes: length of the update.
        statement: digest of its statement's envelope.
        weight: its public share in the mean; a round's weights add up to 1.
        factor: what the aggregation rule multiplied that by, within [0, 1]; 1 but for "norm_weighted".
        rounding: bound on the L2 norm of what the wire format's rounding added to the update (`wire_format.UpdateNumbers.rounding`), as
            the server found it; whoever has the update can find it again.
        released: the code for which the update was refused before an operator let it count all the same, or None.
    """

    site: SiteName
    update: Digest
    update_bytes: int
    statement: Digest
    weight: float
    rounding: float
    released: str | None = None
    factor: float = 1.0

    def _check(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight must be within (0, 1], got {self.weight}")
        if not 0 <= self.factor <= 1:
            raise ValueError(f"factor must be within [0, 1], got {self.factor}")
        if self.rounding < 0:
            raise ValueError(f"rounding must be at least 0, got {self.rounding}")
        if self.released is not None and _CODE.fullmatch(self.released) is None:
            raise ValueError(f"not an error code: {self.released[:20]!r}")


@dataclass(frozen=True, kw_only=True)
class AbsentSite(Value):
    """A site whose update did not count, and the code that says why."""

    site: SiteName
    code: str

    def _check(self) -> None:
        if _CODE.fullmatch(self.code) is None:
            raise ValueError(f"not an error code: {self.code[:20]!r}")


@dataclass(frozen=True, kw_only=True)
class ServerTimes(Value):
    """Server-side durations of a round, seconds: exchange, transfers (summed over the sites), admission, mean, optimiser step."""

    exchange_s: float
    transfer_s: float
    admission_s: float
    aggregation_s: float
    step_s: float


@dataclass(frozen=True, kw_only=True)
class RoundRecord(Value):
    """One committed round, as the server states it. Every list is in order of the sites' names.

    Attributes:
        run: the run.
        round_index: 1 for the first.
        plan: digest of the plan.
        base_state: digest of the state the round started from.
        next_state: digest of the state it left behind.
        previous: digest of the previous round record's envelope, or None for the first round.
        admitted: sites whose updates counted.
        refused: sites that answered with a code, or whose update was refused.
        silent: sites that were asked and did not answer in time.
        excluded: sites that were not asked.
        offered_at: UTC seconds.
        deadline: UTC seconds.
        committed_at: UTC seconds.
        times: server-side durations.
        average: digest of the encoder's running average after the round, as a file, where the plan releases that; else None.
    """

    run: RunName
    round_index: int
    plan: Digest
    base_state: Digest
    next_state: Digest
    previous: Digest | None
    admitted: tuple[AdmittedSite, ...]
    refused: tuple[AbsentSite, ...]
    silent: tuple[AbsentSite, ...]
    excluded: tuple[AbsentSite, ...]
    offered_at: UtcSeconds
    deadline: UtcSeconds
    committed_at: UtcSeconds
    times: ServerTimes
    average: Digest | None = None

    def _check(self) -> None:
        if self.round_index < 1:
            raise ValueError("round_index must be at least 1")
        groups = [[entry.site for entry in group] for group in (self.admitted, self.refused, self.silent, self.excluded)]
        if any(group != sorted(group) for group in groups) or len({site for group in groups for site in group}) != sum(map(len, groups)):
            raise ValueError("sites must be in order of their names, each in one list once")

    def to_bytes(self, key: SigningKey) -> bytes:
        """The record signed by the server."""
        return dsse.seal(digest.canonical(self.plain()), ROUND_TYPE, key)

    @classmethod
    def from_bytes(cls, data: bytes, key: VerifyKey, *, where: str = "round record") -> Self:
        """Verify and read a round record.

        Raises:
            ProvenanceError: PF602, not signed by `key`; PF601, not a round record.
        """
        return decode_value(cls, dsse.open_envelope(data, payload_type=ROUND_TYPE, keys=key, where=where), where)

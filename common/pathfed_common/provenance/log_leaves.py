"""The leaves of the transparency log: a closed set of kinds, each with one canonical form. Pure.

A leaf is canonical JSON with its kind and version. What a leaf holds itself, and what it holds the digest of:

| kind | holds | why |
| --- | --- | --- |
| site-admitted, site-revoked | itself | the enrolled sites must follow from the log alone: a quorum is counted with nothing else at hand |
| key-rotated | itself, both signatures | as above; whoever reads the log sees that the old key handed over to the new one |
| plan-published | digest of the plan | a plan is as long as it likes to be, and a bundle carries it once |
| plan-approved | digest of the approval's envelope, plan and site | the envelope repeats them under a signature; 0.2 kB instead of 0.5 |
| plan-decided | digest of the envelope of a rejection or a revocation, plan and site | as above |
| statement | digest of its envelope, site, run, round | 1.8 kB an envelope, 0.2 a leaf, 50,000 of them in 1,000 rounds of 50 sites |
| encoder-committed | digest of the state, run, round | a state has gigabytes |
| released | digest of the release's manifest, run | as above |

A digest proves as much as the envelope would, for the envelope has one encoding and travels in the bundle that is verified. What stands
beside a digest (site, run, round) is the log's claim; a verifier compares it with what the envelope says. Nothing here is about a patient,
and times are those of public acts.
"""

import base64
from dataclasses import dataclass
from typing import ClassVar

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SIGNATURE_BYTES, SigningKey, VerifyKey, decode_base64
from pathfed_common.provenance.merkle import leaf_hash
from pathfed_common.provenance.values import Value, decode
from pathfed_common.units import UtcSeconds

LEAF_VERSION = 1
ROTATION_TYPE = "application/vnd.pathfed.key-rotation.v1+json"


@dataclass(frozen=True, kw_only=True)
class Leaf(Value):
    """Base of leaves."""

    kind: ClassVar[str]

    def to_bytes(self) -> bytes:
        """Canonical JSON: kind, version and fields."""
        return digest.canonical({"kind": self.kind, "version": LEAF_VERSION, **self.plain()})

    @property
    def hash(self) -> bytes:
        """The leaf hash that goes into the tree."""
        return leaf_hash(self.to_bytes())


@dataclass(frozen=True, kw_only=True)
class SiteAdmitted(Leaf):
    """A site is enrolled from here on.

    Attributes:
        site: its name. A revoked site's name may be admitted again; it is then another member.
        evidence_key: the key it signs and cosigns with, never used in this log before.
        at: UTC seconds.
    """

    kind = "site-admitted"
    site: SiteName
    evidence_key: VerifyKey
    at: UtcSeconds


@dataclass(frozen=True, kw_only=True)
class SiteRevoked(Leaf):
    """A site is no longer enrolled.

    Attributes:
        site: its name.
        at: UTC seconds.
    """

    kind = "site-revoked"
    site: SiteName
    at: UtcSeconds


@dataclass(frozen=True, kw_only=True)
class KeyRotated(Leaf):
    """A site's evidence key hands over to a new one. Make it with `rotate_key`.

    Attributes:
        site: the site.
        old_key: the key so far.
        new_key: the key from here on.
        at: UTC seconds.
        old_signature: base64, by the old key: it hands over.
        new_signature: base64, by the new key: whoever asks for it holds it.
    """

    kind = "key-rotated"
    site: SiteName
    old_key: VerifyKey
    new_key: VerifyKey
    at: UtcSeconds
    old_signature: str
    new_signature: str

    def _check(self) -> None:
        if any(len(decode_base64(signature)) != SIGNATURE_BYTES for signature in (self.old_signature, self.new_signature)):
            raise ValueError(f"a signature has {SIGNATURE_BYTES} bytes")

    @property
    def authentic(self) -> bool:
        """Whether both keys signed."""
        message = _rotation(self.site, self.old_key, self.new_key, self.at)
        signed = ((self.old_key, self.old_signature), (self.new_key, self.new_signature))
        return all(key.verify(decode_base64(signature), message) for key, signature in signed)


@dataclass(frozen=True, kw_only=True)
class PlanPublished(Leaf):
    """The operator has signed a plan.

    Attributes:
        plan: digest of the plan.
    """

    kind = "plan-published"
    plan: Digest


@dataclass(frozen=True, kw_only=True)
class PlanApproved(Leaf):
    """A site has approved a plan.

    Attributes:
        site: the site.
        plan: digest of the plan.
        approval: digest of the approval's envelope.
    """

    kind = "plan-approved"
    site: SiteName
    plan: Digest
    approval: Digest


@dataclass(frozen=True, kw_only=True)
class PlanDecided(Leaf):
    """A site has rejected a plan, or taken back its approval. Which of the two, the envelope says.

    Attributes:
        site: the site.
        plan: digest of the plan.
        decision: digest of the decision's envelope.
    """

    kind = "plan-decided"
    site: SiteName
    plan: Digest
    decision: Digest


@dataclass(frozen=True, kw_only=True)
class StatementLogged(Leaf):
    """A site's statement about one update.

    Attributes:
        site: the site.
        run: the run.
        round_index: 1 for a run's first round.
        statement: digest of the statement's envelope.
    """

    kind = "statement"
    site: SiteName
    run: RunName
    round_index: int
    statement: Digest

    def _check(self) -> None:
        _check_round(self.round_index)


@dataclass(frozen=True, kw_only=True)
class EncoderCommitted(Leaf):
    """A round ended with a new state.

    Attributes:
        run: the run.
        round_index: the round; 0 for the state a run starts from.
        state: digest of the state's bytes.
    """

    kind = "encoder-committed"
    run: RunName
    round_index: int
    state: Digest


@dataclass(frozen=True, kw_only=True)
class Released(Leaf):
    """A run's encoder was released.

    Attributes:
        run: the run.
        release: digest of the release's manifest.
    """

    kind = "released"
    run: RunName
    release: Digest


AnyLeaf = (
    SiteAdmitted | SiteRevoked | KeyRotated | PlanPublished | PlanApproved | PlanDecided | StatementLogged | EncoderCommitted | Released
)

#: Every kind there is. Another one is refused: a verifier must not count what it does not understand as harmless.
KINDS: dict[str, type[AnyLeaf]] = {
    leaf.kind: leaf
    for leaf in (
        SiteAdmitted,
        SiteRevoked,
        KeyRotated,
        PlanPublished,
        PlanApproved,
        PlanDecided,
        StatementLogged,
        EncoderCommitted,
        Released,
    )
}


def read_leaf(data: bytes, *, where: str = "log leaf") -> AnyLeaf:
    """Read a leaf back from exactly the bytes that `to_bytes` gives.

    Raises:
        ProvenanceError: PF601, anything else: another kind or version, other fields, another spelling.
    """
    return decode(data, _from_plain, lambda leaf: leaf.to_bytes(), what="a log leaf", where=where)


def rotate_key(site: SiteName, old: SigningKey, new: SigningKey, at: UtcSeconds) -> KeyRotated:
    """Hand a site's evidence key over to a new one. Both keys sign, so it is made where both are: at the site.

    It names no log: in every log where the old key is the site's, the new key is the site's as well.
    """
    message = _rotation(site, old.public, new.public, at)
    signatures = {name: _base64(key.sign(message)) for name, key in (("old_signature", old), ("new_signature", new))}
    return KeyRotated(site=site, old_key=old.public, new_key=new.public, at=at, **signatures)


def _from_plain(raw: object) -> AnyLeaf:
    if not isinstance(raw, dict) or raw.get("version") != LEAF_VERSION or not isinstance(raw.get("kind"), str):
        raise ValueError(f"an object with a kind and version {LEAF_VERSION} is expected")
    if raw["kind"] not in KINDS:
        raise ValueError(f"unknown kind {raw['kind'][:80]!r}")
    return KINDS[raw["kind"]].from_plain({name: value for name, value in raw.items() if name not in ("kind", "version")})


def _rotation(site: SiteName, old: VerifyKey, new: VerifyKey, at: UtcSeconds) -> bytes:
    value = {"site": site, "old_key": old.to_text(), "new_key": new.to_text(), "at": float(at)}
    return dsse.pae(ROTATION_TYPE, digest.canonical(value))


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _check_round(round_index: int) -> None:
    if round_index < 1:
        raise ValueError(f"round_index must be at least 1, got {round_index}")

"""The second person: an approval that two people of a site must sign, each with a key of their own. Pure.

What a person signs are the figures that count: site, plan and declared patients. Whose key is whose, the site's own list of approvers says;
a signature of somebody who is no longer on it counts no more. Whoever has the account that the client runs under can change that list:
two signatures stop a mistake, and a single person who only has the commands; they do not stop the owner of the machine.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, ProvenanceError, TransportError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import dsse
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.provenance.values import Value, decode_value
from pathfed_common.units import UtcSeconds

CONSENT_TYPE = "application/vnd.pathfed.consent.v1+json"
#: People who must have signed.
NEEDED = 2


@dataclass(frozen=True, kw_only=True)
class Consent(Value):
    """What a person signs.

    Attributes:
        site: the site.
        plan: digest of the plan.
        declared_patients: the public lower bound that the approval will declare.
        approver: the person, as the site calls them.
        signed_at: UTC seconds.
    """

    site: SiteName
    plan: Digest
    declared_patients: int
    approver: str
    signed_at: UtcSeconds

    def to_bytes(self, key: SigningKey) -> bytes:
        """The consent, signed by the person's key."""
        return dsse.seal(digest.canonical(self.plain()), CONSENT_TYPE, key)


def signers(
    envelopes: Iterable[bytes], approvers: Mapping[str, VerifyKey], *, site: SiteName, plan: Digest, declared_patients: int
) -> frozenset[str]:
    """Approvers whose signature stands under just these figures."""
    found = set()
    for envelope in envelopes:
        for name, key in approvers.items():
            try:
                payload = dsse.open_envelope(envelope, payload_type=CONSENT_TYPE, keys=key, where="consent")
                consent = decode_value(Consent, payload, "consent")
            except ProvenanceError:
                continue  # another person's, or nobody's
            if (consent.site, consent.plan, consent.declared_patients, consent.approver) == (site, plan, declared_patients, name):
                found.add(name)
    return frozenset(found)


def check(signed: frozenset[str]) -> None:
    """Refuse what too few have signed.

    Raises:
        TransportError: PF442, fewer than two approvers.
    """
    if len(signed) < NEEDED:
        raise TransportError(
            ErrorCode.SECOND_PERSON_MISSING,
            "this site's policy wants two approvers under an approval",
            where="policy.toml, key second_person",
            value=f"signed by {', '.join(sorted(signed)) or 'nobody'}",
            remedy="let another approver run `pathfed-site approve` with the same figures and a key of their own",
        )

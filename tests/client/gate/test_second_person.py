import pytest

from pathfed_client.gate.second_person import Consent, check, signers
from pathfed_common import digest
from pathfed_common.errors import TransportError
from pathfed_common.ids import SiteName
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.units import UtcSeconds

SITE, PLAN = SiteName("a"), digest.of_bytes(b"plan")
ANNA, BEN = SigningKey.generate(), SigningKey.generate()
APPROVERS = {"anna": ANNA.public, "ben": BEN.public}


def consent(name: str, key: SigningKey, **changes: object) -> bytes:
    values: dict[str, object] = {"site": SITE, "plan": PLAN, "declared_patients": 40, "approver": name, "signed_at": UtcSeconds(1.0)}
    return Consent(**{**values, **changes}).to_bytes(key)  # type: ignore[arg-type]


def signed(*envelopes: bytes, approvers: dict = APPROVERS) -> set[str]:
    return set(signers(envelopes, approvers, site=SITE, plan=PLAN, declared_patients=40))


def test_two_people_with_keys_of_their_own_count():
    found = signed(consent("anna", ANNA), consent("ben", BEN))
    assert found == {"anna", "ben"}
    check(frozenset(found))


@pytest.mark.parametrize(
    "second",
    [
        consent("anna", ANNA),  # the same person again
        consent("ben", ANNA),  # with the other's name
        consent("carla", SigningKey.generate()),  # nobody's key
        consent("ben", BEN, declared_patients=41),
        consent("ben", BEN, plan=digest.of_bytes(b"another plan of the same name")),
        consent("ben", BEN, site="b"),
        b"",
        b"{}",
    ],
)
def test_anything_else_is_no_second_person(second):
    found = signed(consent("anna", ANNA), second)
    assert found == {"anna"}
    with pytest.raises(TransportError, match=r"PF442.*anna"):
        check(frozenset(found))


def test_who_is_no_approver_any_more_counts_no_more():
    both = (consent("anna", ANNA), consent("ben", BEN))
    assert signed(*both, approvers={"anna": ANNA.public}) == {"anna"}
    assert signed(*both, approvers={"anna": ANNA.public, "ben": SigningKey.generate().public}) == {"anna"}
    with pytest.raises(TransportError, match="nobody"):
        check(frozenset())

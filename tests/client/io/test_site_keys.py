"""The site's three keys: made here, kept apart, readable by their owner alone, exchanged without ever being without one."""

import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from pathfed_client.io.site_keys import FileKeys, KeyKind, certificate_request, fingerprints, flower_public, tls_public
from pathfed_common.errors import HostError
from pathfed_common.ids import site_name


@pytest.fixture
def keys(tmp_path):
    return FileKeys.create(tmp_path)


def test_each_key_is_of_its_kind_and_its_owners_alone(keys, tmp_path):
    assert keys.evidence_key().public
    tls = load_pem_private_key(keys.tls_key(), None)
    assert isinstance(tls, ec.EllipticCurvePrivateKey)
    assert tls.curve.name == "secp256r1"
    assert flower_public(keys.flower_key_file()).startswith("ecdsa-sha2-nistp384 ")
    assert len(list(tmp_path.iterdir())) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_the_request_is_signed_by_the_tls_key_and_names_the_site(keys):
    request = x509.load_der_x509_csr(certificate_request(keys.tls_key(), site_name("site-a")))
    assert request.is_signature_valid
    assert request.subject.rfc4514_string() == "CN=site-a"


@pytest.mark.parametrize("kind", list(KeyKind))
def test_a_staged_key_waits_beside_the_one_in_use_and_takes_its_place_once(kind, keys):
    before = fingerprints(keys)
    assert not keys.is_staged(kind)
    keys.stage(kind)
    staged = keys.path(kind, staged=True).read_bytes()
    keys.stage(kind)
    assert keys.path(kind, staged=True).read_bytes() == staged, "a repeated command asks for the same key"
    assert fingerprints(keys) == before
    assert stat.S_IMODE(keys.path(kind, staged=True).stat().st_mode) == 0o600
    keys.promote(kind)
    keys.promote(kind)
    after = fingerprints(keys)
    assert keys.path(kind).read_bytes() == staged
    assert {name for name in KeyKind if after[name] != before[name]} == {kind}
    assert not keys.is_staged(kind)


def test_a_key_that_is_there_is_never_made_again(keys):
    before = fingerprints(keys)
    for kind in KeyKind:
        keys.make(kind)
    assert fingerprints(keys) == before


@pytest.mark.parametrize("damage", [b"", b"not a key"])
def test_a_file_that_holds_no_key_is_named_without_its_bytes(keys, damage):
    for kind in KeyKind:
        keys.path(kind).write_bytes(damage)
    for read in (lambda: keys.evidence_key(), lambda: tls_public(keys.tls_key()), lambda: flower_public(keys.flower_key_file())):
        with pytest.raises(HostError, match="PF906") as raised:
            read()
        assert "not a key" not in str(raised.value)


def test_a_key_that_others_may_read_is_refused(keys):
    for kind in KeyKind:
        keys.path(kind).chmod(0o640)
    for read in (lambda: keys.evidence_key(), lambda: keys.tls_key(), lambda: flower_public(keys.flower_key_file())):
        with pytest.raises(HostError, match="PF906"):
            read()

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pathfed_common.protocol.enrolment import request_fingerprint, same_fingerprint


def csr(key: ec.EllipticCurvePrivateKey) -> bytes:
    return x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


KEY = ec.generate_private_key(ec.SECP256R1())


def test_the_fingerprint_is_of_card_and_key_and_of_nothing_else():
    made = request_fingerprint(b"card", csr(KEY))
    # The signature in a request is another one each time; the key is not.
    assert request_fingerprint(b"card", csr(KEY)) == made
    assert request_fingerprint(b"card!", csr(KEY)) != made
    assert request_fingerprint(b"card", csr(ec.generate_private_key(ec.SECP256R1()))) != made


def test_the_fingerprint_can_be_read_aloud():
    groups = request_fingerprint(b"card", csr(KEY)).split(" ")
    assert [len(group) for group in groups] == [4] * 8
    assert set("".join(groups)) <= set("0123456789abcdef")


def test_how_people_write_it_does_not_matter_and_what_they_write_does():
    made = request_fingerprint(b"card", csr(KEY))
    for text in (made, made.upper(), made.replace(" ", ""), made.replace(" ", "-"), f" {made} "):
        assert same_fingerprint(text, made)
    for text in ("", made[:-1], made[:-5], made[5:] + " " + made[:4], made + "0"):
        assert not same_fingerprint(text, made)


def test_what_is_no_request_has_no_fingerprint():
    with pytest.raises(ValueError):
        request_fingerprint(b"card", b"no request")

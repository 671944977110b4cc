import base64
import datetime
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common import digest
from pathfed_common.errors import TransportError
from pathfed_common.ids import SiteName
from pathfed_common.protocol.invitation import Invitation, ca_pin, check_address, secret_hash
from pathfed_common.provenance.keys import SigningKey

SECRET = bytes(range(32))
MADE = Invitation(
    site=SiteName("hospital-north"),
    enrolment_address="pathfed.example.org:8445",
    secret=SECRET,
    ca_pin=digest.of_bytes(b"a key"),
    server_key=SigningKey.generate().public,
)


def encoded(raw: object) -> str:
    return "pathfed1." + base64.urlsafe_b64encode(digest.canonical(raw)).decode().rstrip("=")


def plain() -> dict[str, str]:
    return json.loads(base64.urlsafe_b64decode(MADE.to_text().removeprefix("pathfed1.") + "=="))


def test_an_invitation_reads_back_and_survives_what_mail_does_to_it():
    text = MADE.to_text()
    assert Invitation.from_text(text) == MADE
    assert Invitation.from_text(f"  {text[:60]}\r\n  {text[60:]}\n") == MADE
    assert text.split() == [text]
    assert text.isascii()


def test_the_secret_shows_in_no_repr_and_in_no_error():
    assert SECRET.hex() not in repr(MADE)
    assert repr(SECRET) not in repr(MADE)
    text = MADE.to_text()
    with pytest.raises(TransportError) as caught:
        Invitation.from_text(text[:-3])
    assert not any(text[at : at + 12] in str(caught.value) for at in range(9, len(text) - 12))


def test_only_a_hash_of_the_secret_is_for_the_server():
    assert secret_hash(SECRET) == digest.of_bytes(SECRET)
    assert secret_hash(SECRET) != secret_hash(bytes(32))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pathfed1.",
        "pathfed1",
        "hello",
        "pathfed2." + MADE.to_text()[9:],
        MADE.to_text()[9:],
        "pathfed1." + "A" * 5000,
        "pathfed1.é",
        "\x00",
    ],
)
def test_what_is_no_invitation_is_told_so(text):
    with pytest.raises(TransportError, match="PF411"):
        Invitation.from_text(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "../etc"},
        {"site": "North"},
        {"site": 1},
        {"enrolment_address": "host"},
        {"enrolment_address": "host:0"},
        {"enrolment_address": "host:080"},
        {"secret": "00"},
        {"secret": SECRET.hex().upper()},
        {"ca_pin": "sha256:00"},
        {"server_key": "ed25519:AAAA"},
        {"more": "x"},
    ],
)
def test_fields_that_do_not_fit_are_no_invitation(changes):
    with pytest.raises(TransportError, match="PF411"):
        Invitation.from_text(encoded({**plain(), **changes}))


@pytest.mark.parametrize("missing", ["site", "enrolment_address", "secret", "ca_pin", "server_key"])
def test_a_field_that_is_missing_is_no_invitation(missing):
    raw = plain()
    del raw[missing]
    with pytest.raises(TransportError, match="PF411"):
        Invitation.from_text(encoded(raw))


@given(st.text(max_size=300))
def test_no_text_makes_another_error(text):
    with pytest.raises(TransportError, match="PF411"):
        Invitation.from_text(text)


@given(st.integers(9, len(MADE.to_text()) - 1), st.sampled_from("ABCxyz019-_"))
def test_a_changed_letter_never_reads_as_the_same_invitation(at, letter):
    text = MADE.to_text()
    changed = text[:at] + letter + text[at + 1 :]
    try:
        read = Invitation.from_text(changed)
    except TransportError:
        return
    assert (read == MADE) == (changed == text)


def test_the_pin_is_of_the_key_and_survives_a_renewed_certificate():
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def certificate(key: ec.EllipticCurvePrivateKey, days: int) -> bytes:
        name = x509.Name([])
        start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(start)
        made = builder.not_valid_after(start + datetime.timedelta(days=days)).sign(key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM)

    key, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    assert ca_pin(certificate(key, 1)) == ca_pin(certificate(key, 9))
    assert ca_pin(certificate(key, 1)) != ca_pin(certificate(other, 1))
    with pytest.raises(ValueError):
        ca_pin(b"no certificate")


@pytest.mark.parametrize("text", ["127.0.0.1:1", "host.example:65535", "[::1]:443"])
def test_addresses_are_host_and_port(text):
    assert check_address(text) == text


@pytest.mark.parametrize(
    "text",
    ["", ":1", "host", "host:", "host:0", "host:65536", "host:-1", "host:1 ", "ho st:1", "https://host:1", "u@h:1", "h:" + "9" * 5000],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="HOST:PORT"):
        check_address(text)

"""Evidence keys: round trips, strict texts, and nothing private on show."""

import copy
import pickle

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.provenance.keys import SigningKey, VerifyKey, decode_base64

# RFC 8032, section 7.1, test 2: secret key, public key, message, signature.
_RFC_SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
_RFC_PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
_RFC_MESSAGE = bytes.fromhex("72")
_RFC_SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def test_signature_equals_rfc_8032_vector() -> None:
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(_RFC_SECRET))
    assert key.public == VerifyKey(_RFC_PUBLIC)
    assert key.sign(_RFC_MESSAGE) == _RFC_SIGNATURE
    assert VerifyKey(_RFC_PUBLIC).verify(_RFC_SIGNATURE, _RFC_MESSAGE)


def test_other_bytes_other_key_and_short_signature_do_not_verify() -> None:
    key, other = SigningKey.generate(), SigningKey.generate()
    signature = key.sign(b"data")
    assert key.public.verify(signature, b"data")
    assert not key.public.verify(signature, b"dataa")
    assert not other.public.verify(signature, b"data")
    assert not key.public.verify(signature[:-1], b"data")


def test_pem_and_text_round_trip() -> None:
    key = SigningKey.generate()
    assert SigningKey.from_pem(key.to_pem()).public == key.public
    assert VerifyKey.from_text(key.public.to_text()) == key.public
    assert VerifyKey.from_text(key.public.to_text()).key_id == key.key_id
    assert len({key.public, VerifyKey.from_text(key.public.to_text())}) == 1


def test_private_key_shows_nowhere() -> None:
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(_RFC_SECRET))
    assert repr(key) == str(key) == f"{key}" == "SigningKey(hidden)"
    for leak in (lambda: pickle.dumps(key), lambda: copy.deepcopy(key)):
        with pytest.raises(TypeError, match="not pickled"):
            leak()
    assert not hasattr(key, "__dict__")


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"pw")),
    ],
    ids=["empty", "broken", "other-kind", "encrypted"],
)
def test_unusable_pem_is_refused_without_showing_it(pem: bytes) -> None:
    with pytest.raises(HostError) as caught:
        SigningKey.from_pem(pem)
    assert caught.value.code == ErrorCode.KEY_FILE
    assert "AAAA" not in str(caught.value)


@pytest.mark.parametrize("change", ["", "x", "rsa:", "no-prefix", "short", "padding", "bits", "space"])
def test_other_spellings_of_a_key_are_refused(change: str) -> None:
    text = VerifyKey(_RFC_PUBLIC).to_text()
    body = text.removeprefix("ed25519:")
    spelled = {
        "": "",
        "x": text + "x",
        "rsa:": "rsa:" + body,
        "no-prefix": body,
        "short": "ed25519:" + body[:20],
        "padding": text.rstrip("="),
        # The last letter before the padding carries two unused bits: setting one leaves the same 32 bytes.
        "bits": text[:-2] + chr(ord(text[-2]) + 1) + "=",
        "space": text[:20] + " " + text[20:],
    }[change]
    with pytest.raises(ValueError, match=r"ed25519|base64|bytes"):
        VerifyKey.from_text(spelled)


def test_base64_has_one_form() -> None:
    assert decode_base64("aGk=") == b"hi"
    for text in ("aGk", "aGl=", "aGk=\n", "aG k=", "aGk==", "-_8=", "é"):
        with pytest.raises(ValueError, match="base64"):
            decode_base64(text)


def test_a_key_under_a_passphrase_opens_with_it_alone() -> None:
    key = SigningKey.generate()
    pem = key.to_pem(b"correct horse")
    assert b"ENCRYPTED" in pem
    assert SigningKey.from_pem(pem, b"correct horse").public == key.public
    for passphrase in (None, b"wrong", b""):
        with pytest.raises(HostError, match="PF906"):
            SigningKey.from_pem(pem, passphrase)
    with pytest.raises(HostError, match="PF906"):
        SigningKey.from_pem(key.to_pem(), b"not needed")
    with pytest.raises(ValueError):
        key.to_pem(b"")

"""OpenSSF model signatures, made and checked with a key and without a network. Pure.

The files of a folder are hashed one by one; an in-toto statement lists them, a DSSE envelope signs it with an elliptic-curve key, and a
Sigstore bundle wraps that. `model_signing verify key` of the OpenSSF reads what `sign_model` writes (a test runs it), so a reader of an
encoder needs nothing of ours to see that its files are the released ones. Evidence keys are Ed25519, which the format does not have: the
signing key is one of its own, and the release's manifest, which the evidence key signs, names it.

Reading is strict: bytes other than those that `sign_model` writes are refused.

Source: https://github.com/sigstore/model-transparency, tag v1.1.1, src/model_signing/_signing/signing.py.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.errors import ErrorCode, HostError, ProvenanceError
from pathfed_common.provenance.dsse import pae
from pathfed_common.provenance.keys import decode_base64
from pathfed_common.provenance.statement import IN_TOTO_TYPE, STATEMENT_TYPE

PREDICATE_TYPE = "https://model_signing/signature/v1.0"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"

_SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []}
#: RFC 6979: the same files and key give the same bytes.
_ALGORITHM = ec.ECDSA(SHA256(), deterministic_signing=True)


class ModelKey:
    """A private key on the curve P-256 that signs models. Nothing of it shows in `repr` or pickles."""

    __slots__ = ("_key",)

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        """Wrap a private key; use `generate` or `from_pem`."""
        self._key = key

    @classmethod
    def generate(cls) -> Self:
        """A new key from the operating system's random source."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def from_pem(cls, pem: bytes) -> Self:
        """Read a key from unencrypted PKCS #8 PEM.

        Raises:
            HostError: PF906, not an unencrypted P-256 private key. The message shows nothing of the bytes.
        """
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != ec.SECP256R1.name:
            raise HostError(ErrorCode.KEY_FILE, "a model key is an unencrypted P-256 private key in PEM form, and this is not")
        return cls(key)

    def to_pem(self) -> bytes:
        """Unencrypted PKCS #8 PEM. Write it with `files.write_atomic(..., secret=True)` and nowhere else."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def public_pem(self) -> bytes:
        """The public half, PEM."""
        return _pem(self._key.public_key())

    def sign(self, data: bytes) -> bytes:
        """ECDSA signature (DER) of these bytes."""
        return self._key.sign(data, _ALGORITHM)

    def __repr__(self) -> str:
        return "ModelKey(hidden)"

    def __reduce__(self) -> str:
        raise TypeError("a ModelKey is not pickled or copied")


@dataclass(frozen=True)
class SignedModel:
    """What a model signature says.

    Attributes:
        name: the model's name.
        files: digest of every file in the model's folder, by its place there.
    """

    name: str
    files: Mapping[str, Digest]


def sign_model(model: SignedModel, key: ModelKey) -> bytes:
    """The signature file's bytes. The same model and key give the same bytes."""
    payload = _payload(model)
    return _bundle(payload, key.sign(pae(IN_TOTO_TYPE, payload)), key.public_pem)


def open_model_signature(data: bytes, public_pem: bytes, *, where: str = "model signature") -> SignedModel:
    """Verify a signature file and read what it says.

    Args:
        data: the file's bytes.
        public_pem: the signer's public key.
        where: what to call the file in errors.

    Raises:
        ProvenanceError: PF617, not signed by this key, not a model signature, or a key that is not P-256 in its one PEM form.
    """
    try:
        public = _public_key(public_pem)
        envelope = json.loads(data.decode("ascii"))["dsseEnvelope"]
        payload, signature = decode_base64(envelope["payload"]), decode_base64(envelope["signatures"][0]["sig"])
        if _bundle(payload, signature, public_pem) != data:
            raise ValueError("not in the form that pathfed writes, or naming another key")
        public.verify(signature, pae(IN_TOTO_TYPE, payload), ec.ECDSA(SHA256()))
        model = _read_payload(json.loads(payload.decode("ascii")))
        if _payload(model) != payload:
            raise ValueError("the statement is not in the form that pathfed writes")
    except InvalidSignature:
        raise _refused("the signature does not verify", where) from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise _refused(f"not a model signature: {error}", where) from None
    return model


def _payload(model: SignedModel) -> bytes:
    hashes = [(name, model.files[name].removeprefix("sha256:")) for name in sorted(model.files)]
    root = hashlib.sha256(b"".join(bytes.fromhex(value) for _, value in hashes)).hexdigest()
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": model.name, "digest": {"sha256": root}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": _SERIALIZATION,
            "resources": [{"name": name, "algorithm": "sha256", "digest": value} for name, value in hashes],
        },
    }
    return digest.canonical(statement)


def _read_payload(raw: Any) -> SignedModel:
    files = {entry["name"]: digest.parse("sha256:" + entry["digest"]) for entry in raw["predicate"]["resources"]}
    return SignedModel(raw["subject"][0]["name"], files)


def _bundle(payload: bytes, signature: bytes, public_pem: bytes) -> bytes:
    sealed, signed = (base64.b64encode(part).decode("ascii") for part in (payload, signature))
    envelope = {"payload": sealed, "payloadType": IN_TOTO_TYPE, "signatures": [{"sig": signed, "keyid": ""}]}
    material = {"publicKey": {"hint": hashlib.sha256(public_pem).hexdigest()}, "tlogEntries": []}
    return digest.canonical({"mediaType": BUNDLE_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope})


def _public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    key = load_pem_public_key(pem)
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != ec.SECP256R1.name or _pem(key) != pem:
        raise ValueError("the key is not a P-256 public key in its one PEM form")
    return key


def _pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _refused(what: str, where: str) -> ProvenanceError:
    return ProvenanceError(ErrorCode.MODEL_SIGNATURE, what, where=where)

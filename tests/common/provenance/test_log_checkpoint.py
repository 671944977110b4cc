"""Checkpoints and log proofs: real checkpoints, one encoding each, and what is not signed by the log."""

import base64
import hashlib
from dataclasses import replace

import pytest

from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import SiteName
from pathfed_common.provenance import log_checkpoint, merkle, note
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_checkpoint import Checkpoint, LogProof, log_key, open_checkpoint, open_proof, sign_checkpoint, site_key
from pathfed_common.provenance.merkle import EMPTY_ROOT, MemoryNodeStore
from pathfed_common.provenance.note import Note, NoteKey

ORIGIN = "consortium.example/run-1"
_LEAVES = [b"leaf %d" % index for index in range(11)]

# https://sum.golang.org/latest on 2024-09-23, and the key that Go's source carries (cmd/go/internal/modfetch/key.go).
_GO_CHECKPOINT = (
    "go.sum database tree\n30055305\nmXfgRcJ0bG0j3CPdKwgGWtUzBUbX67saZGRmFuJGGsM=\n\n"
    "— sum.golang.org Az3grpgEild5qw7+5dtV13Kf1C2Xurm8q4fhdxvcsDHnqNTaxL2AFjBY+2TyGKevucFcAAlWFJJYle3EJlDCrQ+y3A8=\n"
).encode()
_GO_KEY = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"
_TEXT = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture(scope="module")
def store() -> MemoryNodeStore:
    nodes = MemoryNodeStore()
    merkle.append(nodes, 0, [merkle.leaf_hash(leaf) for leaf in _LEAVES])
    return nodes


@pytest.fixture(scope="module")
def proof(key: SigningKey, store: MemoryNodeStore) -> LogProof:
    checkpoint = Checkpoint(origin=ORIGIN, size=11, root=merkle.root(store, 11))
    return LogProof(index=4, hashes=merkle.inclusion_proof(store, 4, 11), checkpoint=sign_checkpoint(checkpoint, key), extra=b"\x00x")


def test_a_public_checkpoint_verifies() -> None:
    signed = Note.from_bytes(_GO_CHECKPOINT)
    note.verify(signed, [NoteKey.from_vkey(_GO_KEY)])
    found = Checkpoint.from_text(signed.text)
    assert (found.origin, found.size, found.extensions) == ("go.sum database tree", 30055305, ())
    assert found.to_text() == signed.text
    # That log's origin is not its key's name; ours are the same, and another is refused.
    with pytest.raises(ProvenanceError, match="another log"):
        open_checkpoint(signed, NoteKey.from_vkey(_GO_KEY))


def test_the_specifications_checkpoint_comes_back_as_it_was() -> None:
    found = Checkpoint.from_text(_TEXT)
    assert found == Checkpoint(
        origin="example.com/behind-the-sofa", size=20852163, root=base64.b64decode("CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=")
    )
    assert found.to_text() == _TEXT
    extended = Checkpoint.from_text(_TEXT + "one\ntwo, three\n")
    assert extended.extensions == ("one", "two, three")
    assert extended.to_text() == _TEXT + "one\ntwo, three\n"


def test_an_empty_log_has_a_checkpoint() -> None:
    empty = Checkpoint(origin=ORIGIN, size=0, root=EMPTY_ROOT)
    assert empty.to_text() == f"{ORIGIN}\n0\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n"
    assert Checkpoint.from_text(empty.to_text()) == empty


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "a\n1\n",
        _TEXT[:-1],
        "\n" + _TEXT.partition("\n")[2],
        _TEXT.replace("20852163", "020852163"),
        _TEXT.replace("20852163", "+20852163"),
        _TEXT.replace("20852163", "-1"),
        _TEXT.replace("20852163", "20_852"),
        _TEXT.replace("20852163", " 20852163"),
        _TEXT.replace("20852163", "\u0662"),
        _TEXT.replace("20852163", ""),
        _TEXT.replace("20852163", str(2**63)),
        _TEXT.replace("20852163", "9" * 5000),
        _TEXT.replace("2I=", "2J="),
        _TEXT.replace("2I=", "2I"),
        _TEXT.replace("CsUYapGGPo4d", "CsUY"),
        _TEXT + "\n",
        _TEXT + "one\n\ntwo\n",
        _TEXT + "tab\t\n",
        _TEXT.replace("\n", "\r\n"),
    ],
)
def test_texts_that_are_no_checkpoint_are_refused(text: str) -> None:
    with pytest.raises(ProvenanceError) as caught:
        Checkpoint.from_text(text)
    assert caught.value.code == ErrorCode.RECORD_CHANGED


@pytest.mark.parametrize(
    "change",
    [
        {"origin": ""},
        {"origin": "a\nb"},
        {"origin": "a\tb"},
        {"size": -1},
        {"size": 2**63},
        {"root": b"short"},
        {"extensions": ("",)},
        {"extensions": ("a\nb",)},
    ],
)
def test_values_that_are_no_checkpoint_are_not_made(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"checkpoint|lines|note"):
        replace(Checkpoint(origin=ORIGIN, size=1, root=EMPTY_ROOT), **change)  # type: ignore[arg-type]


def test_checkpoints_are_opened_with_the_logs_key_alone(key: SigningKey) -> None:
    checkpoint = Checkpoint(origin=ORIGIN, size=11, root=EMPTY_ROOT)
    signed = sign_checkpoint(checkpoint, key)
    assert open_checkpoint(signed, log_key(ORIGIN, key.public)) == checkpoint
    for other in (log_key(ORIGIN, SigningKey.generate().public), log_key("consortium.example/run-2", key.public)):
        with pytest.raises(ProvenanceError, match="PF602"):
            open_checkpoint(signed, other)
    # A site's cosignature is not the log's signature, even by the same key under the log's own name.
    line = note.cosign(checkpoint.to_text(), ORIGIN, key, at=1)
    with pytest.raises(ProvenanceError, match="PF602"):
        open_checkpoint(Note(signed.text, (line,)), log_key(ORIGIN, key.public))


def test_a_checkpoint_under_another_logs_name_is_refused(key: SigningKey) -> None:
    foreign = Checkpoint(origin="consortium.example/run-2", size=11, root=EMPTY_ROOT).to_text()
    signed = Note(foreign, (note.sign(foreign, ORIGIN, key),))
    with pytest.raises(ProvenanceError, match="another log"):
        open_checkpoint(signed, log_key(ORIGIN, key.public))


@pytest.mark.parametrize("origin", ["", "two words", "a+b"])
def test_origins_that_cannot_name_a_key_are_not_signed(origin: str, key: SigningKey) -> None:
    with pytest.raises(ValueError, match=r"name|origin"):
        log_key(origin, key.public)
    if origin:
        with pytest.raises(ValueError, match="name"):
            sign_checkpoint(Checkpoint(origin=origin, size=1, root=EMPTY_ROOT), key)


def test_a_site_cosigns_under_its_own_name(key: SigningKey) -> None:
    site, own = SiteName("charite"), SigningKey.generate()
    checkpoint = Checkpoint(origin=ORIGIN, size=11, root=EMPTY_ROOT)
    line = log_checkpoint.cosign_checkpoint(checkpoint, site, own, at=1_700_000_000)
    known = site_key(ORIGIN, site, own.public)
    (found,) = note.verify(sign_checkpoint(checkpoint, key).with_signature(line), [known])
    assert (found.key, found.timestamp) == (known, 1_700_000_000)
    assert line.name == "consortium.example/run-1/charite"


def test_a_proof_comes_back_and_opens(proof: LogProof, key: SigningKey) -> None:
    data = proof.to_bytes()
    assert LogProof.from_bytes(data) == proof
    assert data.startswith(b"c2sp.org/tlog-proof@v1\nextra AHg=\nindex 4\n")
    assert open_proof(proof, merkle.leaf_hash(_LEAVES[4]), log_key(ORIGIN, key.public)).size == 11
    for leaf, found in ((b"other", proof), (_LEAVES[4], replace(proof, index=5)), (_LEAVES[4], replace(proof, hashes=proof.hashes[:-1]))):
        with pytest.raises(ProvenanceError, match="PF601"):
            open_proof(found, merkle.leaf_hash(leaf), log_key(ORIGIN, key.public))


def test_proofs_have_the_bytes_of_another_implementation(key: SigningKey) -> None:
    # As TestMarshal of https://github.com/transparency-dev/formats/blob/0b850f1a7b4a5b70deeacac6535e4b8023809d21/proof/tlog_proof_test.go
    first, second = (hashlib.sha256(text).digest() for text in (b"hash1", b"hash2"))
    b64 = [base64.b64encode(raw).decode() for raw in (first, second, b"extra information")]
    signed = sign_checkpoint(Checkpoint(origin=ORIGIN, size=1, root=EMPTY_ROOT), key)
    tail = signed.to_bytes()
    for found, expected in (
        (LogProof(index=5, hashes=(first, second), checkpoint=signed), f"c2sp.org/tlog-proof@v1\nindex 5\n{b64[0]}\n{b64[1]}\n\n"),
        (
            LogProof(index=10, hashes=(first,), checkpoint=signed, extra=b"extra information"),
            f"c2sp.org/tlog-proof@v1\nextra {b64[2]}\nindex 10\n{b64[0]}\n\n",
        ),
        (LogProof(index=0, hashes=(), checkpoint=signed), "c2sp.org/tlog-proof@v1\nindex 0\n\n"),
    ):
        assert found.to_bytes() == expected.encode() + tail
        assert LogProof.from_bytes(expected.encode() + tail) == found


@pytest.mark.parametrize(
    "head",
    [
        # As TestUnmarshalErrors of the same.
        "wrong-header\nindex 0\n",
        "c2sp.org/tlog-proof@v1\nextra !!notbase64!!\nindex 0\n",
        "c2sp.org/tlog-proof@v1\n",
        "c2sp.org/tlog-proof@v1\nindex notanumber\n",
        "c2sp.org/tlog-proof@v1\nindex -5\n",
        "c2sp.org/tlog-proof@v1\nindex 0\n!!notbase64!!\n",
        "c2sp.org/tlog-proof@v1\nindex 0\n" + "A" * 86 + "==\n",
        # Ours.
        "c2sp.org/tlog-proof@v1\nindex 00\n",
        "c2sp.org/tlog-proof@v1\nindex\n",
        "c2sp.org/tlog-proof@v1\nextra AHg=\n",
        "c2sp.org/tlog-proof@v1\nindex 0\nextra AHg=\n",
        "c2sp.org/tlog-proof@v1\nextra AHg\nindex 0\n",
        "c2sp.org/tlog-proof@v1\nindex 0\nindex 1\n",
        "c2sp.org/tlog-proof@v2\nindex 0\n",
        "c2sp.org/tlog-proof@v1\nindex 9223372036854775808\n",
        "c2sp.org/tlog-proof@v1\nindex 0\n" + (base64.b64encode(EMPTY_ROOT).decode() + "\n") * 64,
        "",
    ],
)
def test_malformed_proofs_are_refused(head: str, proof: LogProof) -> None:
    with pytest.raises(ProvenanceError, match="PF601"):
        LogProof.from_bytes(head.encode() + b"\n" + proof.checkpoint.to_bytes())


def test_a_change_of_any_byte_of_a_proof_is_found(proof: LogProof, key: SigningKey) -> None:
    data, leaf, known = proof.to_bytes(), merkle.leaf_hash(_LEAVES[4]), log_key(ORIGIN, key.public)
    extra = data.index(b"extra ") + len(b"extra ")
    for place in range(len(data)):
        for flip in (0x01, 0x20, 0x80):
            changed = bytearray(data)
            changed[place] ^= flip
            if extra <= place < extra + 4:
                continue  # Nothing authenticates the extra bytes, and they say so.
            with pytest.raises(ProvenanceError):
                open_proof(LogProof.from_bytes(bytes(changed)), leaf, known)

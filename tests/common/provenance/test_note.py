"""Signed notes and cosignatures: the specification's and Go's vectors, strict reading, and which keys count."""

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.provenance import note
from pathfed_common.provenance.keys import SigningKey, VerifyKey
from pathfed_common.provenance.note import KeyKind, Note, NoteKey, NoteSignature

# https://github.com/C2SP/C2SP/blob/5ba5ee830903e91240fc6f9f3a7a9293d49e69c9/signed-note.md, "Example" of verifier keys.
_SPEC_KEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
_SPEC_NOTE = (
    "This is an example message.\n\n"
    "— example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
).encode()

# https://github.com/golang/mod/blob/fe2ec04f7c3c3aa6fad97631aafcff6e49e2d1db/sumdb/note/note_test.go
_PETER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
_PETER_SEED = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
_ENOCH = "EnochRoot+af0cfe78+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop"
_GO_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
_PETER_LINE = "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
_ENOCH_LINE = "— EnochRoot rwz+eBzmZa0SO3NbfRGzPCpDckykFXSdeX+MNtCOXm2/5n2tiOHp+vAF1aGrQ5ovTG01oOTGwnWLox33WWd1RvMc+QQ=\n"

# A checkpoint of a public staging log with cosignatures of public witnesses; the log's first line is of a kind (0x05) not known here.
# As the tests of the public Python package tlog_scales freeze it; verifier keys as their operators publish them, that of remora also in
# https://github.com/transparency-dev/formats/blob/0b850f1a7b4a5b70deeacac6535e4b8023809d21/note/note_cosigv1_test.go
_PUBLIC_NOTE = """\
arche2025h1.staging.ct.transparency.dev
1432088532
U7WM79jrzyhGZ5/GUBTpM7NzwdyfFx61t3RovgcC4Ro=

— arche2025h1.staging.ct.transparency.dev zTM8sQAAAZ5W0WdjBAMARjBEAiBjW5IQf9pvsYLfQFX6hoGREPMHbdQ3urbllzalApkptQIgIpwtEroeW2BXaHAI4kJXFbon5Ch9MNL5zRNZ55lvGt0=
— arche2025h1.staging.ct.transparency.dev ui8GwCF1+kWqZrxGdhj4aX3gcw7XUlXQQabg/27lefwhUkzbC3NygNI75MdhL1bfTW9g8Ei59RA23oHP7Ry1k3ZFWwQ=
— witness1.smartit.nu/witness1 pIyCDwAAAABqEiEghIp82KWebrw7/oHQwlTAm3g2RKS4+eebl8eO0WH+/iEcxZ75W3u5hNI7TOQtmJbqmNWVuE0tgh0XwzdZsDsUAQ==
— remora.n621.de 2net5wAAAABqEiEgPlfF3V06o0Y+fHM+J5J9s27wgxxcOVSpZ/2g/KSiXCg9DEZI+aVCIobWX9sXTynk5XeU/zZ0WBxtqB0DrAWfBw==
— witness.stagemole.eu Z/euoAAAAABqEiEgw0i+7g2ENfDAWHmtRzCfKTHSDwYDJA2NmKeGi9Y8FtEyOUvVr+AJmIY/2TUFucgKi7lI7cUiOvKFYe/TmN9DAg==
""".encode()  # noqa: E501
_PUBLIC_LOG = "arche2025h1.staging.ct.transparency.dev+ba2f06c0+AU0vHmlGCS/PdN8b2OaGmKprLI8HKM+dJ472xgFYh15f"
_PUBLIC_WITNESSES = [
    "remora.n621.de+da77ade7+BOvN63jn/bLvkieywe8R6UYAtVtNbZpXh34x7onlmtw2",
    "witness1.smartit.nu/witness1+a48c820f+BPSFWg9G6KPiO7QPryYO5Xq4oYJJ+kAvLKLSimDhoxMO",
    "witness.stagemole.eu+67f7aea0+BEqSG3yu9YrmcM3BHvQYTxwFj3uSWakQepafafpUqklv",
]


def _key(vkey: str) -> NoteKey:
    return NoteKey.from_vkey(vkey)


def _refused(data: bytes | Note, *keys: NoteKey) -> str:
    with pytest.raises(ProvenanceError) as caught:
        note.verify(data if isinstance(data, Note) else Note.from_bytes(data), keys)
    assert caught.value.code == ErrorCode.RECORD_SIGNATURE
    return str(caught.value)


@pytest.fixture(scope="module")
def peter() -> SigningKey:
    return SigningKey(Ed25519PrivateKey.from_private_bytes(_PETER_SEED))


def test_the_specifications_note_verifies() -> None:
    (found,) = note.verify(Note.from_bytes(_SPEC_NOTE), [_key(_SPEC_KEY)])
    assert found.key.name == "example.com/foo"
    assert found.timestamp is None


@pytest.mark.parametrize("vkey", [_SPEC_KEY, _PETER, _ENOCH, _PUBLIC_LOG, *_PUBLIC_WITNESSES])
def test_verifier_keys_come_back_as_they_were(vkey: str) -> None:
    key = _key(vkey)
    assert key.to_vkey() == vkey
    assert key.key_id.hex() == vkey.split("+")[1]
    assert key.kind is (KeyKind.COSIGNATURE if vkey in _PUBLIC_WITNESSES else KeyKind.NOTE)


def test_mangled_verifier_keys_are_refused() -> None:
    # As Go's TestNewVerifier: every part of the text, every byte one higher, a wrong length and an unknown kind.
    parts = (_PETER[begin:end] for begin in range(len(_PETER)) for end in range(begin + 1, len(_PETER) + 1))
    mangled = [text for text in parts if text != _PETER]
    mangled += [_PETER[:place] + chr(ord(_PETER[place]) + 1) + _PETER[place + 1 :] for place in range(len(_PETER))]
    mangled += ["PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY=="]
    mangled += ["PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW", "", "a+b", "a+00000000+"]
    for text in mangled:
        with pytest.raises(ValueError, match=r"."):
            _key(text)


def test_signing_gives_gos_bytes(peter: SigningKey) -> None:
    signed = Note(_GO_TEXT, (note.sign(_GO_TEXT, "PeterNeumann", peter),))
    assert signed.to_bytes() == (_GO_TEXT + "\n" + _PETER_LINE).encode()
    assert NoteKey("PeterNeumann", KeyKind.NOTE, peter.public).to_vkey() == _PETER
    stale = NoteSignature("PeterNeumann", bytes.fromhex("c74f20a3"), b"stale")
    assert Note(_GO_TEXT, (stale,)).with_signature(signed.signatures[0]) == signed


def test_unknown_keys_are_kept_and_not_counted() -> None:
    signed = Note.from_bytes((_GO_TEXT + "\n" + _PETER_LINE + _ENOCH_LINE).encode())
    assert [found.key.name for found in note.verify(signed, [_key(_PETER)])] == ["PeterNeumann"]
    assert [found.key.name for found in note.verify(signed, [_key(_ENOCH), _key(_PETER)])] == ["PeterNeumann", "EnochRoot"]
    assert "no known key" in _refused(signed)
    assert "no known key" in _refused(signed, _key(_SPEC_KEY))
    assert signed.to_bytes().decode().endswith(_ENOCH_LINE)


def test_a_key_of_the_same_name_or_id_alone_does_not_count(peter: SigningKey) -> None:
    signed = Note.from_bytes((_GO_TEXT + "\n" + _PETER_LINE).encode())
    assert "no known key" in _refused(signed, NoteKey("CarmenSandiego", KeyKind.NOTE, peter.public))
    assert "no known key" in _refused(signed, NoteKey("PeterNeumann", KeyKind.COSIGNATURE, peter.public))
    assert "no known key" in _refused(signed, NoteKey("PeterNeumann", KeyKind.NOTE, SigningKey.generate().public))
    renamed = Note.from_bytes((_GO_TEXT + "\n" + _PETER_LINE.replace("Peter", "Piter")).encode())
    assert "no known key" in _refused(renamed, _key(_PETER))


def test_a_known_keys_bad_line_condemns_the_note(peter: SigningKey) -> None:
    good = Note.from_bytes((_GO_TEXT + "\n" + _PETER_LINE + _ENOCH_LINE).encode())
    other = note.sign("another text\n", "PeterNeumann", peter)
    bad = Note(_GO_TEXT, (*good.signatures, other))
    assert "does not verify" in _refused(bad, _key(_PETER), _key(_ENOCH))
    assert [found.key.name for found in note.verify(bad, [_key(_ENOCH)])] == ["EnochRoot"]


def test_a_key_whose_id_was_made_to_collide_neither_helps_nor_harms(monkeypatch: pytest.MonkeyPatch, peter: SigningKey) -> None:
    twin = SigningKey.generate()
    monkeypatch.setattr(NoteKey, "key_id", property(lambda self: b"same"))
    keys = [NoteKey("PeterNeumann", KeyKind.NOTE, key.public) for key in (twin, peter)]
    signed = Note(_GO_TEXT, (note.sign(_GO_TEXT, "PeterNeumann", peter),))
    assert [found.key for found in note.verify(signed, keys)] == [keys[1]]
    assert "does not verify" in _refused(signed, keys[0])


def test_public_cosignatures_verify() -> None:
    signed = Note.from_bytes(_PUBLIC_NOTE)
    assert signed.to_bytes() == _PUBLIC_NOTE
    found = note.verify(signed, [_key(vkey) for vkey in (_PUBLIC_LOG, *_PUBLIC_WITNESSES)])
    assert {seen.key.name: seen.timestamp for seen in found} == {
        "arche2025h1.staging.ct.transparency.dev": None,
        "witness1.smartit.nu/witness1": 1779573024,
        "remora.n621.de": 1779573024,
        "witness.stagemole.eu": 1779573024,
    }


@pytest.mark.parametrize("vkey", _PUBLIC_WITNESSES)
def test_a_cosignature_covers_text_and_time(vkey: str) -> None:
    signed = Note.from_bytes(_PUBLIC_NOTE)
    (line,) = [line for line in signed.signatures if line.name == _key(vkey).name]
    note.verify(Note(signed.text, (line,)), [_key(vkey)])
    for place in range(len(line.signature)):
        changed = bytearray(line.signature)
        changed[place] ^= 1
        _refused(Note(signed.text, (NoteSignature(line.name, line.key_id, bytes(changed)),)), _key(vkey))
    for signature in (line.signature[:-1], line.signature + b"\x00", line.signature[8:], b"\xff" * 72):
        _refused(Note(signed.text, (NoteSignature(line.name, line.key_id, signature),)), _key(vkey))
    _refused(Note(signed.text + "extension\n", (line,)), _key(vkey))


def test_a_note_signature_is_no_cosignature_and_the_other_way_round(peter: SigningKey) -> None:
    text = "log\n1\nroot\n"
    plain, timed = note.sign(text, "p", peter), note.cosign(text, "p", peter, at=1679315147)
    assert plain.key_id != timed.key_id
    kinds = [NoteKey("p", kind, peter.public) for kind in KeyKind]
    both = Note(text, (plain, timed))
    assert [(found.key.kind, found.timestamp) for found in note.verify(both, kinds)] == [
        (KeyKind.NOTE, None),
        (KeyKind.COSIGNATURE, 1679315147),
    ]
    swapped = Note(text, (NoteSignature("p", timed.key_id, bytes(8) + plain.signature),))
    _refused(swapped, *kinds)
    # The message as tlog-cosignature spells it, put together here by hand.
    assert timed.signature[:8] == (1679315147).to_bytes(8, "big")
    assert peter.public.verify(timed.signature[8:], b"cosignature/v1\ntime 1679315147\nlog\n1\nroot\n")


@pytest.mark.parametrize(
    "data",
    [
        # Go's badMsgs.
        _GO_TEXT,
        _GO_TEXT + "\n",
        _GO_TEXT + "\n" + _PETER_LINE[:-1],
        "\x01" + _GO_TEXT + "\n" + _PETER_LINE,
        _GO_TEXT + "\n" + _PETER_LINE.replace("PeterNeumann", "Bad Name"),
        _GO_TEXT + "\n" + _PETER_LINE + "Unexpected line.\n",
        # Ours.
        "",
        "\n\n\n",
        _GO_TEXT.rstrip("\n") + "\n" + _PETER_LINE,
        _GO_TEXT.replace("\n", "\r\n") + "\n" + _PETER_LINE,
        _GO_TEXT + "\n" + _PETER_LINE.replace("— ", "- "),
        _GO_TEXT + "\n" + _PETER_LINE.replace("PeterNeumann ", "PeterNeumann  "),
        _GO_TEXT + "\n" + _PETER_LINE.replace("PeterNeumann", "Peter+Neumann"),
        _GO_TEXT + "\n" + _PETER_LINE.replace("PeterNeumann", "Peter\u00a0Neumann"),
        _GO_TEXT + "\n" + _PETER_LINE.replace("PeterNeumann", ""),
        _GO_TEXT + "\n" + _PETER_LINE.replace("AM=", "AN="),
        _GO_TEXT + "\n" + _PETER_LINE.replace("AM=", "AM"),
        _GO_TEXT + "\n" + _PETER_LINE.replace("/", "_"),
        _GO_TEXT + "\n" + "— PeterNeumann x08gow==\n",
        _GO_TEXT + "\n" + "— PeterNeumann x08g\n",
        _GO_TEXT + "\n" + _PETER_LINE * 1025,
        "x" * (1 << 20) + "\n\n" + _PETER_LINE,
    ],
)
def test_malformed_notes_are_refused(data: str) -> None:
    assert "not a signed note" in _refused(data.encode(), _key(_PETER))


def test_bytes_that_are_not_unicode_are_refused() -> None:
    _refused(b"\xff" + (_GO_TEXT + "\n" + _PETER_LINE).encode(), _key(_PETER))


def test_a_text_may_have_empty_lines_and_any_letters() -> None:
    key = SigningKey.generate()
    for text in ("a\n\nb\n", "\n", "\n\n\n", "è subito sera.\n", "— a b\n\n— c d\n"):
        signed = Note(text, (note.sign(text, "k", key),))
        assert Note.from_bytes(signed.to_bytes()) == signed
        note.verify(Note.from_bytes(signed.to_bytes()), [NoteKey("k", KeyKind.NOTE, key.public)])


def test_many_signatures_are_accepted() -> None:
    keys = [SigningKey.generate() for _ in range(120)]
    signed = Note(_GO_TEXT, tuple(note.cosign(_GO_TEXT, f"site-{n}", key, at=n) for n, key in enumerate(keys)))
    known = [NoteKey(f"site-{n}", KeyKind.COSIGNATURE, key.public) for n, key in enumerate(keys)]
    assert len(note.verify(Note.from_bytes(signed.to_bytes()), known)) == 120


@pytest.mark.parametrize("text", ["", "no newline", "tab\t\n", "bell\x07\n", "lone \ud800\n"])
def test_texts_that_are_no_notes_are_not_signed(text: str, peter: SigningKey) -> None:
    with pytest.raises(ValueError, match=r"note's text|surrogates"):
        note.sign(text, "k", peter)
    with pytest.raises(ValueError, match=r"note's text|surrogates"):
        note.cosign(text, "k", peter, at=1)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb", "a\u2003b", "\ud800"])
def test_names_that_are_no_names_are_not_used(name: str, peter: SigningKey) -> None:
    with pytest.raises(ValueError, match=r"name|surrogates"):
        note.sign(_GO_TEXT, name, peter)


def test_a_cosignature_of_a_time_out_of_bounds_is_refused(peter: SigningKey) -> None:
    key = NoteKey("p", KeyKind.COSIGNATURE, peter.public)
    for at, counts in ((2**63 - 1, True), (2**63, False)):
        signature = at.to_bytes(8, "big") + peter.sign(f"cosignature/v1\ntime {at}\n{_GO_TEXT}".encode())
        signed = Note(_GO_TEXT, (NoteSignature("p", key.key_id, signature),))
        if counts:
            assert note.verify(signed, [key])[0].timestamp == at
        else:
            _refused(signed, key)


@pytest.mark.parametrize("at", [-1, 2**63])
def test_times_out_of_bounds_are_not_cosigned(at: int, peter: SigningKey) -> None:
    with pytest.raises(ValueError, match="time"):
        note.cosign(_GO_TEXT, "k", peter, at=at)


@given(place=st.integers(0, len(_PUBLIC_NOTE) - 1), flip=st.sampled_from([0x01, 0x02, 0x20, 0x80]))
def test_no_change_of_a_byte_keeps_all_signatures(place: int, flip: int) -> None:
    changed = bytearray(_PUBLIC_NOTE)
    changed[place] ^= flip
    keys = [_key(vkey) for vkey in (_PUBLIC_LOG, *_PUBLIC_WITNESSES)]
    try:
        signed = Note.from_bytes(bytes(changed))
        assert signed.to_bytes() == changed
        found = note.verify(signed, keys)
    except ProvenanceError:
        return
    # Only names and ids can change without condemning the note: those lines are then of keys not known. Or the line of a kind not known.
    whole = note.verify(Note.from_bytes(_PUBLIC_NOTE), keys)
    assert set(found) <= set(whole)
    assert signed.text == Note.from_bytes(_PUBLIC_NOTE).text
    assert len(found) < len(whole) or signed.signatures[1:] == Note.from_bytes(_PUBLIC_NOTE).signatures[1:]


def test_a_raw_key_is_the_specifications_encoding() -> None:
    assert _key(_SPEC_KEY).key == VerifyKey(bytes.fromhex("e932791ae6e7a840a46164c904786426d5e7821dd8b29a00d61cae72afdd4da4"))

"""Leaves: one canonical form for each kind, and nothing else is read."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance import merkle
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.log_leaves import (
    KINDS,
    AnyLeaf,
    EncoderCommitted,
    KeyRotated,
    PlanApproved,
    PlanDecided,
    PlanPublished,
    Released,
    SiteAdmitted,
    SiteRevoked,
    StatementLogged,
    read_leaf,
    rotate_key,
)
from pathfed_common.units import UtcSeconds

_SITE, _RUN, _AT = SiteName("charite"), RunName("run-1"), UtcSeconds(1.7e9)
_SOME = digest.of_bytes(b"some")
_OLD, _NEW = SigningKey.generate(), SigningKey.generate()
LEAVES: list[AnyLeaf] = [
    SiteAdmitted(site=_SITE, evidence_key=_OLD.public, at=_AT),
    SiteRevoked(site=_SITE, at=_AT),
    rotate_key(_SITE, _OLD, _NEW, _AT),
    PlanPublished(plan=_SOME),
    PlanApproved(site=_SITE, plan=_SOME, approval=digest.of_bytes(b"approval")),
    PlanDecided(site=_SITE, plan=_SOME, decision=digest.of_bytes(b"rejection")),
    StatementLogged(site=_SITE, run=_RUN, round_index=1, statement=_SOME),
    EncoderCommitted(run=_RUN, round_index=0, state=_SOME),
    Released(run=_RUN, release=_SOME),
]
_IDS = [leaf.kind for leaf in LEAVES]


def _refused(data: bytes) -> None:
    with pytest.raises(ProvenanceError) as caught:
        read_leaf(data)
    assert caught.value.code == ErrorCode.RECORD_CHANGED


def test_every_kind_is_tested_here() -> None:
    assert {leaf.kind: type(leaf) for leaf in LEAVES} == KINDS


@pytest.mark.parametrize("leaf", LEAVES, ids=_IDS)
def test_a_leaf_comes_back_and_is_hashed_as_its_bytes(leaf: AnyLeaf) -> None:
    assert read_leaf(leaf.to_bytes()) == leaf
    assert leaf.hash == merkle.leaf_hash(leaf.to_bytes())
    assert len(leaf.to_bytes()) < 500


def test_the_bytes_of_a_leaf_are_fixed() -> None:
    """A log outlives releases of this software: the bytes must not change within a version."""
    assert LEAVES[6].to_bytes() == (
        b'{"kind":"statement","round_index":1,"run":"run-1","site":"charite",'
        b'"statement":"sha256:' + digest.of_bytes(b"some").removeprefix("sha256:").encode() + b'","version":1}'
    )
    assert LEAVES[5].to_bytes() == (
        b'{"decision":"' + digest.of_bytes(b"rejection").encode() + b'","kind":"plan-decided",'
        b'"plan":"' + _SOME.encode() + b'","site":"charite","version":1}'
    )
    assert LEAVES[1].to_bytes() == b'{"at":1700000000.0,"kind":"site-revoked","site":"charite","version":1}'


@pytest.mark.parametrize("leaf", LEAVES, ids=_IDS)
def test_any_field_missing_added_or_of_another_type_is_refused(leaf: AnyLeaf) -> None:
    raw: dict[str, Any] = json.loads(leaf.to_bytes())
    for name in raw:
        _refused(digest.canonical({key: value for key, value in raw.items() if key != name}))
        for value in (None, True, 7.5, -1, [], {}, "", "x" * 100, "sha256:" + "g" * 64, "ed25519:AAAA"):
            if value != raw[name] and not (name == "at" and value == 7.5):
                _refused(digest.canonical({**raw, name: value}))
    _refused(digest.canonical({**raw, "extra": 1}))
    with pytest.raises(ProvenanceError, match="version 1 is expected"):
        read_leaf(digest.canonical({**raw, "version": 2}))
    for kind in (*KINDS, "site-paused"):
        if kind != leaf.kind:
            _refused(digest.canonical({**raw, "kind": kind}))


@pytest.mark.parametrize("leaf", LEAVES, ids=_IDS)
def test_other_spellings_of_a_leaf_are_refused(leaf: AnyLeaf) -> None:
    data = leaf.to_bytes()
    raw = json.loads(data)
    _refused(json.dumps(raw).encode())
    _refused(json.dumps(dict(reversed(raw.items())), separators=(",", ":")).encode())
    _refused(b" " + data)
    _refused(data + b"\n")
    _refused(b'{"kind":"statement",' + data[1:])
    _refused(data.replace(b'"version":1', b'"version":1.0'))
    _refused(data.replace(b'"version":1', b'"version":true'))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"7", b'"x"', b"\xff", b"[" * 100_000, b'{"kind":[],"version":1}'])
def test_bytes_that_are_no_leaf_are_refused(data: bytes) -> None:
    _refused(data)


@given(leaf=st.sampled_from(LEAVES), data=st.data())
def test_a_change_of_any_byte_is_another_leaf_or_none(leaf: AnyLeaf, data: st.DataObject) -> None:
    changed = bytearray(leaf.to_bytes())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.sampled_from([0x01, 0x02, 0x20, 0x80]))
    try:
        other = read_leaf(bytes(changed))
    except ProvenanceError:
        return
    assert other != leaf
    assert other.hash != leaf.hash
    assert not isinstance(other, KeyRotated) or not other.authentic


def test_a_rotation_is_signed_by_both_keys() -> None:
    honest = rotate_key(_SITE, _OLD, _NEW, _AT)
    assert honest.authentic
    third = SigningKey.generate()
    plain = honest.plain()
    for change in (
        {"site": "other"},
        {"old_key": third.public.to_text()},
        {"new_key": third.public.to_text()},
        {"at": 1.8e9},
        {"old_signature": honest.new_signature},
        {"new_signature": honest.old_signature},
        {"old_signature": rotate_key(_SITE, third, _NEW, _AT).old_signature},
        {"new_signature": rotate_key(_SITE, _OLD, third, _AT).new_signature},
    ):
        assert not KeyRotated.from_plain({**plain, **change}).authentic


def test_leaves_out_of_bounds_are_not_made() -> None:
    with pytest.raises(ValueError, match="round_index"):
        StatementLogged(site=_SITE, run=_RUN, round_index=0, statement=_SOME)
    with pytest.raises(ValueError, match="64 bytes"):
        KeyRotated(site=_SITE, old_key=_OLD.public, new_key=_NEW.public, at=_AT, old_signature="", new_signature="")
    with pytest.raises(ValueError, match="UTC seconds"):
        SiteRevoked(site=_SITE, at=UtcSeconds(0))

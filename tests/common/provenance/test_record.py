"""Manifest and round record: places, order, and one spelling of everything."""

from dataclasses import replace
from typing import Any

import pytest

from pathfed_common import digest
from pathfed_common.errors import ErrorCode, ProvenanceError
from pathfed_common.ids import RunName, SiteName
from pathfed_common.provenance import record
from pathfed_common.provenance.keys import SigningKey
from pathfed_common.provenance.record import AbsentSite, AdmittedSite, FileEntry, Manifest, RoundRecord, ServerTimes
from pathfed_common.units import UtcSeconds

KEY = SigningKey.generate()
DIGEST = digest.of_bytes(b"x")
MANIFEST = Manifest(
    run=RunName("run-1"),
    plan=DIGEST,
    server_key=KEY.public,
    rounds=1,
    files=tuple(FileEntry(path=path, digest=DIGEST, size=1) for path in ("plan.dsse", "plan.json", "rounds/round-0001.dsse")),
)
ROUND = RoundRecord(
    run=RunName("run-1"),
    round_index=1,
    plan=DIGEST,
    base_state=DIGEST,
    next_state=DIGEST,
    previous=None,
    admitted=(AdmittedSite(site=SiteName("b"), update=DIGEST, update_bytes=1, statement=DIGEST, weight=1.0, rounding=0.0),),
    refused=(AbsentSite(site=SiteName("a"), code="PF507"),),
    silent=(AbsentSite(site=SiteName("c"), code="PF515"), AbsentSite(site=SiteName("d"), code="PF515")),
    excluded=(),
    offered_at=UtcSeconds(1),
    deadline=UtcSeconds(601),
    committed_at=UtcSeconds(30),
    times=ServerTimes(exchange_s=1, transfer_s=1, admission_s=1, aggregation_s=1, step_s=1),
)


@pytest.mark.parametrize(
    "path",
    [
        record.PLAN,
        record.SIGNED_PLAN,
        record.ENCODER,
        record.ENCODER_CONFIG,
        record.card_path("site-1"),
        record.approval_path("round-1"),
        record.round_path(1),
        record.round_path(123_456),
        record.state_path(0),
        record.statement_path(12, "a"),
        record.update_path(12, "a"),
    ],
)
def test_every_place_of_the_layout_may_be_listed(path: str) -> None:
    assert FileEntry(path=path, digest=DIGEST, size=0).path == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "manifest.dsse",
        "/plan.json",
        "../plan.json",
        "sites/../plan.json",
        "sites/a/../b.dsse",
        "sites\\a.dsse",
        "sites/A.dsse",
        "sites/.dsse",
        "plan.json\n",
        "rounds/round-1.dsse",
        "rounds/round-00001.dsse",
        "statements/round-00012/a.dsse",
        "states/round-0001.pt",
        "other.txt",
    ],
)
def test_no_other_place_may_be_listed(path: str) -> None:
    with pytest.raises(ValueError, match="not a place in a record"):
        FileEntry(path=path, digest=DIGEST, size=0)


def test_manifest_round_trips_and_is_signed_by_the_key_it_names() -> None:
    data = MANIFEST.to_bytes(KEY)
    assert Manifest.from_bytes(data) == MANIFEST
    with pytest.raises(ValueError, match="server key it names"):
        MANIFEST.to_bytes(SigningKey.generate())


def test_manifest_lists_each_file_once_in_order() -> None:
    for files in (MANIFEST.files[::-1], (*MANIFEST.files, MANIFEST.files[-1])):
        with pytest.raises(ValueError, match="in order of their paths"):
            replace(MANIFEST, files=files)
    entry = MANIFEST.entry("plan.json")
    assert entry is not None
    assert entry.size == 1
    assert MANIFEST.entry("plan.toml") is None


def test_round_record_round_trips_and_opens_with_the_servers_key_alone() -> None:
    data = ROUND.to_bytes(KEY)
    assert RoundRecord.from_bytes(data, KEY.public) == ROUND
    with pytest.raises(ProvenanceError) as caught:
        RoundRecord.from_bytes(data, SigningKey.generate().public)
    assert caught.value.code == ErrorCode.RECORD_SIGNATURE


@pytest.mark.parametrize(
    "change",
    [
        {"round_index": 0},
        {"silent": ROUND.silent[::-1]},
        {"silent": (*ROUND.silent, ROUND.silent[-1])},
        {"excluded": ROUND.refused},
        {"admitted": list(ROUND.admitted)},
        {"offered_at": -1.0},
    ],
    ids=["index", "order", "twice", "two lists", "list", "time"],
)
def test_a_round_record_that_contradicts_itself_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"round_index|order of their names|tuple|UTC"):
        replace(ROUND, **change)


def test_codes_and_weights_have_bounds() -> None:
    for code in ("", "PF1", "pf515", "PF515 patient 7"):
        with pytest.raises(ValueError, match="not an error code"):
            AbsentSite(site=SiteName("a"), code=code)
    for weight in (0.0, 1.5):
        with pytest.raises(ValueError, match="weight"):
            replace(ROUND.admitted[0], weight=weight)

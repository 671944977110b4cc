"""Version 1 of the control protocol stays readable: field numbers and types as recorded, and messages as they were sent once.

What these tables hold is what is in use somewhere. Lines may be added, for new fields; none is ever changed or taken out.
"""

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from pathfed_common.protocol import control_pb2 as pb

#: message -> field -> (number, type); a star says that it repeats.
FIELDS = {
    "EnrollRequest": {"secret": (1, "bytes"), "site_card": (2, "bytes"), "tls_csr_der": (3, "bytes"), "software": (4, "string")},
    "EnrollReply": {"state": (1, "enum"), "certificate_pem": (2, "bytes"), "ca_pem": (3, "bytes"), "server_card": (4, "bytes")},
    "GetServerCardRequest": {},
    "GetServerCardReply": {"server_card": (1, "bytes")},
    "RenewRequest": {"tls_csr_der": (1, "bytes")},
    "RenewReply": {"certificate_pem": (1, "bytes"), "ca_pem": (2, "bytes")},
    "RotateKeyRequest": {"site_card": (1, "bytes"), "rotation": (2, "bytes"), "continuity": (3, "bytes")},
    "RotateKeyReply": {},
    "ListPlansRequest": {},
    "ListPlansReply": {"signed_plans": (1, "bytes*")},
    "DecideRequest": {"envelope": (1, "bytes")},
    "DecideReply": {},
    "ReportRequest": {"software": (1, "string"), "state": (2, "string")},
    "ReportReply": {
        **{"now": (1, "double"), "certificate_until": (2, "double"), "log_size": (3, "uint64"), "renew": (4, "bool")},
        **{"outcomes": (5, "message*"), "suspended": (6, "bool")},
    },
    "Outcome": {"run": (1, "string"), "round": (2, "uint64"), "state": (3, "string"), "code": (4, "string"), "offered_at": (5, "double")},
    "GetCheckpointRequest": {"known_size": (1, "uint64")},
    "GetCheckpointReply": {"note": (1, "bytes"), "consistency": (2, "bytes*")},
    "GetInclusionRequest": {"leaf_hash": (1, "bytes"), "size": (2, "uint64")},
    "GetInclusionReply": {"index": (1, "uint64"), "proof": (2, "bytes*")},
    "GetLeavesRequest": {"start": (1, "uint64"), "stop": (2, "uint64")},
    "GetLeavesReply": {"leaves": (1, "bytes*")},
    "CosignRequest": {"size": (1, "uint64"), "line": (2, "bytes")},
    "CosignReply": {},
    "GetManifestRequest": {"file": (1, "bytes")},
    "GetManifestReply": {"size": (1, "uint64"), "shards": (2, "bytes*")},
    "GetShardRequest": {"file": (1, "bytes"), "index": (2, "uint64"), "offset": (3, "uint64")},
    "GetShardReply": {"piece": (1, "bytes")},
    "BeginUpdateRequest": {
        **{"run": (1, "string"), "round_index": (2, "uint64"), "file": (3, "bytes")},
        **{"size": (4, "uint64"), "shards": (5, "bytes*")},
    },
    "BeginUpdateReply": {"here": (1, "uint64")},
    "PutShardRequest": {
        **{"run": (1, "string"), "round_index": (2, "uint64"), "file": (3, "bytes")},
        **{"offset": (4, "uint64"), "piece": (5, "bytes")},
    },
    "PutShardReply": {"here": (1, "uint64")},
}
METHODS = {
    "Bulk": {name: name for name in ("GetManifest", "GetShard", "BeginUpdate", "PutShard")},
    "Enrolment": {"Enroll": "Enroll"},
    "Control": {
        name: name
        for name in (
            *("GetServerCard", "Renew", "RotateKey", "ListPlans", "Decide", "Report"),
            *("GetCheckpoint", "GetInclusion", "GetLeaves", "Cosign"),
        )
    },
}
STATES = {"STATE_UNSPECIFIED": 0, "PENDING": 1, "ADMITTED": 2, "REFUSED": 3}
TYPES = {
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_ENUM: "enum",
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_MESSAGE: "message",
}
#: Messages as version 0.1.0 put them on the wire, and what they say.
GOLDEN: dict[str, tuple[str, Message]] = {
    "enroll request": (
        "0a037365631204636172641a036373722205302e312e30",
        pb.EnrollRequest(secret=b"sec", site_card=b"card", tls_csr_der=b"csr", software="0.1.0"),
    ),
    "enroll reply": ("08021203706d651a026361", pb.EnrollReply(state=pb.EnrollReply.ADMITTED, certificate_pem=b"pme", ca_pem=b"ca")),
    "server card": ("0a0463617264", pb.GetServerCardReply(server_card=b"card")),
    "renew request": ("0a03637372", pb.RenewRequest(tls_csr_der=b"csr")),
    "renew reply": ("0a03706d6512026361", pb.RenewReply(certificate_pem=b"pme", ca_pem=b"ca")),
    "rotate": ("0a04636172641201721a0163", pb.RotateKeyRequest(site_card=b"card", rotation=b"r", continuity=b"c")),
    "plans": ("0a01610a0162", pb.ListPlansReply(signed_plans=[b"a", b"b"])),
    "decide": ("0a0165", pb.DecideRequest(envelope=b"e")),
    "report request": ("0a05302e312e30120772756e6e696e67", pb.ReportRequest(software="0.1.0", state="running")),
    "report reply": (
        "09000000000000f83f11000000000000044018808080808080808001",
        pb.ReportReply(now=1.5, certificate_until=2.5, log_size=2**56),
    ),
    "report reply with outcomes": (
        "2a1e0a017210021a07726566757365642205504635303829000000000000f83f3001",
        pb.ReportReply(outcomes=[pb.Outcome(run="r", round=2, state="refused", code="PF508", offered_at=1.5)], suspended=True),
    ),
    "checkpoint request": ("08ac02", pb.GetCheckpointRequest(known_size=300)),
    "checkpoint reply": ("0a046e6f7465120161120162", pb.GetCheckpointReply(note=b"note", consistency=[b"a", b"b"])),
    "inclusion request": ("0a016810ac02", pb.GetInclusionRequest(leaf_hash=b"h", size=300)),
    "inclusion reply": ("0805120161", pb.GetInclusionReply(index=5, proof=[b"a"])),
    "leaves request": ("08011002", pb.GetLeavesRequest(start=1, stop=2)),
    "leaves reply": ("0a01610a0162", pb.GetLeavesReply(leaves=[b"a", b"b"])),
    "manifest request": ("0a0164", pb.GetManifestRequest(file=b"d")),
    "manifest reply": ("08ac02120161120162", pb.GetManifestReply(size=300, shards=[b"a", b"b"])),
    "shard request": ("0a016410011802", pb.GetShardRequest(file=b"d", index=1, offset=2)),
    "shard reply": ("0a0170", pb.GetShardReply(piece=b"p")),
    "begin": ("0a017210011a016420052a0161", pb.BeginUpdateRequest(run="r", round_index=1, file=b"d", size=5, shards=[b"a"])),
    "begin reply": ("08ac02", pb.BeginUpdateReply(here=300)),
    "put": ("0a017210011a016420052a0170", pb.PutShardRequest(run="r", round_index=1, file=b"d", offset=5, piece=b"p")),
    "put reply": ("08ac02", pb.PutShardReply(here=300)),
    "cosign": ("080512046c696e65", pb.CosignRequest(size=5, line=b"line")),
}


def test_fields_keep_their_numbers_and_types():
    found = {
        name: {field.name: (field.number, TYPES[field.type] + ("*" if field.is_repeated else "")) for field in message.fields}
        for name, message in pb.DESCRIPTOR.message_types_by_name.items()
    }
    for name, fields in FIELDS.items():
        assert found[name].items() >= fields.items(), name
    assert found == FIELDS, "a new field or message: add it to the table"


def test_services_keep_their_names_and_messages():
    assert pb.DESCRIPTOR.package == "pathfed.control.v1"
    for service, methods in METHODS.items():
        found = pb.DESCRIPTOR.services_by_name[service].methods_by_name
        assert {name: (each.input_type.name, each.output_type.name) for name, each in found.items()} == {
            name: (f"{stem}Request", f"{stem}Reply") for name, stem in methods.items()
        }
    assert dict(pb.EnrollReply.State.items()) == STATES


@pytest.mark.parametrize("name", GOLDEN)
def test_messages_of_version_1_are_read_and_written_as_ever(name: str):
    data, message = GOLDEN[name]
    assert type(message).FromString(bytes.fromhex(data)) == message
    assert message.SerializeToString(deterministic=True).hex() == data


def test_a_message_from_a_later_version_is_read_without_what_it_adds():
    added = bytes.fromhex("a206036e6577")  # field 100, 3 bytes
    for data, message in GOLDEN.values():
        found = type(message).FromString(bytes.fromhex(data) + added)
        found.DiscardUnknownFields()
        assert found == message

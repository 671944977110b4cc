"""What a stranger, a site that misbehaves, or a broken client may send, over real gRPC: a code is the answer, and nothing else happens."""

import base64
import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace

import grpc
import pytest
from control_peer import DEADLINE_S, Peer, call, code_of, control, control_channel, enroll, enrolment_channel
from grpc_health.v1 import health_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfed_common import digest
from pathfed_common.digest import Digest
from pathfed_common.error_catalog import CATALOG
from pathfed_common.errors import ErrorCode, HostError
from pathfed_common.ids import SiteName
from pathfed_common.protocol import control_pb2 as pb
from pathfed_common.protocol.invitation import Invitation
from pathfed_common.provenance import dsse
from pathfed_common.provenance.documents import SITE_CARD_TYPE
from pathfed_server import members
from pathfed_server.control import Rates, start_control
from pathfed_server.transport.grpc_service import LONGEST_CALL_S, PIECE_LIMIT, REQUEST_LIMIT

NORTH = SiteName("north")
CARD = pb.GetServerCardRequest()
METHODS = ("GetServerCard", "Renew", "RotateKey", "ListPlans", "Decide", "Report", "GetCheckpoint", "GetInclusion", "GetLeaves", "Cosign")
#: What bytes that nobody meant may come to; never an error inside.
ANSWERS = {
    *(None, "PF412", "PF413", "PF414", "PF415", "PF416", "PF418"),
    *("PF501", "PF516", "PF601", "PF602", "PF608", "PF609", "PF610", "PF611"),
}
#: So that no attack stops at the rate limit.
FREE = Rates(strangers=(1e6, 10**6), addresses=(1e6, 10**6), sites=(1e6, 10**6))


def answered(channel: grpc.Channel, service: str, method: str, data: bytes) -> str | None:
    """The code of the answer, whose text is constant; None: it was taken, or gRPC itself turned it away."""
    try:
        call(channel, service, method, data)
    except grpc.RpcError as error:
        code, text = code_of(error), error.details()
    else:
        return None
    assert code is None or text == CATALOG[ErrorCode(code)].title
    return code


@pytest.fixture
def unlimited(server_home, store):
    """A control plane without rate limits, and a site in it."""
    listening = start_control(server_home, store, FREE)
    try:
        north, invitation = Peer.make("north"), members.invite(server_home.root, NORTH, hours=1).text
        enroll(server_home, north.request(invitation))
        members.admit(server_home.root, NORTH, north.fingerprint)
        yield server_home, north.certified(enroll(server_home, north.request(invitation)))
    finally:
        listening.stop(0)


def test_bytes_that_are_no_message_never_fail_inside(unlimited):
    serving, north = unlimited
    with control_channel(serving, north) as inside, enrolment_channel(serving) as outside:

        @settings(max_examples=150)
        @given(st.sampled_from(METHODS), st.binary(max_size=300))
        def attack(method: str, data: bytes) -> None:
            assert answered(inside, "Control", method, data) in ANSWERS
            assert answered(outside, "Enrolment", "Enroll", data) in ANSWERS

        attack()
    assert control(serving, north, "GetServerCard", CARD).server_card, "the server still serves"


def test_messages_cut_short_or_with_a_flipped_byte_never_fail_inside(unlimited):
    serving, north = unlimited
    plan = Digest("sha256:" + "0" * 64)
    sound = {
        "Decide": pb.DecideRequest(envelope=north.approval(plan)).SerializeToString(),
        "Renew": pb.RenewRequest(tls_csr_der=north.csr).SerializeToString(),
        "RotateKey": pb.RotateKeyRequest(site_card=north.card, rotation=north.card, continuity=north.card).SerializeToString(),
    }
    with control_channel(serving, north) as inside:

        @settings(max_examples=120)
        @given(st.sampled_from(sorted(sound)), st.integers(0, 2000), st.integers(0, 255), st.booleans())
        def attack(method: str, at: int, value: int, cut: bool) -> None:
            data = sound[method]
            at %= len(data)
            changed = data[:at] if cut else data[:at] + bytes([data[at] ^ value]) + data[at + 1 :]
            assert answered(inside, "Control", method, changed) in ANSWERS

        attack()


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("GetCheckpoint", pb.GetCheckpointRequest(known_size=2**64 - 1)),
        ("GetInclusion", pb.GetInclusionRequest(leaf_hash=bytes(32), size=2**63)),
        ("GetLeaves", pb.GetLeavesRequest(start=2**63, stop=2**64 - 1)),
        ("Cosign", pb.CosignRequest(size=2**64 - 1)),
    ],
)
def test_a_number_that_no_database_holds_is_refused(serving, enrolled, refused, method, request_):
    """A number that no database column holds is refused with a code, and fails nothing inside."""
    with refused("PF416", grpc.StatusCode.INVALID_ARGUMENT):
        control(serving, enrolled("north"), method, request_)


def test_a_message_that_is_too_large_is_turned_away_and_the_next_is_served(serving, enrolled, refused):
    north = enrolled("north")
    with control_channel(serving, north) as channel:
        with refused("PF416", grpc.StatusCode.INVALID_ARGUMENT):
            call(channel, "Control", "Decide", pb.DecideRequest(envelope=b"x" * (REQUEST_LIMIT + 1)))
        with refused(None, grpc.StatusCode.RESOURCE_EXHAUSTED):  # by gRPC, before it is read
            call(channel, "Control", "Decide", pb.DecideRequest(envelope=b"x" * (PIECE_LIMIT + 1)))
        assert call(channel, "Control", "GetServerCard", CARD).server_card


@pytest.mark.parametrize("deadline", [None, LONGEST_CALL_S * 10])
def test_a_call_without_a_sensible_deadline_is_refused(serving, enrolled, refused, deadline):
    with refused("PF416", grpc.StatusCode.INVALID_ARGUMENT):
        control(serving, enrolled("north"), "GetServerCard", CARD, timeout=deadline)


def test_nothing_but_our_methods_and_health_is_there(serving, enrolled):
    with control_channel(serving, enrolled("north")) as inside, enrolment_channel(serving) as outside:
        for path in ("/pathfed.control.v1.Control/Shutdown", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
            raw: Callable[..., bytes] = inside.unary_unary(path)
            with pytest.raises(grpc.RpcError) as caught:
                raw(b"", timeout=DEADLINE_S)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.RpcError) as caught:
            call(outside, "Control", "GetServerCard", CARD)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, "the enrolment port has no control service"
        for channel in (inside, outside):
            check: Callable[..., bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
            told = health_pb2.HealthCheckResponse.FromString(check(b"", timeout=DEADLINE_S))
            assert told.status == health_pb2.HealthCheckResponse.SERVING


def test_who_speaks_no_tls_gets_no_answer(serving):
    for port in (serving.settings.enrolment_port, serving.settings.control_port):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
            call(channel, "Enrolment", "Enroll", pb.EnrollRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_somebody_who_tries_tokens_is_slowed_down_and_others_are_not(serving, enrolled):
    north = enrolled("north")
    guess = pb.EnrollRequest(secret=bytes(32), site_card=north.card, tls_csr_der=north.csr, software="1").SerializeToString()
    with enrolment_channel(serving) as channel:
        codes = [answered(channel, "Enrolment", "Enroll", guess) for _ in range(200)]
    assert codes[0] == "PF412"
    assert "PF417" in codes
    assert control(serving, north, "GetServerCard", CARD).server_card


def test_a_site_that_calls_without_pause_is_slowed_down_and_another_is_not(serving, enrolled):
    north, south = enrolled("north"), enrolled("south")
    codes: list[str | None] = []
    with control_channel(serving, north) as channel:

        def hammer() -> None:
            codes.extend(answered(channel, "Control", "ListPlans", b"") for _ in range(120))

        threads = [threading.Thread(target=hammer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(codes) == {None, "PF417"}
    assert control(serving, south, "GetServerCard", CARD).server_card


@pytest.mark.parametrize("name", ["../../../tmp/x", "..", "/etc/passwd", "a/b", "north\x00", "NORTH", ".new", "x" * 64, ""])
def test_a_name_that_would_leave_its_folder_gets_nowhere(serving, refused, name):
    north, invitation = Peer.make("north"), members.invite(serving.root, NORTH, hours=1).text
    plain = {"site": name, "evidence_key": north.evidence.public.to_text(), "flower_key": north.node_key}
    request = north.request(invitation)
    request.site_card = dsse.seal(digest.canonical(plain), SITE_CARD_TYPE, north.evidence)
    before = sorted(serving.root.rglob("*"))
    with refused("PF413", grpc.StatusCode.INVALID_ARGUMENT):
        enroll(serving, request)
    assert [path for path in sorted(serving.root.rglob("*")) if path not in before and not path.name.startswith("pathfed.db")] == []


def test_no_secret_gets_into_logs_errors_or_repr(serving, refused, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    invitation = members.invite(serving.root, NORTH, hours=1).text
    secret, north = Invitation.from_text(invitation).secret, Peer.make("north")
    request = north.request(invitation)
    enroll(serving, request)
    with refused("PF412"):  # used up
        enroll(serving, Peer.make("north").request(invitation))
    broken = pb.EnrollRequest()
    broken.CopyFrom(request)
    broken.site_card = b"broken"
    with refused("PF413"):
        enroll(serving, broken)
    told = caplog.text + "".join(capfd.readouterr()) + repr(Invitation.from_text(invitation))
    assert "PF412" in told, "something was logged"
    forms = (secret.hex(), base64.b64encode(secret).decode()[:20], repr(secret)[2:20], invitation[20:60])
    assert [form for form in forms if form in told] == []


def test_a_failure_inside_is_logged_for_the_operator_and_told_as_a_code_alone(serving, enrolled, refused, monkeypatch, caplog):
    from pathfed_server.desks import Sites

    def fail(self) -> list[bytes]:
        raise ValueError("details that nobody outside should read")

    monkeypatch.setattr(Sites, "plans", fail)
    with pytest.raises(grpc.RpcError) as caught:
        control(serving, enrolled("north"), "ListPlans", pb.ListPlansRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == CATALOG[ErrorCode.CONTROL_INTERNAL].title
    assert "details that nobody outside should read" in caplog.text


def test_without_its_database_the_service_says_so_and_comes_back_with_it(serving, enrolled, refused):
    north, database = enrolled("north"), serving.root / "pathfed.db"
    for path in serving.root.glob("pathfed.db*"):
        shutil.move(path, path.with_name("away-" + path.name))
    database.mkdir()  # what SQLite can neither open nor make anew
    with refused("PF512", grpc.StatusCode.UNAVAILABLE):
        control(serving, north, "GetServerCard", CARD)
    database.rmdir()
    for path in serving.root.glob("away-*"):
        shutil.move(path, path.with_name(path.name.removeprefix("away-")))
    assert control(serving, north, "GetServerCard", CARD).server_card


def test_a_second_server_on_the_same_port_is_told(serving, store):
    with pytest.raises(HostError, match="PF902"):
        start_control(serving, store)


def test_a_replayed_enrolment_gives_what_is_public_and_only_to_a_key_it_is_worth_nothing_without(serving, refused):
    """Whoever recorded a request and replays it gets the certificate, which is public, and not the key that it is for."""
    north, invitation = Peer.make("north"), members.invite(serving.root, NORTH, hours=1).text
    enroll(serving, north.request(invitation))
    members.admit(serving.root, NORTH, north.fingerprint)
    recorded = enroll(serving, north.request(invitation))
    thief = replace(Peer.make("north"), certificate=recorded.certificate_pem)
    with pytest.raises(grpc.RpcError) as caught:
        control(serving, thief, "GetServerCard", CARD)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

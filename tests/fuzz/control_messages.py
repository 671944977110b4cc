"""Fuzz the control plane with Atheris: bytes for every method, over real gRPC, guided by the coverage of the server's code.

Run as `python tests/fuzz/control_messages.py CORPUS [libFuzzer options]`, such as `-max_total_time=600`; `CORPUS` is a folder that sound
messages are written to and new inputs are kept in. An input is one byte for the method and the message's bytes. It ends with an error, and
the input in a file, where an answer has a code that means a failure inside, or no constant text.
tests/server/control/test_fuzz.py runs it for a bounded number of inputs.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pathfed_common", "pathfed_server"]):
    from pathfed_common.digest import Digest
    from pathfed_common.error_catalog import CATALOG
    from pathfed_common.errors import ErrorCode
    from pathfed_common.ids import SiteName
    from pathfed_common.protocol import control_pb2 as pb
    from pathfed_common.provenance.documents import seal_card_change
    from pathfed_server import app, members
    from pathfed_server.control import Rates, start_control
    from pathfed_server.db.sql_store import SqlStore

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import grpc
from control_peer import Peer, call, code_of, control_channel, enroll, enrolment_channel

FREE = Rates(strangers=(1e6, 10**6), addresses=(1e6, 10**6), sites=(1e6, 10**6))
METHODS = (
    ("Enrolment", "Enroll"),
    *(("Control", name) for name in ("Renew", "RotateKey", "Decide", "Report", "GetCheckpoint", "GetInclusion", "GetLeaves", "Cosign")),
    *(("Bulk", name) for name in ("GetManifest", "BeginUpdate")),
)
#: A failure inside, or a database that does not answer.
FORBIDDEN = {"PF419", "PF512"}


def seeds(peer: Peer, invitation: str) -> dict[str, bytes]:
    """A sound message of each method, by its index and name."""
    messages = (
        peer.request(invitation),
        pb.RenewRequest(tls_csr_der=peer.csr),
        pb.RotateKeyRequest(site_card=peer.card, continuity=seal_card_change(peer.card, peer.evidence)),
        pb.DecideRequest(envelope=peer.approval(Digest("sha256:" + "0" * 64))),
        pb.ReportRequest(software="0.1.0", state="running"),
        pb.GetCheckpointRequest(known_size=1),
        pb.GetInclusionRequest(leaf_hash=bytes(32), size=1),
        pb.GetLeavesRequest(start=0, stop=5),
        pb.CosignRequest(size=1, line=b"x"),
        pb.GetManifestRequest(file=bytes(32)),
        pb.BeginUpdateRequest(run="one", round_index=1, file=bytes(32), size=5, shards=[bytes(32)]),
    )
    return {name: bytes([at]) + made.SerializeToString() for at, ((_, name), made) in enumerate(zip(METHODS, messages, strict=True))}


def main() -> None:
    """Serve, enrol a site, and send it all that Atheris thinks of."""
    with tempfile.TemporaryDirectory() as folder:
        home = app.init(Path(folder) / "server", consortium="test", host="127.0.0.1", listen="127.0.0.1", database="")
        with SqlStore(home.database_url) as store:
            listening = start_control(home, store, FREE)
            north, invitation = Peer.make("north"), members.invite(home.root, SiteName("north"), hours=1).text
            enroll(home, north.request(invitation))
            members.admit(home.root, north.name, north.fingerprint)
            north = north.certified(enroll(home, north.request(invitation)))
            corpus = Path(sys.argv[1])
            corpus.mkdir(exist_ok=True)
            for name, data in seeds(north, invitation).items():
                (corpus / name).write_bytes(data)
            with control_channel(home, north) as inside, enrolment_channel(home) as outside:

                def send(data: bytes) -> None:
                    service, method = METHODS[data[0] % len(METHODS)] if data else METHODS[0]
                    try:
                        call(outside if service == "Enrolment" else inside, service, method, data[1:])
                    except grpc.RpcError as error:
                        code = code_of(error)
                        if code in FORBIDDEN or (code and error.details() != CATALOG[ErrorCode(code)].title):
                            raise RuntimeError(f"{method} answered {code}: {error.details()}") from None

                atheris.Setup(sys.argv, send)
                atheris.Fuzz()
            listening.stop(0)


if __name__ == "__main__":
    main()

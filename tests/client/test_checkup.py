"""`pathfed-site doctor` on a real site: what it finds, what it never says, and how it ends."""

import contextlib
import datetime
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pathfed_client import checkup
from pathfed_client.checkup import Checkup, DoctorError, examine_site
from pathfed_client.io.doctor.findings import Finding, Severity
from pathfed_common.provenance.documents import ServerCard
from pathfed_server.transport.certificates import TlsFiles, make_tls

SURNAMES = ("Muellerova", "Oyelaran", "Katzenstein", "Drozdowski", "Yamashiro")
CHECKS = [
    "folders",
    "patients",
    "readable",
    "formats",
    "mpp",
    "content",
    "decoders",
    "direct",
    "speed",
    "disk",
    "devices",
    "keys",
    "server",
]


@pytest.fixture
def doctor(site_cli, monkeypatch) -> Callable[..., dict[str, Any]]:
    """Run the command, on a disk with room: its findings by what was looked at, and how it ended as `end`."""
    monkeypatch.setattr(checkup, "free_bytes", lambda folder: 1 << 40)

    def run(home, *more):
        done = site_cli("doctor", "--home", home.root, "--seconds", 0, "--json", *more)
        report = done.json.get("report", done.json)
        return {**{finding["check"]: finding for finding in report["findings"]}, "end": {"status": done.status, "json": done.json}}

    return run


@pytest.fixture
def site(world, tmp_path):
    """A world whose slides and list a test may spoil, and a fresh home in it."""
    mine = replace(world, root=tmp_path / "world")
    shutil.copytree(world.root, mine.root)
    return mine, mine.init(tmp_path / "home")


@pytest.fixture(scope="session")
def tls() -> TlsFiles:
    return make_tls("test", ["127.0.0.1"], now=datetime.datetime.now(datetime.UTC))


@contextlib.contextmanager
def serving(folder: Path, tls: TlsFiles) -> Iterator[str]:
    """A TLS server that takes connections and says nothing; its address."""
    (folder / "cert.pem").write_bytes(tls.certificate)
    (folder / "key.pem").write_bytes(tls.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")

    def take(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection, contextlib.suppress(ssl.SSLError), context.wrap_socket(connection, server_side=True) as secured:
                    secured.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=take, args=[listening], daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_good_site_has_no_error_and_every_check_was_made(site, doctor):
    mine, home = site
    found = doctor(home, "--plan", mine.signed_plan)
    assert found["end"]["status"] == 0
    assert [check for check in found if check != "end"] == CHECKS
    severities = {check: found[check]["severity"] for check in CHECKS}
    assert severities == {**dict.fromkeys(severities, "ok"), "server": "warning"}
    assert found["server"]["codes"] == {"PF403": 1}
    assert found["formats"]["counts"] == {"generic-tiff": 5}
    assert found["direct"]["counts"] == {"direct": 5, "through OpenSlide": 0}
    assert found["speed"]["counts"]["tiles_per_second"] > 0
    assert found["decoders"]["counts"] == {"samples": 4, "wrong": 0}


def test_nothing_is_written(site, doctor):
    mine, home = site

    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for root in (mine.root, home.root) for path in root.rglob("*")}

    before = state()
    doctor(home)
    assert state() == before


def test_names_are_shown_only_on_request(site, site_cli):
    mine, home = site
    (mine.slides / f"{SURNAMES[0]}_biopsy.tif").write_bytes(b"no slide")
    (mine.slides / "Unlisted-Surname.tif").write_bytes(b"no slide")
    for form in ([], ["--json"]):
        told = site_cli("doctor", "--home", home.root, "--seconds", 0, *form)
        everything = told.out + told.err
        assert not any(name in everything for name in (*SURNAMES, "Unlisted", "PATIENTID", str(mine.root), str(home.root)))
        named = site_cli("doctor", "--home", home.root, "--seconds", 0, "--show-slides", *form)
        assert SURNAMES[0] in named.out
        assert "Unlisted-Surname" in named.out
        assert SURNAMES[1] not in named.out


def test_slides_that_are_damaged_or_unlisted_are_counted_with_their_codes(site, doctor):
    mine, home = site
    first, second, third = (mine.slides / f"{name}_biopsy.tif" for name in SURNAMES[:3])
    first.write_bytes(first.read_bytes()[:1000])
    second.write_bytes(b"")
    (mine.slides / "other.tif").write_bytes(third.read_bytes())
    found = doctor(home)
    assert (found["readable"]["severity"], found["readable"]["codes"]) == ("warning", {"PF205": 2})
    assert (found["patients"]["severity"], found["patients"]["codes"]) == ("warning", {"PF204": 1})
    assert found["readable"]["counts"]["looked at"] == 5  # the slide without a patient is not opened
    assert found["end"]["status"] == 0


@pytest.mark.parametrize(
    ("spoil", "check", "code"),
    [
        (lambda mine, home: shutil.rmtree(mine.slides), "folders", "PF216"),
        (lambda mine, home: [path.unlink() for path in mine.slides.iterdir()], "folders", "PF201"),
        (lambda mine, home: [path.write_bytes(b"") for path in mine.slides.iterdir()], "readable", "PF205"),
        (lambda mine, home: mine.patients.unlink(), "patients", "PF202"),
        (lambda mine, home: mine.patients.write_text("slide,patient\nother.svs,P1\n"), "patients", "PF204"),
        (lambda mine, home: (home.root / "keys" / "pseudonym.key").chmod(0o644), "keys", "PF906"),
        (lambda mine, home: (home.root / "keys" / "flower").unlink(), "keys", "PF906"),
        (lambda mine, home: home.ca_file.unlink(), "server", "PF904"),
        (lambda mine, home: home.ca_file.write_text("no certificate"), "server", "PF904"),
    ],
    ids=["folder gone", "no slide", "all damaged", "no list", "nobody listed", "key open", "key gone", "no CA", "damaged CA"],
)
def test_an_error_ends_with_the_doctors_own_code_and_the_whole_report(site, doctor, spoil, check, code):
    mine, home = site
    spoil(mine, home)
    found = doctor(home)
    assert found["end"]["status"] == 19
    assert found["end"]["json"]["error"]["code"] == "PF909"
    assert [one for one in CHECKS if found[one]["severity"] == "error"] == [check]
    assert code in found[check]["codes"]
    assert found[check]["hint"]


def test_a_server_with_the_pinned_certificate_is_well_and_with_another_an_error(world, doctor, tls, tmp_path):
    mine = replace(world, root=tmp_path / "world")
    shutil.copytree(world.root, mine.root)
    other = make_tls("other", ["127.0.0.1"], now=datetime.datetime.now(datetime.UTC))
    for serves, severity in ((tls, "ok"), (other, "error")):
        folder = tmp_path / severity
        folder.mkdir()
        with serving(folder, serves) as address:
            card = ServerCard(
                name="test",
                evidence_key=mine.server_key.public,
                ca_pem=tls.ca_certificate.decode(),
                fleet_address=address,
                control_address="127.0.0.1:2",
                enrolment_address="127.0.0.1:3",
            )
            mine.card.write_bytes(card.to_bytes(mine.server_key))
            found = doctor(mine.init(folder / "home"), "--sample", 0)
        assert found["server"]["severity"] == severity
        assert found["end"]["status"] == (0 if severity == "ok" else 19)


def test_without_a_home_it_says_so(site_cli, tmp_path):
    done = site_cli("doctor", "--home", tmp_path / "nowhere", "--json")
    assert (done.code, done.status) == ("PF904", 19)


def test_a_sample_is_bounded_and_seeded(site):
    _, home = site
    first, again, other = (examine_site(home, None, sample=2, seconds=0, seed=seed) for seed in (0, 0, 1))
    assert all(found.findings[2].counts["looked at"] == 2 for found in (first, again, other))
    assert first.findings[2] == again.findings[2]


def test_the_worst_finding_is_the_reports():
    findings = [Finding(check=one.value, severity=one, what="a") for one in (Severity.NOTE, Severity.ERROR, Severity.OK)]
    found = Checkup(tuple(findings))
    assert (found.worst, found.errors, DoctorError(found).value) == (Severity.ERROR, 1, "error")
    assert Checkup(tuple(findings[::2])).worst is Severity.NOTE
